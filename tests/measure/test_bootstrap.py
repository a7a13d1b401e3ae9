from __future__ import annotations

import numpy as np
import pytest

from edgepack.measure import bootstrap


def test_the_standard_error_of_a_mean_is_that_of_the_window_means() -> None:
    samples = np.random.default_rng(0).gamma(1.0, 0.02, size=(60, 255)) * np.random.default_rng(1).gamma(
        4, 0.25, (60, 1)
    )
    found = bootstrap.mean(samples)
    assert found.value == pytest.approx(samples.mean(), rel=1e-12)
    analytic = samples.mean(axis=1).std(ddof=1) / np.sqrt(60)
    assert found.standard_error == pytest.approx(analytic, rel=0.06)
    assert found.ci95 is not None
    assert found.ci95[0] == pytest.approx(found.value - 1.96 * analytic, rel=0.03)
    assert found.ci95[1] == pytest.approx(found.value + 1.96 * analytic, rel=0.03)


def test_correlated_windows_widen_the_interval() -> None:
    random = np.random.default_rng(2)
    independent = random.standard_normal((40, 100))
    grouped = np.repeat(random.standard_normal((40, 1)), 100, axis=1)
    narrow, wide = bootstrap.mean(independent), bootstrap.mean(grouped)
    assert narrow.standard_error is not None and wide.standard_error is not None
    assert wide.standard_error > 7 * narrow.standard_error  # ten times, by theory


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        samples = random.standard_normal((40, 1)) * 0.5 + random.standard_normal((40, 5))
        low, high = bootstrap.mean(samples).ci95 or (0.0, 0.0)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_transformed_mean_is_transformed_draw_by_draw() -> None:
    samples = np.random.default_rng(4).normal(2.4, 0.3, size=(30, 50))
    plain, power = bootstrap.mean(samples), bootstrap.mean(samples, np.exp)
    assert power.value == pytest.approx(np.exp(plain.value))
    assert plain.ci95 is not None and power.ci95 is not None
    assert power.ci95 == pytest.approx(tuple(np.exp(plain.ci95)), rel=1e-3)


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_a_quantile_agrees_with_resampling_by_hand(fraction: float) -> None:
    samples = np.random.default_rng(5).gamma(0.5, 0.04, size=(25, 80))
    found = bootstrap.quantile(samples, fraction)
    assert found.value == np.quantile(samples, fraction)
    by_hand = [
        np.quantile(np.repeat(samples, weights, axis=0), fraction, method="inverted_cdf")
        for weights in bootstrap.draws(25)
    ]
    assert found.standard_error == pytest.approx(np.std(by_hand, ddof=1), rel=1e-9)
    assert found.ci95 == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])), rel=1e-9)


def test_one_block_has_no_interval() -> None:
    found = bootstrap.mean(np.ones((1, 10)))
    assert (found.value, found.standard_error, found.ci95) == (1.0, None, None)


def test_the_same_samples_give_the_same_interval() -> None:
    samples = np.random.default_rng(6).standard_normal((20, 10))
    assert bootstrap.mean(samples) == bootstrap.mean(samples)
    assert bootstrap.quantile(samples, 0.5) == bootstrap.quantile(samples, 0.5)


def test_every_draw_has_as_many_blocks_as_there_are() -> None:
    assert np.all(bootstrap.draws(17).sum(axis=1) == 17)
