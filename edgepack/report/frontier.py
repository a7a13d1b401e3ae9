"""Size against KL divergence: what was measured with its intervals, what was predicted as a line, presets beside it.

The vertical axis is logarithmic: equal ratios of divergence have equal lengths. A divergence of exactly 0 (the source
itself) has no place on it and stands on the lower edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepack.report.chart import Frame, axes, compact, figure, label, line
from edgepack.report.markup import Markup, element, folded, joined, number, table
from edgepack.report.scales import Scale, spanning
from edgepack.wording import in_bytes

_LETTER = 7.5  # width of a letter of the labels at 12 px, in the widest of the usual fonts (DejaVu Sans)


@dataclass(frozen=True)
class Point:
    """A size: its label, bytes, and the divergence measured and predicted there."""

    label: str
    preset: bool
    bytes: int
    bits: float | None
    kld: float | None
    ci95: tuple[float, float] | None
    predicted: float | None
    chosen: bool


def section(points: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The section, or None when no point has a size and a divergence."""
    found = sorted((_point(point) for point in points), key=lambda point: (point.bytes, point.label))
    found = [point for point in found if point.kld is not None or point.predicted is not None]
    if not found:
        return None
    allocated = [point for point in found if not point.preset]
    presets = [point for point in found if point.preset]
    return element(
        "section",
        {"id": "frontier"},
        element("h2", None, "Size against divergence"),
        element("p", None, _in_words(allocated, presets)),
        _legend(allocated, presets),
        figure(
            lambda frame: _drawing(frame, found),
            name="frontier",
            title="Size against KL divergence",
            description=f"{len(allocated)} allocated sizes and {len(presets)} presets; all numbers in the table below.",
        ),
        folded("The numbers", _table(found, allocated)),
    )


def _point(point: Mapping[str, Any]) -> Point:
    interval = point.get("ci95")
    return Point(
        label=str(point["label"]),
        preset=point.get("kind") == "preset",
        bytes=int(point["bytes"]),
        bits=point.get("bits_per_weight"),
        kld=_finite(point.get("mean_kld")),
        ci95=(float(interval[0]), float(interval[1])) if interval else None,
        predicted=_finite(point.get("predicted_kld")),
        chosen=bool(point.get("chosen")),
    )


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else None


def _in_words(allocated: Sequence[Point], presets: Sequence[Point]) -> str:
    ratios = [ratio for preset in presets if (ratio := _ratio(preset, allocated)) is not None]
    words = "Lower is closer to the source, left is smaller."
    if not ratios:
        return words
    best, worst = min(ratios), max(ratios)
    span = f"{best:.2f}" if f"{best:.2f}" == f"{worst:.2f}" else f"{best:.2f} to {worst:.2f}"
    return f"{words} At no more bytes than a preset, the divergence is {span} times the preset's."


def _ratio(preset: Point, allocated: Sequence[Point]) -> float | None:
    """Divergence of the largest allocated file that is no larger than the preset's, over the preset's."""
    smaller = [point for point in allocated if point.bytes <= preset.bytes and point.kld is not None]
    if not smaller or not preset.kld or smaller[-1].bytes < 0.97 * preset.bytes:
        return None  # a file much smaller than the preset's answers another question
    return (smaller[-1].kld or 0.0) / preset.kld


def _legend(allocated: Sequence[Point], presets: Sequence[Point]) -> Markup:
    entries = []
    if any(point.kld is not None for point in allocated):
        entries.append(("dot allocated", "edgepack, measured with its 95 % interval"))
    if sum(point.predicted is not None for point in allocated) > 1:
        entries.append(("dash allocated", "edgepack, predicted"))
    if presets:
        entries.append(("dot preset", "presets, measured"))
    if any(point.chosen for point in (*allocated, *presets)):
        entries.append(("dot ring", "this package"))
    keys = (element("li", None, element("i", {"class": kind}), words) for kind, words in entries)
    return element("ul", {"class": "legend"}, *keys)


def _drawing(frame: Frame, points: Sequence[Point]) -> Markup:
    heights = [value for point in points for value in (point.kld, point.predicted, *(point.ci95 or ())) if value]
    x = frame.across(*spanning([point.bytes / 1e6 for point in points]))
    y = frame.up(*spanning(heights, logarithmic=True), logarithmic=True)
    placed = [point for point in points if point.kld is not None]
    return joined(
        [
            axes(
                frame,
                x,
                y,
                across="size of the file, MB",
                up="mean KL divergence, nats/token",
                x_words=compact,
                y_words=compact,
            ),
            _predicted(points, x, y),
            *(_mark(point, x, y) for point in placed),
            *_labels(placed, frame, x, y),
        ]
    )


