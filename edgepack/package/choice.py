"""Why an automatic plan chose what it chose, for the card: a row for every candidate, the losers with their reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.package.markdown import escape


def choice(record: Any) -> str:
    """The section as Markdown; empty where nothing was chosen between.

    Args:
        record: `recipe.auto` of the manifest.
    """
    rows = record.get("candidates") if isinstance(record, Mapping) else None
    if not isinstance(record, Mapping) or not rows:
        return ""
    lines = [
        "| candidate | quantized to | MB | tokens/s, predicted | KLD at best | expected | measured | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        size = row.get("artifact_bytes")
        cells = [
            row["variant"],
            row.get("quantize") or "",
            f"{size / 1e6:,.1f}" if size else "",
            *(_number(row.get(key)) for key in ("predicted_decode_tokens_per_s", "best_kld", "expected_kld")),
            _number((row.get("measured") or {}).get("mean_kld")),
            escape(row["outcome"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    tokens = record.get("trial_tokens")
    healed = f"Trials were healed on {tokens:,} tokens{_more(rows, tokens)}. " if tokens and len(rows) > 1 else ""
    chosen, why, judged_on = (escape(record[key]) for key in ("chosen", "why", "judged_on"))
    words = (
        f"{chosen.capitalize()}: {why}. {healed}Measured on {judged_on}, on which nothing was chosen or trained; "
        "expected and best divergences are predictions that only decide what is tried."
    )
    return "\n".join(["## Bits, depth or width", "", *lines, "", words])


def _more(rows: Sequence[Mapping[str, Any]], tokens: int) -> str:
    """Candidates that were healed on more tokens than a trial is."""
    found = [row for row in rows if (row.get("healed_tokens") or 0) > tokens]
    return "".join(f", {row['variant']} then on {row['healed_tokens']:,}" for row in found)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else ""
