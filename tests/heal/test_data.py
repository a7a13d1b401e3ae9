from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from talker import Talker

from edgepack.errors import InputRefused, UsageError
from edgepack.heal import data
from edgepack.heal.budget import parse_tokens
from edgepack.heal.schedule import learning_rate


def pieces(windows: int, tokens: int = 96, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 500, (windows, tokens)).tolist()


def test_no_window_is_trained_on_and_held_out() -> None:
    given = pieces(130)
    training, held_out, left_out = data.split(given)
    assert (len(training), len(held_out), left_out) == (117, 13, 0)
    assert sorted(map(tuple, [*training.tolist(), *held_out.tolist()])) == sorted(map(tuple, given))
    places = [given.index(window) for window in held_out.tolist()]
    assert max(places) > 100 and min(places) < 30  # from all over the text


def test_windows_that_repeat_held_out_text_are_left_out() -> None:
    given = pieces(60)
    first = given.index(data.split(given)[1].tolist()[0])
    copied = given[first]
    other = 0 if first > 5 else 59
    given[other] = [1, 2, 3, *copied[: data.SHARED_TOKENS + 4], *given[other][data.SHARED_TOKENS + 7 :]]
    training, held_out, left_out = data.split(given)
    assert left_out == 1
    assert given[other] not in training.tolist() and given[other] not in held_out.tolist()


def test_a_text_of_three_windows_or_of_one_repeated_is_refused() -> None:
    with pytest.raises(InputRefused, match="3 windows of 96 tokens, expected at least 4"):
        data.split(pieces(3))
    with pytest.raises(InputRefused, match="repeats itself"):
        data.split(pieces(1) * 40)


def test_what_sixteen_passes_do_not_cover_is_sampled_once_and_kept(tmp_path: Path) -> None:
    given, talker = [[token % 50 for token in window] for window in pieces(40)], Talker()
    enough = data.training_text(talker, given, 16 * 36 * 96, journal=tmp_path)
    assert (len(enough.training), enough.sampled, talker.calls) == (36, 0, 0)
    more = data.training_text(talker, given, 800 * 96, journal=tmp_path)
    assert (len(more.training), more.sampled) == (50, 14) and talker.calls > 0
    talker.calls = 0
    again = data.training_text(talker, given, 800 * 96, journal=tmp_path)
    assert talker.calls == 0 and torch.equal(again.training, more.training)
    assert data.training_text(talker, given, 800 * 96, journal=tmp_path, passes=25).sampled == 0


@pytest.mark.parametrize(
    ("text", "tokens"), [("200k", 200_000), ("2M", 2_000_000), ("1.5m", 1_500_000), ("4096", 4096)]
)
def test_tokens_are_read_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--refine") == tokens


@pytest.mark.parametrize("text", ["", "many", "-5k", "2MB", "1e6", "nan", "0", "1k", "9" * 40])
def test_what_is_no_number_of_tokens_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--refine"):
        parse_tokens(text, "--refine")


def test_the_rate_rises_to_its_peak_and_falls_to_its_share() -> None:
    for decay in ("cosine", "linear"):
        rates = [
            learning_rate(step, 100, peak=1.0, warmup=10, decay=decay, final=0.05)  # type: ignore[arg-type]
            for step in range(101)
        ]
        assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
        assert max(rates) == rates[10] == 1.0 and rates[100] == pytest.approx(0.05)
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))
        assert rates[55] == pytest.approx(0.525)
