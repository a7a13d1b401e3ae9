"""How the bits of a calibrated file were spent, for the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def allocation(recipe: Mapping[str, Any]) -> str:
    """A paragraph; empty where a preset was written.

    Args:
        recipe: Of the manifest.
    """
    found, calibration = recipe.get("allocation"), recipe.get("calibration")
    if not isinstance(found, Mapping) or not isinstance(calibration, Mapping):
        return ""
    counts = Counter(found["types"].values()).most_common()
    types = ", ".join(f"{count} {kind}" for kind, count in counts)
    words = [
        f"Types were chosen for this model, by what each tensor's error costs on {calibration['tokens']:,} tokens of "
        f"calibration text ({calibration['text']}): {types}.",
        f"Predicted KL divergence: {found['predicted_kld']:.3g} nats/token"
        + (f"; the best preset that is no larger, {_preset(found['runner_up'])}." if found.get("runner_up") else "."),
    ]
    if recipe.get("feedback"):
        left = sum(recipe["feedback"].values()) / len(recipe["feedback"])
        words.append(
            f"{len(recipe['feedback'])} tensors were rounded with column feedback, which left {100 * left:.0f} % of "
            "the weighted error of plain rounding on average."
        )
    return " ".join(words)


def _preset(runner_up: Mapping[str, Any]) -> str:
    return f"{runner_up['quantize']} ({runner_up['artifact_bytes'] / 1e6:,.1f} MB): {runner_up['predicted_kld']:.3g}"
