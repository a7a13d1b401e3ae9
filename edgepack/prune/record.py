"""What a package says of pruning: in its manifest, and in the picture of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZES = ("step", "bytes", "parameters", "flops_per_token")
_FIDELITY = ("mean_kld", "perplexity", "top1_agreement", "cosine_mean")


def in_manifest(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of `edgepack-prune.json` but scores and lists of tokens and heads.

    Args:
        document: `edgepack-prune.json`.
    """
    removed = {
        name: {key: value for key, value in gone.items() if key != "kept"} for name, gone in document["removed"].items()
    }
    return {
        "request": document["request"],
        "kept_layers": document["kept_layers"],
        "removed": removed,
        "text": document["text"],
        "steps": [document["before"], *document["steps"]],
    }


def waterfall(
    document: Mapping[str, Any], quantize: str, artifact_bytes: int, measured: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """The steps from source to artifact, for `edgepack.report`.

    Args:
        document: `edgepack-prune.json`.
        quantize: The last step's name.
        artifact_bytes: Size of the artifact.
        measured: Values of the package's measurements by name.
    """
    rows = [document["before"], *document["steps"]]
    last: dict[str, Any] = {"step": quantize, "bytes": artifact_bytes}
    last |= {name: measured[name] for name in _FIDELITY if measured.get(name) is not None}
    return [*({key: row[key] for key in (*_SIZES, *_FIDELITY) if key in row} for row in rows), last]
