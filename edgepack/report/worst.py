"""The windows where artifact and source part most: the text, each token coloured by the divergence it was drawn at.

The scale is the same in every report, so that two can be compared by eye. The worst tokens are numbered, and a table
says what either model would have written there.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.report.chart import compact
from edgepack.report.markup import Markup, element, joined, table

# Nats: a quarter of the tokens of a good 4-bit file are below the first, one in a hundred is above the fourth.
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_CONTEXT = 3  # tokens shown before a numbered one in the table
_LONG = re.compile(r"([␣⇥↵])\1{3,}")  # indentation: its length is easier to read as a number


def section(windows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The section, or None without a window."""
    if not windows:
        return None
    return element(
        "section",
        {"id": "worst"},
        element("h2", None, "Worst windows"),
        element(
            "p",
            None,
            "Each token is coloured by how far the two models' predictions for it were apart. Numbers mark the worst; "
            "the table says what either model expected there. Grey text is context and was not scored.",
        ),
        _scale(),
        *(_window(window, unfolded=index == 0) for index, window in enumerate(windows)),
    )


def _scale() -> Markup:
    names = [f"below {STEPS[0]:g}", *(f"{step:g}" for step in STEPS)]
    keys = (element("li", {"class": f"k{index}"}, name) for index, name in enumerate(names))
    return element("ol", {"class": "heat", "aria-label": "colours of the tokens, in nats"}, *keys, " nats and more")


def step(kld: float) -> int:
    """Which colour: 0 below the first step, one more for each step reached."""
    return bisect_right(STEPS, kld)


def _window(window: Mapping[str, Any], *, unfolded: bool) -> Markup:
    tokens, klds = [str(token) for token in window["tokens"]], [float(kld) for kld in window["kld"]]
    positions = list(window.get("positions") or [])
    numbers = {int(position["at"]): index for index, position in enumerate(positions, 1)}
    key = f"window-{int(window['window'])}"
    title = f"Window {int(window['window'])}: mean {compact(float(window['mean_kld']))} nats/token"
    pieces = [
        _token(token, kld, numbers.get(place), f"{key}-{place}")
        for place, (token, kld) in enumerate(zip(tokens, klds, strict=False))
    ]
    context = element("span", {"class": "context"}, window.get("context") or "")
    return element(
        "details",
        {"id": key, "open": True if unfolded else None},
        element("summary", None, title),
        element("p", {"class": "text"}, context, *pieces),
        _table(positions, tokens, key) if positions else "",
    )


def _token(token: str, kld: float, mark: int | None, key: str) -> Markup:
    shown = visible(token)
    attributes: dict[str, Any] = {"class": f"k{step(kld)}", "title": f"{compact(kld)} nats"}
    if mark is None:
        return element("span", attributes, shown)
    return element("mark", attributes | {"id": key}, shown, element("sup", None, str(mark)))


def visible(token: str) -> str:
    """A token's text with its line ends marked; a token that is only part of a letter is a dot."""
    return token.replace("\r", "").replace("\n", "↵\n") or "·"


def _table(positions: Sequence[Mapping[str, Any]], tokens: Sequence[str], key: str) -> Markup:
    rows = []
    for index, position in enumerate(positions, 1):
        place = int(position["at"])
        before = "".join(tokens[max(0, place - _CONTEXT) : place])
        here = tokens[place] if 0 <= place < len(tokens) else ""
        rows.append(
            (
                element("a", {"href": f"#{key}-{place}"}, str(index)),
                joined([element("span", {"class": "context"}, "…" + _flat(before)), _word(here)]),
                compact(float(position["kld"])),
                _choices(position.get("reference") or []),
                _choices(position.get("candidate") or []),
            )
        )
    return table(("", "in the text", "nats", "the source expects", "this file expects"), rows, "parting")


def _choices(choices: Sequence[Mapping[str, Any]]) -> Markup:
    items = []
    for choice in choices:
        share = min(max(float(choice["p"]), 0.0), 1.0)
        bar = element("i", {"class": "share", "style": f"width:{100 * share:.1f}%"})
        items.append(
            element("li", None, _word(str(choice["token"])), element("span", None, f"{100 * share:.1f} %"), bar)
        )
    return element("ol", {"class": "choices"}, *items)


def _word(token: str) -> Markup:
    return element("code", None, _flat(token) or "·")


def _flat(text: str) -> str:
    """White space that can be seen: a token's leading space is what tells it from another."""
    shown = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return _LONG.sub(lambda run: f"{run[0][0]}×{len(run[0])}", shown)
