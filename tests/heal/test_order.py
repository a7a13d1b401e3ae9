"""The order windows are read in, for every number of windows and every size of a step."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edgepack.heal.order import ALIKE, Order

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=90)
SIZES = st.integers(1, 20)


def read(order: Order, steps: int) -> list[int]:
    return [place for step in range(steps) for place in order.places(step)]


@given(lengths=LENGTHS, batch=SIZES, passes=st.integers(1, 3))
def test_every_pass_reads_every_window_once(lengths: list[int], batch: int, passes: int) -> None:
    batch = min(batch, len(lengths))
    found = Counter(read(Order(lengths, batch, 7), passes * len(lengths)))  # steps that end where a pass does

    assert found == Counter(dict.fromkeys(range(len(lengths)), passes * batch))


@given(lengths=LENGTHS, batch=SIZES, step=st.integers(0, 200))
def test_a_step_asked_for_alone_is_the_one_of_the_whole_run(lengths: list[int], batch: int, step: int) -> None:
    batch = min(batch, len(lengths))
    whole = Order(lengths, batch, 7)
    before = [whole.places(number) for number in range(step)]

    assert Order(lengths, batch, 7).places(step) == whole.places(step)
    assert whole.passes(step) == sum(map(len, before)) // len(lengths)


@given(lengths=LENGTHS, batch=SIZES, step=st.integers(0, 50))
def test_a_step_is_read_from_short_to_long(lengths: list[int], batch: int, step: int) -> None:
    read_now = [lengths[place] for place in Order(lengths, min(batch, len(lengths)), 7).places(step)]

    assert read_now == sorted(read_now)


def test_passes_differ_and_seeds_differ() -> None:
    order = Order([512] * 40, 8, seed=1)
    first, second = ([place for step in steps for place in order.places(step)] for steps in (range(5), range(5, 10)))

    assert first != second
    assert first != read(Order([512] * 40, 8, seed=2), 5)


def test_windows_of_different_lengths_are_read_beside_similar_ones_in_mixed_steps() -> None:
    lengths = [1 + number for number in range(4 * ALIKE)]
    steps = [[lengths[place] for place in Order(lengths, ALIKE, seed=3).places(step)] for step in range(4)]

    assert all(max(step) - min(step) == ALIKE - 1 for step in steps)
    assert [min(step) for step in steps] != sorted(min(step) for step in steps)
