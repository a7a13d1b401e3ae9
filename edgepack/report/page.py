"""The page around the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepack.report import bits, choice, frontier, spread, summary, waterfall, worst
from edgepack.report.markup import Markup, element, joined

# The browser itself is told that nothing is to be run or fetched, whatever should ever slip into the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(document: Mapping[str, Any]) -> str:
    """The report as one HTML page.

    Args:
        document: See the package's docstring.

    Raises:
        KeyError: A part lacks what it can't be drawn without (a point its bytes, a tensor its name).
    """
    details = document.get("details") or {}
    sections = [
        summary.section(document),
        waterfall.section(document.get("waterfall") or []),
        choice.section(document.get("choice") or {}),
        frontier.section(document.get("points") or []),
        bits.section(document.get("tensors") or []),
        spread.section(details),
        worst.section(details.get("worst") or []),
        _foot(document.get("notes") or []),
    ]
    style = Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, document["title"]),
        element("style", None, style),
    )
    body = element("body", None, element("main", None, joined(part for part in sections if part is not None)))
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def _foot(notes: Any) -> Markup | None:
    lines = [element("p", None, note) for note in notes]
    return element("footer", None, *lines) if lines else None
