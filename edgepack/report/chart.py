"""What all pictures share: the frame, its axes, and a figure that fits a wide screen and a phone.

A picture is a function of its size, so each is drawn twice, and the style sheet shows the one that fits: text in it
keeps its size instead of shrinking with the drawing. Colours come from the style sheet, where light and dark differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgepack.report.markup import Markup, element, joined
from edgepack.report.scales import Scale

Words = Callable[[float], str]


@dataclass(frozen=True)
class Frame:
    """Size of a drawing and the place of its plot inside, in CSS pixels.

    Args:
        width: Of the drawing.
        height: Of the drawing.
        narrow: True for the drawing a phone shows.
        left: Room for the labels of the vertical axis.
        right: Room beside the plot.
        top: Room above it.
        bottom: Room for the labels of the horizontal axis.
    """

    width: int
    height: int
    narrow: bool
    left: int = 58
    right: int = 16
    top: int = 26
    bottom: int = 44

    def across(self, low: float, high: float) -> Scale:
        """The horizontal axis."""
        return Scale(low, high, self.left, self.width - self.right)

    def up(self, low: float, high: float, *, logarithmic: bool = False) -> Scale:
        """The vertical axis."""
        return Scale(low, high, self.height - self.bottom, self.top, logarithmic)


def label(x: float, y: float, text: Any, kind: str = "tick", anchor: str = "middle") -> Markup:
    """A word in a drawing."""
    return element("text", {"x": float(x), "y": float(y), "class": kind, "text-anchor": anchor}, text)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2), "class": kind})


def axes(
    frame: Frame,
    x: Scale,
    y: Scale,
    *,
    across: str,
    up: str,
    x_words: Words,
    y_words: Words,
    whole: bool = False,
) -> Markup:
    """Grid, ticks and titles.

    Args:
        frame: The drawing.
        x: The horizontal axis.
        y: The vertical axis.
        across: Title of the horizontal axis, with its unit.
        up: Title of the vertical axis, with its unit.
        x_words: How its values read.
        y_words: How its values read.
        whole: The horizontal axis counts things: no ticks between them.
    """
    parts = []
    for value in y.ticks(5 if frame.narrow else 7):
        parts.append(line(x.start, y(value), x.stop, y(value), "grid"))
        parts.append(label(x.start - 8, y(value) + 4, y_words(value), "tick y", "end"))
    ticks = x.ticks(4 if frame.narrow else 8)
    for value in (tick for tick in ticks if not whole or tick == round(tick)):
        parts.append(line(x(value), y.start, x(value), y.start + 5, "axis"))
        parts.append(label(x(value), y.start + 19, x_words(value), "tick x"))
    parts.append(line(x.start, y.start, x.stop, y.start, "axis"))
    parts.append(label(x.stop, frame.height - 6, across, "title", "end"))
    parts.append(label(4, 14, up, "title", "start"))
    return joined(parts)


def figure(
    draw: Callable[[Frame], Markup],
    *,
    name: str,
    title: str,
    description: str,
    heights: tuple[int, int] = (380, 320),
    role: str = "img",
) -> Markup:
    """A drawing in both sizes.

    Args:
        draw: Draws into a frame.
        name: Unique in the page: what a screen reader's references hang on.
        title: What a screen reader calls it.
        description: What it shows, in words.
        heights: Of the wide and the narrow drawing.
        role: `group` where there are links in it.
    """
    sizes = (("wide", Frame(760, heights[0], False)), ("narrow", Frame(360, heights[1], True, left=46, right=12)))
    drawings = []
    for kind, frame in sizes:
        key = f"{name}-{kind}"
        attributes = {
            "viewBox": f"0 0 {frame.width} {frame.height}",
            "class": kind,
            "role": role,
            "aria-labelledby": f"{key}-t {key}-d",
        }
        names = element("title", {"id": f"{key}-t"}, title), element("desc", {"id": f"{key}-d"}, description)
        drawings.append(element("svg", attributes, *names, draw(frame)))
    return element("figure", None, *drawings)


def compact(value: float) -> str:
    """Three digits: `0.0191`, `1.2e-05`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