def _predicted(points: Iterable[Point], x: Scale, y: Scale) -> Markup:
    places = [
        (x(point.bytes / 1e6), y(point.predicted))
        for point in points
        if not point.preset and point.predicted is not None and point.predicted > 0
    ]
    if len(places) < 2:
        return joined(element("circle", {"cx": a, "cy": b, "r": 3, "class": "predicted"}) for a, b in places)
    path = " ".join(f"{number(a)},{number(b)}" for a, b in places)
    return element("polyline", {"points": path, "class": "predicted"})


def _mark(point: Point, x: Scale, y: Scale) -> Markup:
    place, height = x(point.bytes / 1e6), _height(point, y)
    kind = "preset" if point.preset else "allocated"
    parts = [element("title", None, _said(point))]
    if point.ci95 is not None and point.ci95[1] > 0:
        low, high = y(max(point.ci95[0], y.low)), y(point.ci95[1])
        parts += [line(place, low, place, high, "whisker")]
        parts += [line(place - 4, end, place + 4, end, "whisker") for end in (low, high)]
    if point.chosen:
        parts.append(element("circle", {"cx": place, "cy": height, "r": 9, "class": "chosen"}))
    if point.preset:
        side = {"x": place - 4.5, "y": height - 4.5, "width": 9, "height": 9, "class": "mark"}
        turn = f"rotate(45 {number(place)} {number(height)})"
        parts.append(element("rect", side | {"transform": turn}))
    else:
        parts.append(element("circle", {"cx": place, "cy": height, "r": 5, "class": "mark"}))
    return element("g", {"class": f"point {kind}", "data-bytes": point.bytes, "data-kld": repr(point.kld)}, *parts)


def _height(point: Point, y: Scale) -> float:
    return y(point.kld) if point.kld else y.start


def _labels(points: Sequence[Point], frame: Frame, x: Scale, y: Scale) -> list[Markup]:
    """Labels beside their points where they cover neither a point nor another label; the rest stand in the table."""
    taken = [(x(point.bytes / 1e6), _height(point, y)) for point in points]
    boxes = [(place - 6, height - 6, place + 6, height + 6) for place, height in taken]
    shown = []
    for point, (place, height) in sorted(zip(points, taken, strict=True), key=lambda pair: not pair[0].chosen):
        width = _LETTER * min(len(point.label), 24)
        # Curves fall to the right: there is room above to the right of them, and below to the left.
        away = 13 if point.chosen else 9
        sides = [("start", place + away, height - 6), ("end", place - away, height + 15)]
        for anchor, edge, base in sides if point.preset else reversed(sides):
            left = edge if anchor == "start" else edge - width
            box = (left, base - 11, left + width, base + 3)
            inside = frame.left <= left and left + width <= frame.width - 2
            if inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                kind = "name preset" if point.preset else "name allocated"
                shown.append(label(edge, base, point.label[:24], kind, anchor))
                break
    return shown


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _said(point: Point) -> str:
    words = [f"{point.label}: {in_bytes(point.bytes)}"]
    words += [f"{point.bits:.3f} bits/weight"] if point.bits is not None else []
    words += [f"KLD {compact(point.kld)}"] if point.kld is not None else ["not measured"]
    words += [f"95 % interval {_interval(point)}"] if point.ci95 else []
    words += [f"predicted {compact(point.predicted)}"] if point.predicted is not None else []
    return ", ".join(words)


def _interval(point: Point) -> str:
    return f"{compact(point.ci95[0])} to {compact(point.ci95[1])}" if point.ci95 else ""


def _table(points: Sequence[Point], allocated: Sequence[Point]) -> Markup:
    rows = []
    for point in points:
        ratio = _ratio(point, allocated) if point.preset else None
        rows.append(
            (
                joined([point.label, element("b", None, " ← this package")]) if point.chosen else point.label,
                "preset" if point.preset else "edgepack",
                f"{point.bytes:,}",
                "" if point.bits is None else f"{point.bits:.3f}",
                "not measured" if point.kld is None else compact(point.kld),
                _interval(point),
                "" if point.predicted is None else compact(point.predicted),
                "" if ratio is None else f"{ratio:.3f}",
            )
        )
    head = ("", "made by", "bytes", "bits/weight", "mean KLD", "95 % interval", "predicted", "edgepack / preset")
    return table(head, rows)
