"""The choice of formats against every other choice there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.errors import BudgetError
from edgepack.onnx.mixed_precision import Choice, choose, hull

sizes = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10, width=32)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=4), st.integers(0, 100))
def test_no_choice_is_better_by_more_than_one_purchase(matrices: list, extra: int) -> None:
    options = {str(i): [Choice(j, *pair) for j, pair in enumerate(row)] for i, row in enumerate(matrices)}
    budget = sum(min(choice.nbytes for choice in row) for row in options.values()) + extra
    found = choose(options, budget)
    assert sum(choice.nbytes for choice in found.values()) <= budget
    possible = [row for row in itertools.product(*options.values()) if sum(c.nbytes for c in row) <= budget]
    best = min(sum(choice.cost for choice in row) for row in possible)
    largest = max((max(c.cost for c in row) - min(c.cost for c in row)) for row in options.values())
    assert sum(choice.cost for choice in found.values()) <= best + largest + 1e-6


def test_bytes_go_where_they_help_most() -> None:
    options = {
        "head": [Choice(4, 10, 5.0), Choice(8, 20, 0.0)],
        "layer": [Choice(4, 10, 1.0), Choice(8, 20, 0.0)],
    }
    assert {name: choice.form for name, choice in choose(options, 30).items()} == {"head": 8, "layer": 4}


def test_formats_that_are_never_worth_it_are_left_out() -> None:
    choices = [Choice("a", 1, 10.0), Choice("b", 2, 9.5), Choice("c", 3, 1.0), Choice("d", 4, 2.0)]
    assert [choice.form for choice in hull(choices)] == ["a", "c"]


def test_a_budget_below_the_smallest_formats_is_refused() -> None:
    with pytest.raises(BudgetError, match="take 10 bytes in their smallest formats, and 9 are allowed"):
        choose({"w": [Choice(4, 10, 1.0)]}, 9)
