"""Figures as documents state them: rounded to significant digits, in one place."""

from __future__ import annotations


def significant(value: float, digits: int = 6) -> float:
    """The nearest float of so many significant digits, ties as `format` breaks them.

    Whoever shows a figure that a report states too should shorten the rounded one: 0.0231250004 is 0.02313 in four
    digits, but 0.02312 by way of six.

    Args:
        value: NaN and infinities stay what they are.
        digits: At least 1. Six for what was measured: more than any measurement here repeats.
    """
    return float(f"{value:.{digits}g}")
