"""Canonical JSON (RFC 8785): one value, one sequence of bytes, one digest.

Members sorted by UTF-16 code units, no white space, strings and numbers as ECMAScript's JSON.stringify writes them.
Written here, not taken from the `rfc8785` package, so that `edgepack verify` needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_LARGEST_INTEGER = 2**53 - 1  # RFC 8785 section 3.2.2.3 and RFC 7493 (I-JSON): exact in every reader


def canonical_json(value: Any) -> bytes:
    """Encode a value of dict, list, tuple, str, int, float, bool and None.

    Raises:
        TypeError: Another type in it, or a key that is no string.
        ValueError: NaN or infinity, a lone surrogate, an integer beyond +-(2^53 - 1) that is no double's shortest text.
    """
    return _encode(value).encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _encode(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return _integer(int(value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is a {type(key).__name__}; JSON keys are strings")
        members = sorted(value.items(), key=lambda member: _utf16(member[0]))
        return "{" + ",".join(f"{_string(key)}:{_encode(item)}" for key, item in members) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_encode, value)) + "]"
    raise TypeError(f"a {type(value).__name__} has no JSON form: {value!r:.80}")


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-be")  # raises on a lone surrogate; big-endian bytes sort as code units do


def _string(text: str) -> str:
    text.encode()  # a lone surrogate has no UTF-8 form: UnicodeEncodeError is a ValueError
    return json.dumps(str(text), ensure_ascii=False)  # escapes exactly what RFC 8785 section 3.2.2.2 lists


def _integer(value: int) -> str:
    # What a large float was written as reads back as an integer, and must be written the same again.
    if abs(value) > _LARGEST_INTEGER and (abs(value) >= 10**21 or _number(float(value)) != str(value)):
        raise ValueError(
            f"an integer of {value.bit_length()} bits is beyond +-(2^53 - 1), the range that JSON readers keep exact"
        )
    return str(value)


def _number(value: float) -> str:
    """`Number::toString` of ECMA-262 (section 6.1.6.1.20), from the same shortest digits that repr() finds."""
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{value} has no JSON form")
    if value == 0:
        return "0"  # also -0
    mantissa, _, exponent = repr(abs(float(value))).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(digits) - len(fraction) + int(exponent or 0)  # value = 0.digits x 10^point
    digits = digits.rstrip("0")
    sign = "-" if value < 0 else ""
    if len(digits) <= point <= 21:
        return sign + digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    rest = "." + digits[1:] if digits[1:] else ""
    return f"{sign}{digits[0]}{rest}e{point - 1:+d}"
