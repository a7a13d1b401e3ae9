"""The head of the page: what the artifact is, the verdict, and each budget with what was measured against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.measurement import Measurement, from_json
from edgepack.report.markup import Markup, element, folded, joined, table
from edgepack.wording import ROWS, in_words, limits, measured

# A sign beside the word and the colour: none of the three is needed to read the others.
_SIGNS: Mapping[str, str] = {"pass": "✓", "fail": "✗", "not_measured": "–", "inconclusive": "?", "incomplete": "…"}


def section(document: Mapping[str, Any]) -> Markup:
    """Title, facts, verdict and budgets, each where there is one."""
    rows = [from_json(row) for row in document.get("measurements") or []]
    gated = _ordered([row for row in rows if row.verdict])
    others = _ordered([row for row in rows if not row.verdict])
    verdict = document.get("verdict")
    return element(
        "header",
        None,
        element("h1", None, document["title"]),
        _facts(document.get("facts") or {}),
        _verdict(str(verdict), gated) if verdict else "",
        _budgets(gated) if gated else "",
        _others(others, unfolded=not gated) if others else "",
    )


def _ordered(rows: Sequence[Measurement]) -> list[Measurement]:
    order = {name: place for place, name in enumerate(ROWS)}
    return sorted(rows, key=lambda row: order.get(row.name, len(order)))


def _facts(facts: Mapping[str, Any]) -> Markup:
    pairs = [
        element("div", None, element("dt", None, name), element("dd", None, value))
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return element("dl", {"class": "facts"}, *pairs) if pairs else Markup()


def _verdict(verdict: str, gated: Sequence[Measurement]) -> Markup:
    names = {kind: [_label(row) for row in gated if row.verdict == kind] for kind in _SIGNS}
    met = f"{len(names['pass'])} of {len(gated)} budgets measured and met."
    if not gated:
        words = "The profile sets no budgets."
    elif verdict == "fail":
        words = f"Missed: {'; '.join(names['fail'])}. {met}"
    else:
        words = met
    if names["not_measured"]:
        words += f" Not measured: {'; '.join(names['not_measured'])}."
    if names["inconclusive"]:
        words += f" Inconclusive: {'; '.join(names['inconclusive'])}."
    badge = element("b", {"class": f"verdict {_known(verdict)}"}, f"{_SIGNS.get(verdict, '?')} {verdict}")
    return element("p", {"class": "result"}, badge, " ", words)


def _known(verdict: str) -> str:
    return verdict if verdict in _SIGNS else "inconclusive"


def _label(row: Measurement) -> str:
    return ROWS[row.name][0] if row.name in ROWS else row.name


def _budgets(rows: Sequence[Measurement]) -> Markup:
    head = ("budget", "measured", "limit", "of the limit", "verdict")
    return table(head, [_budget(row) for row in rows], "budgets")


def _budget(row: Measurement) -> tuple[Any, ...]:
    verdict = str(row.verdict)
    name = joined([_label(row), element("small", None, row.note) if row.note else ""])
    word = f"{_SIGNS.get(verdict, '?')} {verdict.replace('_', ' ')}"
    return name, measured(row), limits(row), _gauge(row), element("b", {"class": _known(verdict)}, word)


def _gauge(row: Measurement) -> Markup:
    """How much of the limit is used; the mark is the limit, the bar ends at half as much again."""
    budget = row.budget or {}
    limit = budget.get("max", budget.get("min"))
    if row.value is None or not limit or limit <= 0:
        return Markup()
    share = row.value / limit
    bar = element(
        "i", {"class": f"used {_known(str(row.verdict))}", "style": f"width:{min(max(share, 0), 1.5) / 1.5:.1%}"}
    )
    return joined([element("span", {"class": "gauge", "aria-hidden": "true"}, bar), f" {100 * share:.0f} %"])


def _others(rows: Sequence[Measurement], *, unfolded: bool) -> Markup:
    lines = []
    for row in rows:
        predicted = "" if row.predicted is None else in_words(row, row.predicted)
        lines.append((_label(row), measured(row), predicted, "" if row.n is None else f"{row.n:,}", row.note or ""))
    shown = table(("measurement", "measured", "predicted", "samples", "note"), lines)
    return shown if unfolded else folded(f"{len(lines)} more measurements without a budget", shown)
