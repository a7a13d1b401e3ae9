"""Sizes as people write them: `4.5bpw`, `2.0GB`, `600MiB`, `23570112B`.

A size in place of a preset's name asks for the best file of that size: types are allocated to tensors by measured
sensitivity (`tuning.py`). Knows nothing of models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from edgepack.errors import UsageError

# Decimal for MB and GB, as disks and stores count; binary for MiB and GiB.
_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "": 1,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)[ \t]*(BPW|[KMG]I?B|B|)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Size:
    """How large an artifact may be.

    Args:
        name: As it was given, in one spelling: `4.50bpw`, `2GB`. Reads back as the same size.
        total_bytes: Of all model files; None when bits are given.
        bits_per_weight: Of tensor data; None when bytes are given.
    """

    name: str
    total_bytes: int | None = None
    bits_per_weight: float | None = None


def is_size(text: str) -> bool:
    """Whether a word is a size rather than a preset's name."""
    return _SIZE.fullmatch(text.strip()) is not None


def parse_size(text: str) -> Size:
    """Read a size.

    Raises:
        UsageError: It is none, or zero.
    """
    found = _SIZE.fullmatch(text.strip())
    number, unit = (Decimal(found[1]), found[2].upper()) if found else (Decimal(0), "")
    total = None if unit == "BPW" else int(number * _UNITS[unit])
    if not number or total == 0:
        raise UsageError(
            f"size {text[:80]!r}: expected a number with B, KB, MB, GB, KiB, MiB, GiB or bpw",
            hint="For example 2.0GB, 600MiB or 4.5bpw.",
        )
    if total is None:
        return Size(f"{_plain(number, 2)}bpw", bits_per_weight=float(number))
    written = {"KIB": "KiB", "MIB": "MiB", "GIB": "GiB", "": "B"}.get(unit, unit)
    return Size(f"{_plain(number, 0)}{written}", total_bytes=total)


def _plain(number: Decimal, decimals: int) -> str:
    """A number with all its digits, at least so many of them decimals, and no zeros after those."""
    whole, _, part = f"{number:f}".partition(".")
    part = part.rstrip("0").ljust(decimals, "0")
    return f"{whole.lstrip('0') or '0'}{'.' if part else ''}{part}"
