from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgepack.measure.draft_worth import (
    PREDICTED_WORTH,
    WORTH,
    Elsewhere,
    ceiling,
    expected_tokens,
    hopeless,
    judge,
    speed_up,
)

ANSWERS = 20_000


def simulated_tokens(acceptance: float, length: int) -> tuple[float, float]:
    """Mean tokens of a pass and its standard error, every drafted token accepted by a coin of its own."""
    hits = np.random.default_rng(7).random((ANSWERS, length)) < acceptance
    tokens = 1 + np.cumprod(hits, axis=1).sum(axis=1)
    return float(tokens.mean()), float(tokens.std() / ANSWERS**0.5)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.97])
@pytest.mark.parametrize("length", [1, 4, 8])
def test_expected_tokens_are_those_of_tossed_coins(acceptance: float, length: int) -> None:
    mean, error = simulated_tokens(acceptance, length)
    assert abs(expected_tokens(acceptance, length) - mean) <= 4 * error
    assert expected_tokens(acceptance, length) == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance))


def test_a_draft_that_is_always_right_fills_every_pass() -> None:
    assert expected_tokens(1.0, 5) == 6


def test_the_speed_up_is_the_ratio_of_two_simulated_clocks() -> None:
    acceptance, length, draft_ms, token_ms, pass_ms = 0.7, 4, 2.0, 10.0, 15.0
    hits = np.random.default_rng(3).random((ANSWERS, length)) < acceptance
    tokens = (1 + np.cumprod(hits, axis=1).sum(axis=1)).sum()
    replay_ms = draft_ms * pass_ms / token_ms  # the draft reads the pass once more, as dear to it as to the target
    clock = ANSWERS * (length * draft_ms + pass_ms + replay_ms)
    found = speed_up(
        expected_tokens(acceptance, length), length, draft_cost=draft_ms / token_ms, pass_cost=pass_ms / token_ms
    )
    assert found == pytest.approx(tokens * token_ms / clock, rel=0.01)


def test_a_draft_as_slow_as_the_target_never_pays() -> None:
    assert all(speed_up(expected_tokens(1.0, length), length, draft_cost=1.0) <= 1 for length in range(1, 9))


def found(low: float, high: float, **changes: Any) -> dict[str, Any]:
    return {
        "length": 4,
        "acceptance": {"value": 0.8, "ci95": [0.7, 0.9]},
        "tokens_per_pass": 3.5,
        "pass_cost": 1.5,
        "draft_cost": 0.3,
        "tried": [],
        "speed_up": {"value": (low + high) / 2, "ci95": [low, high]},
    } | changes


def test_a_measured_speed_up_counts_by_the_low_end_of_its_interval() -> None:
    assert judge(found(WORTH, 1.4), None).worth
    straddling = judge(found(1.0, 2.0), None)
    assert not straddling.worth
    assert straddling.words.startswith("not worth it: 1.50 times the speed without it (95 % interval 1.00 to 2.00)")
    assert "80 % of the drafted tokens accepted, 3.50 tokens per pass at 4 drafted" in straddling.words


def test_a_prediction_says_that_it_is_one() -> None:
    worth = judge(found(0.1, 0.2), Elsewhere(0.2, False))
    assert worth.worth
    assert worth.basis == "predicted"
    assert worth.predicted == pytest.approx(3.5 / (1 + 0.2 * 5))
    assert "not measured on the target" in worth.words
    assert worth.as_json()["predicted_speed_up"] == 1.75


def test_a_cpu_is_taken_to_check_several_tokens_at_the_cost_found_here() -> None:
    on_cpu = judge(found(0.1, 0.2), Elsewhere(0.2, True))
    assert on_cpu.predicted == pytest.approx(3.5 / (1.5 + 0.2 * 5.5))


def test_a_small_predicted_gain_is_not_enough() -> None:
    cost = (3.5 / (PREDICTED_WORTH - 0.01) - 1) / 5
    worth = judge(found(2.0, 3.0), Elsewhere(cost, False))
    assert not worth.worth
    assert worth.words.startswith("not worth it: predicted 1.19 times")


def test_without_a_bandwidth_nothing_is_predicted_and_nothing_is_offered() -> None:
    worth = judge(found(2.0, 3.0), Elsewhere(None, False))
    assert not worth.worth
    assert worth.predicted is None
    assert "no memory bandwidth" in worth.words


def test_nothing_is_faster_than_a_draft_that_is_always_right() -> None:
    tried = [{"length": 2, "pass_cost": 1.1, "draft_cost": 0.3}, {"length": 8, "pass_cost": 6.0, "draft_cost": 0.3}]
    best = ceiling(found(0.5, 0.6, tried=tried), None)
    assert best == pytest.approx(max(3 / (1.1 + 0.3 * 3.1), 5 / (1.5 + 0.3 * 5.5), 9 / (6 + 0.3 * 14)))


def test_a_draft_that_could_not_pay_if_it_were_always_right_is_not_healed() -> None:
    worth = hopeless(found(0.5, 0.6, pass_cost=4.5, draft_cost=0.5), None)
    assert worth is not None
    assert not worth.worth
    assert "0.57 times the speed without it even if every drafted token were accepted" in worth.words
    assert "80 % of the drafted tokens accepted" in worth.words


def test_a_draft_that_could_pay_has_its_healing() -> None:
    assert hopeless(found(0.5, 0.6), None) is None
    assert hopeless(found(0.5, 0.6), Elsewhere(0.2, False)) is None


def test_what_is_hopeless_elsewhere_is_predicted_to_be() -> None:
    worth = hopeless(found(0.5, 0.6, pass_cost=4.5), Elsewhere(0.5, True))
    assert worth is not None
    assert worth.basis == "predicted"
    assert worth.predicted == pytest.approx(5 / (4.5 + 0.5 * 8.5))
    unknown = hopeless(found(0.5, 0.6), Elsewhere(None, True))
    assert unknown is not None
    assert "no memory bandwidth" in unknown.words
