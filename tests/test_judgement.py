"""Rows, budgets and predictions brought together."""

from __future__ import annotations

from edgepack.judgement import EMBEDDING, GENERATION, judged, unit_of
from edgepack.measurement import Measurement, overall
from edgepack.targets import load_target, with_overrides


def measured(name: str, value: float) -> dict[str, object]:
    return Measurement(name, value, unit_of(name)).as_json()


def test_a_budget_nobody_measured_becomes_a_row_that_says_so() -> None:
    rows = {row.name: row for row in judged([], load_target("jetson"), {}, embedding=False)}
    limits = load_target("jetson").limits()
    assert {name for name, row in rows.items() if row.verdict == "not_measured"} == set(limits) - EMBEDDING
    assert all(row.value is None and row.measured_on is None for row in rows.values())


def test_a_build_for_a_device_elsewhere_is_incomplete_and_not_a_pass() -> None:
    rows = judged(
        [measured("artifact_bytes", 1e6), measured("mean_kld", 0.001)], load_target("jetson"), {}, embedding=False
    )
    assert overall(rows) == "incomplete"


def test_budgets_on_generation_do_not_apply_to_an_embedder() -> None:
    target = with_overrides(load_target("laptop"), ["budget.mean_kld=0.01", "budget.cosine_mean=0.99"])
    assert {row.name for row in judged([], target, {}, embedding=True)} & GENERATION == set()
    assert "cosine_mean" in {row.name for row in judged([], target, {}, embedding=True)}
    assert "cosine_mean" not in {row.name for row in judged([], target, {}, embedding=False)}


def test_the_prediction_stands_beside_the_measurement() -> None:
    rows = judged([measured("peak_rss_mb", 100.0)], load_target("laptop"), {"peak_rss_mb": 110.0}, embedding=False)
    row = next(row for row in rows if row.name == "peak_rss_mb")
    assert (row.value, row.predicted) == (100.0, 110.0)


def test_a_prediction_without_a_measurement_is_kept_as_not_measured() -> None:
    rows = judged([], load_target("laptop"), {"decode_tokens_per_s_p50": 12.0}, embedding=False)
    row = next(row for row in rows if row.name == "decode_tokens_per_s_p50")
    assert (row.value, row.predicted, row.unit) == (None, 12.0, "tokens/s")
