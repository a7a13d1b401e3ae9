"""What a person calls each measurement, and how its value reads: one table for the card and the report.

Plain text without markup. The order of the table is the order a person asks in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgepack.measurement import Measurement


def in_bytes(value: float) -> str:
    """Bytes in the unit a person reads: `23.57 MB`."""
    if value < 1e5:
        return f"{value:,.0f} bytes"
    return f"{value / 1e6:,.2f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"


def percent(value: float) -> str:
    """A share of 1 as percent."""
    return f"{100 * value:.2f} %"


def plain(unit: str) -> Callable[[float], str]:
    """Four digits and the unit."""
    return lambda value: (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") + (f" {unit}" if unit else "")


# Measurement -> what a person calls it, and how the value reads.
ROWS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "artifact_bytes": ("Size", in_bytes),
    "bits_per_weight": ("Bits per weight", lambda value: f"{value:.3f}"),
    "mean_kld": ("KL divergence from the source, mean", plain("nats/token")),
    "median_kld": ("KL divergence, median", plain("nats/token")),
    "kld_p99": ("KL divergence, 99 % quantile", plain("nats/token")),
    "top1_agreement": ("Same first choice as the source", percent),
    "source_perplexity": ("Perplexity before (source)", lambda value: f"{value:,.4f}"),
    "perplexity": ("Perplexity after (this package)", lambda value: f"{value:,.4f}"),
    "cosine_mean": ("Cosine to the source's embeddings, mean", lambda value: f"{value:.5f}"),
    "cosine_p01": ("Cosine, 1 % quantile", lambda value: f"{value:.5f}"),
    "neighbour_agreement": ("Nearest neighbours kept", percent),
    "label_agreement": ("Labels kept", percent),
    "rank_agreement": ("Pairs in the same order", percent),
    "decode_tokens_per_s_p50": ("Decode speed, median", plain("tokens/s")),
    "decode_tokens_per_s_p10": ("Decode speed, 10 % quantile", plain("tokens/s")),
    "decode_tokens_per_s_p90": ("Decode speed, 90 % quantile", plain("tokens/s")),
    "ttft_ms_p50": ("Time to first token, median", plain("ms")),
    "ttft_ms_p90": ("Time to first token, 90 % quantile", plain("ms")),
    "prefill_tokens_per_s": ("Prompt speed", plain("tokens/s")),
    "latency_ms_p50": ("Latency, median", plain("ms")),
    "latency_ms_p90": ("Latency, 90 % quantile", plain("ms")),
    "load_ms": ("Load time", plain("ms")),
    "peak_rss_mb": ("Peak memory", plain("MB")),
}


def in_words(row: Measurement, value: float) -> str:
    """`value` in the way of the row's measurement."""
    return (ROWS[row.name][1] if row.name in ROWS else plain("" if row.unit == "1" else row.unit))(value)


def measured(row: Measurement) -> str:
    """The measured value with half of its 95 % interval, or that it was not measured."""
    if row.value is None:
        return "not measured"
    text = in_words(row, row.value)
    if row.ci95 is None:
        return text
    half = (row.ci95[1] - row.ci95[0]) / 2
    return f"{text} ± {f'{100 * half:.2g} %' if text.endswith('%') else f'{half:.2g}'}"


def limits(row: Measurement) -> str:
    """The row's budget: `≤ 0.03 nats/token`; empty without one."""
    signs = {"max": "≤", "min": "≥"}
    return ", ".join(f"{signs[side]} {in_words(row, limit)}" for side, limit in sorted((row.budget or {}).items()))
