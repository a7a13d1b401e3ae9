"""Why this model and not a smaller one: every candidate of an automatic plan, from what it could be at best to what it
was measured to be.

One line a candidate, on a logarithmic axis of KL divergence: a bar from what healing could bring at best to what is
usual, a dot where it was tried and measured. Candidates that meet no budget have words in place of a bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.report.chart import Frame, compact, figure, label, line
from edgepack.report.markup import Markup, element, folded, joined, table
from edgepack.report.scales import Scale, spanning
from edgepack.wording import in_bytes

_ROW = 30  # pixels a candidate takes


def section(choice: Mapping[str, Any]) -> Markup | None:
    """The section, or None where nothing was chosen between.

    Args:
        choice: `auto` of the plan.
    """
    rows = choice.get("candidates") or []
    if len(rows) < 2:
        return None
    words = f"{str(choice['chosen']).capitalize()}: {choice['why']}. Judged on {choice['judged_on']}."
    height = 46 + _ROW * len(rows)
    return element(
        "section",
        {"id": "choice"},
        element("h2", None, "Bits, depth or width"),
        element("p", None, words),
        figure(
            lambda frame: _drawing(frame, rows, str(choice["chosen"])),
            name="choice",
            title="Divergence of every candidate within the same budgets",
            description=words,
            heights=(height, height + 16 * len(rows)),
        ),
        folded("The numbers", _table(rows)),
    )


def _drawing(frame: Frame, rows: Sequence[Mapping[str, Any]], chosen: str) -> Markup:
    step = _ROW + (16 if frame.narrow else 0)
    start = 10 if frame.narrow else 150
    low, high = spanning([value for row in rows for value in _values(row)], logarithmic=True)
    x = Scale(low, high, start, frame.width - 24, logarithmic=True)
    bottom = 30 + step * len(rows)
    parts = []
    for tick in x.ticks(4 if frame.narrow else 7):
        parts.append(line(x(tick), 26, x(tick), bottom, "grid"))
        parts.append(label(x(tick), 18, compact(tick)))
    for index, row in enumerate(rows):
        top = 34 + index * step
        name = str(row["variant"])
        if frame.narrow:
            parts.append(label(start, top + 8, name, "name", "start"))
            top += 16
        else:
            parts.append(label(start - 10, top + 12, name, "name", "end"))
        parts.append(_candidate(row, x, top, chosen=name == chosen))
    parts.append(label(frame.width - 4, frame.height - 4, "mean KLD, nats per token", "title", "end"))
    return joined(parts)


def _candidate(row: Mapping[str, Any], x: Scale, top: float, *, chosen: bool) -> Markup:
    best, expected, measured = row.get("best_kld"), row.get("expected_kld"), _measured(row)
    parts = [element("title", None, f"{row['variant']}: {row['outcome']}")]
    if best is not None and expected is not None and row["variant"] != "bits alone":
        left, right = x(best), max(x(expected), x(best) + 2)
        parts.append(element("rect", {"x": left, "y": top, "width": right - left, "height": 16, "class": "taken"}))
    if measured is not None:
        parts.append(element("circle", {"cx": x(measured), "cy": top + 8, "r": 5, "class": "point allocated mark"}))
        if chosen:
            parts.append(element("circle", {"cx": x(measured), "cy": top + 8, "r": 9, "class": "chosen"}))
    if not _values(row):
        parts.append(label(x.start, top + 12, "fits no budget", "tick", "start"))
    return element("g", {"class": "candidate"}, *parts)


def _measured(row: Mapping[str, Any]) -> float | None:
    value = (row.get("measured") or {}).get("mean_kld")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _values(row: Mapping[str, Any]) -> list[float]:
    found = [_measured(row)]
    found += [row.get(name) for name in ("best_kld", "expected_kld") if row["variant"] != "bits alone"]
    return [value for value in found if value]


def _table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    heads = (
        "",
        "quantized to",
        "size",
        "tokens/s, predicted",
        "KLD at best",
        "expected",
        "measured",
        "what became of it",
    )
    return table(
        heads,
        [
            (
                row["variant"],
                row.get("quantize") or "",
                in_bytes(row["artifact_bytes"]) if row.get("artifact_bytes") else "",
                *(_number(row.get(key)) for key in ("predicted_decode_tokens_per_s", "best_kld", "expected_kld")),
                _number(_measured(row)),
                row["outcome"],
            )
            for row in rows
        ],
    )


def _number(value: Any) -> str:
    return compact(float(value)) if isinstance(value, int | float) else ""
