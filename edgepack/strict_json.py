"""JSON as untrusted text: duplicate keys, non-finite numbers, oversize and endless nesting are refused, each by name.

`json.loads` lets the last of two equal keys win, so that two readers of one file may see different models; it also
accepts `NaN` and `1e999`, raises `RecursionError` on deep nesting and a plain `ValueError` on a 5,000-digit integer.
Knows nothing of what the document means. Source: RFC 8259 §4 (names should be unique) and §6 (no NaN, no Infinity).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from edgepack.errors import InputRefused


def parse(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON strictly.

    Args:
        data: The whole document. The caller caps its size.
        where: File (and part of it) for messages.

    Returns:
        The document: dict, list, str, int, finite float, bool or None.

    Raises:
        InputRefused: Not UTF-8, not JSON, a duplicate key, a number that is not finite or too long, nested too deep.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{where}: not UTF-8 at byte {error.start}") from error
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputRefused(f"{where}: not valid JSON at {place}: {_one_line(error.msg)}") from error
    except RecursionError as error:
        raise InputRefused(f"{where}: JSON nested too deep") from error
    except ValueError as error:  # ours, and Python's own limit of 4,300 digits
        raise InputRefused(f"{where}: not valid JSON: {_one_line(str(error))}") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """`parse`, for a document that must be an object.

    Raises:
        InputRefused: As `parse`, or the document is not an object.
    """
    document = parse(data, where)
    if not isinstance(document, dict):
        raise InputRefused(f"{where}: expected a JSON object, found {kind(document)}")
    return document


def kind(value: Any) -> str:
    """Name a JSON value's type in JSON's own words: object, array, string, number, boolean, null."""
    if value is None:
        return "null"
    for types, name in (
        ((dict,), "object"),
        ((list,), "array"),
        ((str,), "string"),
        ((bool,), "boolean"),
        ((int, float), "number"),
    ):
        if isinstance(value, types):
            return name
    return type(value).__name__


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {repeated[:80]!r}")
    return document


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is not finite")
    return value


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
