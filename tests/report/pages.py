"""Reads a report back as a browser would: elements that close, attributes, text; its drawings as XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

VOID = {"meta", "br", "col"}


class Page(HTMLParser):
    """Every element with its attributes, all text; fails on an element that is not closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    @property
    def ids(self) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get("id")) is not None]

    def sections(self) -> set[str]:
        return {str(attributes["id"]) for tag, attributes in self.elements if tag == "section"}


def drawings(page: str, title: str) -> list[ElementTree.Element]:
    """The drawings (wide, narrow) that a screen reader calls `title`."""
    found = [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]
    return [drawing for drawing in found if drawing.findtext("title") == title]


def axis(drawing: ElementTree.Element, which: str) -> list[tuple[float, float]]:
    """Value and coordinate of each tick: `x` or `y`."""
    ticks = [text for text in drawing.iter("text") if text.get("class") == f"tick {which}"]
    # The baseline of a label on the vertical axis lies 4 pixels below its line.
    return [(float(str(t.text).replace(",", "")), float(str(t.get(which))) - 4 * (which == "y")) for t in ticks]
