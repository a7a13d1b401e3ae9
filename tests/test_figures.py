"""Rounding of figures against decimal arithmetic."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal

from hypothesis import given
from hypothesis import strategies as st

from edgepack.figures import significant


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 15))
def test_a_figure_is_the_nearest_of_its_digits(value: float, digits: int) -> None:
    expected = Context(prec=digits, rounding=ROUND_HALF_EVEN).create_decimal(Decimal(value))
    assert significant(value, digits) == float(expected)


def test_what_is_no_number_stays_that() -> None:
    assert math.isnan(significant(math.nan))
    assert significant(-math.inf) == -math.inf
