"""Verdicts of rows and packages."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.measurement import Measurement, from_json, judge, overall

finite = st.floats(-1e12, 1e12)


def row(value: float | None, ci95: tuple[float, float] | None = None) -> Measurement:
    return Measurement("mean_kld", value, "nats/token", ci95=ci95)


def test_a_value_within_its_budget_passes() -> None:
    assert judge(row(0.02), {"max": 0.03}).verdict == "pass"


def test_a_value_beyond_its_budget_fails() -> None:
    assert judge(row(0.04), {"max": 0.03}).verdict == "fail"
    assert judge(row(4.0), {"min": 5.0}).verdict == "fail"


def test_what_was_not_measured_never_counts_as_a_pass() -> None:
    assert judge(row(None), {"max": 0.03}).verdict == "not_measured"


def test_an_interval_that_straddles_the_budget_is_inconclusive() -> None:
    assert judge(row(0.029, (0.028, 0.031)), {"max": 0.03}).verdict == "inconclusive"


def test_an_interval_wholly_beyond_the_budget_fails() -> None:
    assert judge(row(0.04, (0.035, 0.045)), {"max": 0.03}).verdict == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_fails(value: float) -> None:
    assert judge(row(value), {"max": 0.03}).verdict == "fail"


def test_a_row_without_a_budget_has_no_verdict() -> None:
    assert judge(row(0.02), None).verdict is None


@given(finite, finite)
def test_a_lower_limit_and_an_upper_limit_mirror_each_other(value: float, limit: float) -> None:
    assert judge(row(value), {"max": limit}).verdict == judge(row(-value), {"min": -limit}).verdict


@given(st.lists(st.sampled_from(["pass", "fail", "not_measured", "inconclusive", None])))
def test_a_package_passes_only_when_every_budget_was_measured_and_met(verdicts: list[str | None]) -> None:
    rows = [Measurement("x", 1.0, "1", verdict=verdict) for verdict in verdicts]
    gated = {verdict for verdict in verdicts if verdict is not None}
    assert (overall(rows) == "fail") == ("fail" in gated)
    assert (overall(rows) == "pass") == (gated <= {"pass"})


def test_a_row_survives_its_json_form() -> None:
    judged = judge(
        Measurement("ttft_ms_p90", 12.5, "ms", n=50, ci95=(12.0, 13.0), note="few", extra={"sd": 1.0}), {"max": 20}
    )
    assert from_json(judged.as_json()) == judged


def test_an_inconclusive_row_says_why_beside_what_it_said_before() -> None:
    row = Measurement("mean_kld", 0.05, "nats/token", ci95=(0.04, 0.06), note="2 windows")
    assert judge(row, {"max": 0.05}).note == "the 95 % interval straddles the budget; 2 windows"
