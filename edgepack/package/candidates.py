"""What was measured before a quantization was chosen: size, latency and fidelity of every candidate, for the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fidelity -> heading, in the order of the columns.
_FIDELITY: Mapping[str, str] = {
    "cosine_mean": "cosine, mean",
    "cosine_p01": "cosine, 1 %",
    "neighbour_agreement": "neighbours",
    "label_agreement": "labels kept",
    "rank_agreement": "order kept",
}


def candidates(search: Any) -> str:
    """The table as Markdown, best first; empty where nothing was searched.

    Args:
        search: `recipe.search` of the manifest.
    """
    rows = search.get("candidates") if isinstance(search, Mapping) else None
    if not rows:
        return ""
    names = [name for name in _FIDELITY if any(isinstance(row.get(name), float) for row in rows)]
    head = ["recipe", "MB", f"ms, {search['tokens']} tokens", *(_FIDELITY[name] for name in names), "higher precision"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for place, row in enumerate(rows):
        better = len(row["kept"]) + len(row["finer"])
        cells = [row["recipe"] + (" (chosen)" if place == 0 else ""), f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{row['latency_ms_p50']:.2f}" if row["latency_ms_p50"] else "not timed"]
        cells += [f"{row[name]:.4f}" if isinstance(row.get(name), float) else "" for name in names]
        lines.append(f"| {' | '.join([*cells, f'{better} nodes' if better else ''])} |")
    budgets = ", ".join(f"{name} {_limit(limit)}" for name, limit in search["budgets"].items() if name in _FIDELITY)
    words = (
        f"Measured on {search['samples']} samples ({search['judged_on']}) that nothing was calibrated on, against the "
        f"float32 graph, timed in turns on the machine of the build with {search['threads']} "
        f"thread{'' if search['threads'] == 1 else 's'}. Asked for: {budgets}. "
    )
    words += (
        "The least product of bytes and time that holds was chosen."
        if search["met"]
        else "None holds; the best that fits was chosen."
    )
    left = "".join(f" Left out: {name} ({why})." for name, why in sorted(search["left_out"].items()))
    return "\n".join([*lines, "", words + left])


def _limit(limit: Mapping[str, float]) -> str:
    return ", ".join(f"{'≥' if side == 'min' else '≤'} {value:g}" for side, value in sorted(limit.items()))
