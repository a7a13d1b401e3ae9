"""What each step of a build took away: bytes as falling bars, what the model lost beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.report.chart import Frame, compact, figure, label, line
from edgepack.report.markup import Markup, element, folded, joined, table
from edgepack.report.scales import Scale
from edgepack.wording import in_bytes

_ROW = 34  # pixels a step takes


def section(steps: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The section, or None without a step.

    Args:
        steps: In their order, each with `step` (its name) and `bytes` after it; every other key is a number to show in
            the table, `mean_kld` also in the picture.
    """
    if not steps:
        return None
    height = 40 + _ROW * len(steps)
    first, last = int(steps[0]["bytes"]), int(steps[-1]["bytes"])
    words = f"From {in_bytes(first)} to {in_bytes(last)}" + (
        f": {100 * last / first:.1f} % of the bytes." if first else "."
    )
    return element(
        "section",
        {"id": "waterfall"},
        element("h2", None, "Step by step"),
        element("p", None, words),
        figure(
            lambda frame: _drawing(frame, steps),
            name="waterfall",
            title="Bytes and divergence after each step",
            description=words,
            heights=(height, height + 18 * len(steps)),
        ),
        folded("The numbers", _table(steps)),
    )


def _drawing(frame: Frame, steps: Sequence[Mapping[str, Any]]) -> Markup:
    row = _ROW + (18 if frame.narrow else 0)
    names = 8 if frame.narrow else 170
    right = frame.width - (70 if frame.narrow else 110)
    sizes = [int(step["bytes"]) for step in steps]
    x = Scale(0, max(*sizes, 1), names, right)
    parts = [label(names, 16, "size after the step", "title", "start")]
    parts.append(label(frame.width - 4, 16, "mean KLD", "title", "end"))
    for index, step in enumerate(steps):
        top = 30 + index * row + (18 if frame.narrow else 0)
        before = sizes[index - 1] if index else sizes[0]
        name = str(step["step"])[: 40 if frame.narrow else 24]
        if frame.narrow:
            parts.append(label(names, top - 4, name, "name", "start"))
        else:
            parts.append(label(names - 10, top + 15, name, "name", "end"))
        parts.append(_bars(step, x, top, sizes[index], before))
        kld = step.get("mean_kld")
        shown = compact(float(kld)) if isinstance(kld, int | float) else "–"
        parts.append(label(frame.width - 4, top + 15, shown, "value", "end"))
    parts.append(line(names, 26, names, frame.height - 8, "axis"))
    return joined(parts)


def _bars(step: Mapping[str, Any], x: Scale, top: float, size: int, before: int) -> Markup:
    """What is left as a bar, what the step took (or added) as a lighter one behind it."""
    low, high = sorted((x(size), x(before)))
    kept = {"x": x.start, "y": top, "width": low - x.start, "height": 22, "class": "kept"}
    moved = {"x": low, "y": top, "width": high - low, "height": 22, "class": "taken" if size <= before else "added"}
    title = element("title", None, f"{step['step']}: {in_bytes(size)}")
    inside = low - x.start > 90
    words = label(low - 6 if inside else low + 6, top + 15, in_bytes(size), "in" if inside else "value",
                  "end" if inside else "start")  # fmt: skip
    return element(
        "g", {"class": "step", "data-bytes": size}, title, element("rect", kept), element("rect", moved), words
    )


def _table(steps: Sequence[Mapping[str, Any]]) -> Markup:
    keys = list(dict.fromkeys(key for step in steps for key in step if key != "step"))
    rows = [(step["step"], *(_cell(key, step.get(key)) for key in keys)) for step in steps]
    return table(("", *(key.replace("_", " ") for key in keys)), rows)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if key == "bytes" else compact(float(value))
