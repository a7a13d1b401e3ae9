"""Allocation against the best of all choices, found by trying every one."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgepack.allocate import Choice, Option, Options, allocate, hull, total_bytes, total_cost
from edgepack.errors import BudgetError

# A few options of a few tensors; equal bytes and equal costs, worse-and-larger options and zero costs among them.
_OPTION = st.tuples(st.integers(1, 60), st.integers(0, 1000))
_INSTANCE = st.tuples(
    st.lists(st.lists(_OPTION, min_size=1, max_size=5), min_size=1, max_size=6),
    st.floats(0, 1),
)


def options_of(drawn: list[list[tuple[int, int]]]) -> Options:
    return {
        f"tensor{i}": [Option(f"type{j}", nbytes, cost / 1000) for j, (nbytes, cost) in enumerate(choices)]
        for i, choices in enumerate(drawn)
    }


def limits(options: Options) -> tuple[int, int]:
    """Bytes of the smallest options and of the largest."""
    smallest = sum(min(option.nbytes for option in choices) for choices in options.values())
    return smallest, sum(max(option.nbytes for option in choices) for choices in options.values())


def optimum(options: Options, budget: int) -> float:
    """The least cost of all choices within a budget."""
    every = itertools.product(*options.values())
    return min(
        sum(option.cost for option in choice) for choice in every if sum(option.nbytes for option in choice) <= budget
    )


def by_hull(options: Options, budget: int) -> float:
    """The textbook's greedy: the steps of all hulls by what they save per byte, up to the first that does not fit."""
    steps = sorted(
        (
            ((low.cost - high.cost) / (high.nbytes - low.nbytes), name, place)
            for name, choices in options.items()
            for place, (low, high) in enumerate(itertools.pairwise(hull(choices)))
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    at = {name: hull(choices)[0] for name, choices in options.items()}
    left = budget - total_bytes(at)
    for _, name, place in steps:
        better = hull(options[name])[place + 1]
        if better.nbytes - at[name].nbytes > left:
            break
        left -= better.nbytes - at[name].nbytes
        at[name] = better
    return total_cost(at)


@given(_INSTANCE)
@settings(max_examples=150, deadline=None)
@example(([[(1, 5)]], 0.0))
@example(([[(3, 5), (3, 4), (3, 4)], [(2, 0), (9, 0)]], 0.5))
def test_any_choice_fits_is_offered_and_beats_the_greedy_of_the_textbook(
    drawn: tuple[list[list[tuple[int, int]]], float],
) -> None:
    options = options_of(drawn[0])
    least, most = limits(options)
    budget = least + int(drawn[1] * (most - least))
    chosen = allocate(options, budget)
    assert list(chosen) == list(options)
    assert all(option in options[name] for name, option in chosen.items())
    assert total_bytes(chosen) <= budget
    assert optimum(options, budget) - 1e-12 <= total_cost(chosen) <= by_hull(options, budget) + 1e-12


@given(_INSTANCE)
@settings(max_examples=100, deadline=None)
def test_room_for_everything_is_used_for_the_least_cost(drawn: tuple[list[list[tuple[int, int]]], float]) -> None:
    options = options_of(drawn[0])
    assert total_cost(allocate(options, limits(options)[1])) == pytest.approx(optimum(options, limits(options)[1]))


@given(_INSTANCE)
@settings(max_examples=100, deadline=None)
def test_below_the_smallest_options_the_least_is_named(drawn: tuple[list[list[tuple[int, int]]], float]) -> None:
    options = options_of(drawn[0])
    least, _ = limits(options)
    assert total_bytes(allocate(options, least)) == least
    with pytest.raises(BudgetError, match=f"take {least:,} bytes"):
        allocate(options, least - 1)


def model_like(seed: int, tensors: int) -> Options:
    """Tensors of a model: the bytes of nine types, costs that fall by about four with every bit, importance by tensor
    over three orders of magnitude (tiny-llama-5m and ref-llama-37m have two to three).
    """
    draw = random.Random(seed)
    bits = (2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5)
    options = {}
    for i in range(tensors):
        weights, importance = draw.choice((65536, 196608, 524288)), 10 ** draw.uniform(-3, 0)
        options[f"blk.{i}"] = [
            Option(f"{b}", int(weights * b / 8), importance * 4**-b * draw.uniform(0.7, 1.4)) for b in bits
        ]
    return options


def optimum_of_many(options: Options, budget: int, unit: int) -> float:
    """The least cost by dynamic programming over bytes in units; every option is a multiple of one."""
    best = np.zeros(budget // unit + 1)
    for choices in options.values():
        found = np.full_like(best, np.inf)
        for option in choices:
            taken = option.nbytes // unit
            found[taken:] = np.minimum(found[taken:], best[: len(best) - taken] + option.cost)
        best = found
    return float(best[-1])


@pytest.mark.parametrize(("tensors", "margin"), [(12, 1.10), (43, 1.02), (120, 1.005)])
def test_tensors_like_those_of_a_model_come_close_to_the_optimum(tensors: int, margin: float) -> None:
    for seed in range(6):
        options = model_like(seed, tensors)
        least, most = limits(options)
        for part in (0.1, 0.25, 0.5, 0.75):
            budget = int(least + part * (most - least)) // 512 * 512
            ratio = total_cost(allocate(options, budget)) / optimum_of_many(options, budget, unit=512)
            assert 1 - 1e-9 <= ratio <= margin, (seed, part)


def test_a_hundred_tensors_come_within_a_thousandth_of_the_lagrangian_bound() -> None:
    options = model_like(seed=3, tensors=100)
    least, most = limits(options)
    for part in (0.15, 0.4, 0.7):
        budget = int(least + part * (most - least))
        # For every exchange rate of cost for bytes, the relaxed problem costs no more than any choice that fits.
        bound = max(
            sum(min(option.cost + rate * option.nbytes for option in choices) for choices in options.values())
            - rate * budget
            for rate in (10 ** (exponent / 20) for exponent in range(-280, -80))
        )
        assert total_cost(allocate(options, budget)) <= 1.01 * bound


def test_more_bytes_never_cost_more_on_a_model() -> None:
    options = model_like(seed=5, tensors=60)
    least, most = limits(options)
    costs = [total_cost(allocate(options, least + (most - least) * k // 40)) for k in range(41)]
    assert costs == sorted(costs, reverse=True)


def test_the_hull_keeps_steps_that_save_less_and_less_per_byte() -> None:
    choices = [
        Option("a", 10, 8.0),
        Option("b", 20, 7.9),
        Option("c", 30, 1.0),
        Option("d", 40, 2.0),
        Option("e", 60, 0),
    ]
    assert [option.kind for option in hull(choices)] == ["a", "c", "e"]


def test_the_same_options_give_the_same_choice_whatever_the_order_of_types() -> None:
    options = model_like(seed=9, tensors=30)
    budget = sum(limits(options)) // 2
    turned: Options = {name: list(reversed(choices)) for name, choices in options.items()}
    first: Choice = allocate(options, budget)
    assert allocate(turned, budget) == first
