"""HTML and SVG as text that can't be written by what it shows.

Only `Markup` goes into a page as it stands, and only this module makes it; every other string is escaped on the way in.
So a model name, a token or a note may hold anything: it is shown, character for character, and does nothing.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = frozenset(["br", "col", "meta"])  # elements that HTML closes by itself (HTML standard, "void elements")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(value: Any) -> Markup:
    """Any text, harmless inside an element or an attribute.

    Characters that are not to be seen are made visible: controls as their Unicode pictures, those that turn the
    direction of writing by their number, halves of surrogate pairs as the replacement character. Markup stays as it is.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape("".join(map(_visible, str(value))), quote=True))


def _visible(character: str) -> str:
    if " " <= character <= "~" or character in "\n\t":
        return character
    number = ord(character)
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(0x2400 + number) if number < 0x20 else "␡" if number == 0x7F else f"⟨U+{number:04X}⟩"
    if category == "Cs" or (number & 0xFFFE) == 0xFFFE:
        return "\ufffd"
    # Joiners (200C, 200D) shape scripts and emoji and stay.
    if category == "Cf" and number not in (0x200C, 0x200D):
        return f"⟨U+{number:04X}⟩"
    return character


def joined(parts: Iterable[Any], between: str = "") -> Markup:
    """Several pieces as one."""
    return Markup(escaped(between).join(escaped(part) for part in parts))


def element(name: str, attributes: Mapping[str, Any] | None = None, *children: Any) -> Markup:
    """An element of HTML or SVG.

    Args:
        name: The tag.
        attributes: Name -> value; None leaves one out, True gives it no value of its own, numbers get two decimals.
        children: Markup as it stands, anything else escaped.
    """
    shown = "".join(f' {key}="{_attribute(value)}"' for key, value in (attributes or {}).items() if value is not None)
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(children)}</{name}>")


def _attribute(value: Any) -> str:
    if value is True:
        return ""
    return number(value) if isinstance(value, float) else escaped(value)


def number(value: float) -> str:
    """A coordinate: two decimals at most."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], kind: str = "data") -> Markup:
    """A table in a box of its own that scrolls sideways where the screen is narrow.

    Args:
        head: Titles of the columns.
        rows: Cells; the first of each row is its title.
        kind: Its class.
    """
    titles = element("tr", None, *(element("th", {"scope": "col"}, title) for title in head))
    lines = [
        element("tr", None, element("th", {"scope": "row"}, first), *(element("td", None, cell) for cell in cells))
        for first, *cells in rows
    ]
    body = element("table", {"class": kind}, element("thead", None, titles), element("tbody", None, *lines))
    return element("div", {"class": "scroll", "tabindex": "0"}, body)


def folded(title: str, *content: Any) -> Markup:
    """Content that is unfolded by a click."""
    return element("details", None, element("summary", None, title), *content)
