"""Rows, budgets and predictions brought together: which budgets apply to a model, and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepack.measurement import Measurement, from_json, judge

if TYPE_CHECKING:
    from edgepack.targets import Target

# What only a model with logits has, and what only an embedder has; every other measurement applies to both.
GENERATION = frozenset(
    [
        "mean_kld",
        "median_kld",
        "kld_p99",
        "top1_agreement",
        "perplexity",
        "source_perplexity",
        "ttft_ms_p50",
        "ttft_ms_p90",
        "prefill_tokens_per_s",
        "decode_tokens_per_s_p50",
        "decode_tokens_per_s_p10",
    ]
)
EMBEDDING = frozenset(
    [
        "cosine_mean",
        "cosine_p01",
        "neighbour_agreement",
        "label_agreement",
        "rank_agreement",
        "latency_ms_p50",
        "latency_ms_p90",
    ]
)
# How an encoder is held against its source depends on what it gives: vectors, labels or scores. Budgets of the other
# kinds do not apply to it.
KINDS = (
    frozenset(["cosine_mean", "cosine_p01", "neighbour_agreement"]),
    frozenset(["label_agreement"]),
    frozenset(["rank_agreement"]),
)
# What depends on the machine it was measured on; fidelity and size do not.
SPEED = frozenset(
    [
        "ttft_ms_p50",
        "ttft_ms_p90",
        "prefill_tokens_per_s",
        "decode_tokens_per_s_p50",
        "decode_tokens_per_s_p10",
        "decode_tokens_per_s_p90",
        "latency_ms_p50",
        "latency_ms_p90",
        "load_ms",
        "peak_rss_mb",
    ]
)

NEEDS_DEVICE = "needs the device"  # how the note of a row begins that only the device itself can fill


def judged(
    rows: Sequence[Mapping[str, Any]], target: Target, predicted: Mapping[str, float], *, embedding: bool
) -> list[Measurement]:
    """Measured rows with their budgets, verdicts and predictions; budgets without a row become `not_measured` rows.

    Args:
        rows: Rows in their JSON form, as the measuring workers return them.
        target: The profile whose budgets are held against them.
        predicted: Predicted values by measurement name.
        embedding: True for an embedder: budgets on generation do not apply to it, and the other way round.

    Returns:
        One judged row for each measured value, each applicable budget and each prediction.
    """
    measured = {row["name"]: from_json(row) for row in rows}
    apart = (GENERATION | _other_kinds(measured)) if embedding else EMBEDDING
    limits = {name: limit for name, limit in target.limits().items() if name not in apart}
    wanted = [name for name in (*limits, *predicted) if name not in measured]
    missing = {
        name: Measurement(name, None, unit_of(name), measured_on=None, note=_why(name, target)) for name in wanted
    }
    return [
        judge(replace(row, predicted=predicted.get(name)), limits.get(name))
        for name, row in (measured | missing).items()
    ]


def _other_kinds(measured: Mapping[str, Measurement]) -> frozenset[str]:
    """Fidelity rows of the kinds that this encoder is not; none when nothing says which it is."""
    other = [kind for kind in KINDS if not kind & measured.keys()]
    return frozenset().union(*other) if len(other) < len(KINDS) else frozenset()


def unit_of(name: str) -> str:
    """The unit of a measurement by its name."""
    parts = {"_ms": "ms", "tokens_per_s": "tokens/s", "_mb": "MB", "_bytes": "bytes", "kld": "nats/token"}
    return next((unit for part, unit in parts.items() if part in name), "1")


def _why(name: str, target: Target) -> str:
    if name in SPEED and not target.device.is_this_machine:
        return f"{NEEDS_DEVICE}: this build ran elsewhere than on {target.name}"
    if target.onnx.provider not in ("CPUExecutionProvider", "cpu") and target.measure.fidelity:
        return f"{NEEDS_DEVICE}: nothing here runs {target.onnx.provider}"
    return "its measurement is switched off in the profile"
