"""Numbers of training tokens as people write them (`200k`, `2M`, `50000`), and how often text is passed for them."""

from __future__ import annotations

import re

from edgepack.errors import UsageError

_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_AMOUNT = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)([kmb]?)", re.IGNORECASE)
LEAST_TOKENS = 1024  # two windows: less is no training
MOST_PASSES = 16  # renewed in between (`renewal.py`); more text is written where that is not enough


def parse_tokens(text: str, option: str) -> int:
    """Read a number of tokens.

    Args:
        text: Digits, with k, M or B behind them.
        option: The option it was given to, for messages.

    Raises:
        UsageError: It is no number, or too small.
    """
    match = _AMOUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if match is None:
        raise UsageError(f"{option} {text[:50]}: not a number of tokens", hint="For example 200k or 2M.")
    tokens = round(float(match[1]) * _FACTORS[match[2].lower()])
    if tokens < LEAST_TOKENS:
        raise UsageError(f"{option} {text}: {tokens} tokens, expected at least {LEAST_TOKENS:,}")
    return tokens
