"""What each step from source to artifact took away and what it cost, for the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Column -> (heading, how a value is written).
_COLUMNS: Mapping[str, tuple[str, str]] = {
    "parameters": ("million parameters", "{:,.2f}"),
    "flops_per_token": ("MFLOP per token", "{:,.1f}"),
    "mean_kld": ("mean KLD", "{:.4g}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "top1_agreement": ("top-1 agreement", "{:.4f}"),
    "cosine_mean": ("cosine, mean", "{:.4f}"),
    "cosine_p01": ("cosine, 1 %", "{:.4f}"),
    "predicted_decode_tokens_per_s": ("tokens/s, predicted", "{:,.0f}"),
    "decode_tokens_per_s_p50": ("tokens/s, measured", "{:,.0f}"),
    "latency_ms_p50": ("ms, measured", "{:.2f}"),
}
_MILLIONS = ("parameters", "flops_per_token")


def steps(rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> str:
    """The section as Markdown; empty where nothing was done before quantization.

    Args:
        rows: `waterfall` of the plan, in their order.
        recipe: Of the manifest: `prune`, `heal`.
    """
    if not rows:
        return ""
    names = [name for name in _COLUMNS if any(isinstance(row.get(name), int | float) for row in rows)]
    lines = ["| after | MB | " + " | ".join(_COLUMNS[name][0] for name in names) + " |"]
    lines.append("|---|---:|" + "---:|" * len(names))
    for row in rows:
        cells = [_cell(name, row.get(name)) for name in names]
        lines.append(f"| {_name(row)} | {row['bytes'] / 1e6:,.1f} | {' | '.join(cells)} |")
    words = [
        "Up to the last row: weights in the source's own number format, measured by transformers in float32. The last "
        "row is the artifact in its runtime. Predicted speed is that of the target; what is empty was not measured."
    ]
    healed = recipe.get("heal")
    if healed:
        words.append(_healing(healed))
    return "\n".join(["## Step by step", "", *lines, "", " ".join(words)])


def _name(row: Mapping[str, Any]) -> str:
    """A step's name for people; the last one is a quantization's and stays as it is."""
    return {"kv_heads": "key-value heads"}.get(str(row["step"]), str(row["step"]))


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return _COLUMNS[name][1].format(value / 1e6 if name in _MILLIONS else value)


def _healing(report: Mapping[str, Any]) -> str:
    """What healing brought back, in a sentence."""
    back = (report.get("evaluation") or {}).get("recovered") or {}
    shares = {"kld": "the KL divergence", "log_likelihood": "the lost log-likelihood"}
    brought = [f"{100 * back[name]:.0f} % of {words}" for name, words in shares.items() if back.get(name) is not None]
    words = f"Healing trained on {report['tokens']:,} tokens"
    return f"{words} and brought back {' and '.join(brought)}." if brought else f"{words}."
