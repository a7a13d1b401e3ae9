"""How the divergence is spread: over the positions of a window, and over the windows of the text.

More places than the drawing has room for are joined in groups of neighbours, each drawn at its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.report.chart import Frame, axes, compact, figure, label, line
from edgepack.report.markup import Markup, element, folded, joined, number, table
from edgepack.report.scales import Scale

_MOST_BARS = 240  # at 760 pixels a bar keeps two pixels and a gap
_SMOOTH = 16  # positions on each side of the running mean: their noise falls by a factor of 6


def section(details: Mapping[str, Any]) -> Markup | None:
    """The section, or None where no divergence was measured."""
    positions, windows = (_numbers(details.get(name)) for name in ("kld_by_position", "kld_by_window"))
    parts = []
    if len(windows) > 1:
        worst = [int(window["window"]) for window in details.get("worst") or []]
        parts += _by_window(windows, set(worst))
    if len(positions) > 1:
        parts += _by_position(positions, int(details.get("first") or 0))
    if not parts:
        return None
    return element("section", {"id": "spread"}, element("h2", None, "Where the divergence is"), *parts)


def _numbers(values: Any) -> list[float]:
    found = [float(value) for value in values or ()]
    return found if all(math.isfinite(value) for value in found) else []


def _by_window(values: Sequence[float], worst: set[int]) -> list[Markup]:
    size, groups = grouped(values, _MOST_BARS)
    mean = sum(values) / len(values)
    top = sorted(values)[-math.ceil(len(values) / 10) :]
    words = f"Mean divergence of each of the {len(values):,} windows, in the order of the text"
    words += f" ({size} windows to a bar)." if size > 1 else "."
    if not any(values):
        words += " All are exactly the source's."
    elif len(values) >= 20:
        words += f" The worst tenth has {100 * sum(top) / sum(values):.0f} % of the whole."
    marked = {window // size for window in worst}

    def draw(frame: Frame) -> Markup:
        x, y = frame.across(-0.5, len(groups) - 0.5), frame.up(0, max(groups) * 1.06 or 1.0)
        bars = [_bar(index, value, x, y, index in marked, size) for index, value in enumerate(groups)]
        level = [line(x.start, y(mean), x.stop, y(mean), "mean")]
        level.append(label(x.stop, 14, f"dotted: mean {compact(mean)}", "title", "end"))
        return joined([_axes(frame, x, y, "window", x_words=lambda value: f"{value * size:,.0f}"), *bars, *level])

    picture = figure(
        draw,
        name="windows",
        title="Divergence of each window",
        description=words,
        heights=(240, 220),
        role="group",
    )
    rows = [(_windows(index, size), compact(value)) for index, value in enumerate(groups)]
    return [
        element("h3", None, "By window"),
        element("p", None, words + (" The worst are marked, their text stands below." if worst else "")),
        picture,
        folded("The numbers", table(("window", "mean KLD, nats/token"), rows)),
    ]


def _bar(index: int, value: float, x: Scale, y: Scale, marked: bool, size: int) -> Markup:
    gap = 1 if x(1) - x(0) >= 3 else 0
    shape = {
        "x": x(index - 0.5),
        "y": y(value),
        "width": max(x(index + 0.5) - x(index - 0.5) - gap, 0.5),
        "height": max(y.start - y(value), 0.5),
        "class": "bar worst" if marked else "bar",
    }
    name = f"window{'s' if size > 1 else ''} {_windows(index, size)}"
    drawn = element("rect", shape, element("title", None, f"{name}: {compact(value)}"))
    return element("a", {"href": f"#window-{index}"}, drawn) if marked and size == 1 else drawn


def _windows(index: int, size: int) -> str:
    """The numbers of the windows of a group."""
    return str(index) if size == 1 else f"{index * size} to {index * size + size - 1}"


def _by_position(values: Sequence[float], first: int) -> list[Markup]:
    half = len(values) // 2
    start, end = sum(values[:half]) / half, sum(values[half:]) / (len(values) - half)
    words = (
        f"Mean over all windows, by the token's place in its window (the first {first:,} tokens are context only); "
        f"{compact(start)} in the first half, {compact(end)} in the second. The line is the mean of {2 * _SMOOTH + 1} "
        "neighbours."
    )
    size, groups = grouped(values, 2 * _MOST_BARS)

    def draw(frame: Frame) -> Markup:
        x, y = frame.across(first, first + len(values)), frame.up(0, max(groups) * 1.06 or 1.0)
        dots = [
            element("circle", {"cx": x(first + (index + 0.5) * size), "cy": y(value), "r": 1.8, "class": "speck"})
            for index, value in enumerate(groups)
        ]
        path = " ".join(
            f"{number(x(first + place + 0.5))},{number(y(value))}" for place, value in enumerate(running(values))
        )
        curve = element("polyline", {"points": path, "class": "curve"})
        return joined([_axes(frame, x, y, "place of the token in its window"), *dots, curve])

    picture = figure(draw, name="positions", title="Divergence by position", description=words, heights=(240, 220))
    return [element("h3", None, "By position"), element("p", None, words), picture]


def _axes(frame: Frame, x: Scale, y: Scale, across: str, x_words: Any = lambda value: f"{value:,.0f}") -> Markup:
    return axes(frame, x, y, across=across, up="nats/token", x_words=x_words, y_words=compact, whole=True)


def grouped(values: Sequence[float], most: int) -> tuple[int, list[float]]:
    """How many neighbours are joined, and the means of the groups; the last may be smaller."""
    size = math.ceil(len(values) / most)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return size, [sum(part) / len(part) for part in parts]


def running(values: Sequence[float], half: int = _SMOOTH) -> list[float]:
    """The mean of each place and `half` neighbours on both sides, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, place - half), min(len(values), place + half + 1)) for place in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]
