from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.measure import divergence
from edgepack.measure.divergence import score


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def naive(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, by the definition."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 70),
    vocabulary=st.integers(2, 3000),
    spread=st.floats(0.01, 20),
    noise=st.floats(0, 3),
    shift=st.floats(-300, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_are_those_of_the_definition_in_float64(
    rows: int, vocabulary: int, spread: float, noise: float, shift: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    reference = (spread * random.standard_normal((rows, vocabulary))).astype(np.float32)
    candidate = (reference + noise * random.standard_normal((rows, vocabulary)) + shift).astype(np.float32)
    targets = random.integers(0, vocabulary, rows)
    p, q = naive(reference), naive(candidate)
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    with ThreadPoolExecutor(2) as threads:
        found = score(candidate.copy(), targets, reference=reference.copy(), pool=threads)
        alone = score(candidate.copy(), targets, pool=threads)
    # logits up to 1e2 wide carry float32 steps of 1e-5; the sum over a vocabulary averages them
    np.testing.assert_allclose(found.kld, kld, rtol=2e-5, atol=3e-6)
    np.testing.assert_allclose(found.candidate_nll, -q[np.arange(rows), targets], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.reference_nll, -p[np.arange(rows), targets], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(found.same_top, same)
    np.testing.assert_allclose(alone.candidate_nll, found.candidate_nll, rtol=1e-12)
    assert alone.kld is None


def test_identical_logits_diverge_by_exactly_nothing(pool: ThreadPoolExecutor) -> None:
    logits = (9 * np.random.default_rng(1).standard_normal((300, 2048))).astype(np.float32)
    found = score(logits.copy(), np.zeros(300, dtype=np.int64), reference=logits.copy(), pool=pool)
    assert found.kld is not None and np.all(found.kld == 0)
    assert found.same_top is not None and np.all(found.same_top == 1)


def test_a_vocabulary_wider_than_a_block_is_scored_row_by_row(pool: ThreadPoolExecutor) -> None:
    random = np.random.default_rng(2)
    width = divergence._BLOCK_BYTES // 4 + 5
    reference = random.standard_normal((3, width)).astype(np.float32)
    candidate = reference + random.standard_normal((3, width)).astype(np.float32)
    p, q = naive(reference), naive(candidate)
    found = score(candidate, np.zeros(3, dtype=np.int64), reference=reference, pool=pool)
    np.testing.assert_allclose(found.kld, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-5)


def test_nan_and_infinity_stay_visible_and_stay_in_their_row(pool: ThreadPoolExecutor) -> None:
    reference = np.random.default_rng(3).standard_normal((5, 50)).astype(np.float32)
    candidate = reference.copy()
    candidate[1, 7] = np.nan
    candidate[3, 7] = np.inf
    found = score(candidate, np.zeros(5, dtype=np.int64), reference=reference, pool=pool)
    assert found.kld is not None
    assert list(np.isfinite(found.kld)) == [True, False, True, False, True]
    assert list(np.isfinite(found.candidate_nll)) == [True, False, True, False, True]


def test_a_token_that_both_rule_out_counts_nothing(pool: ThreadPoolExecutor) -> None:
    reference = np.random.default_rng(4).standard_normal((2, 50)).astype(np.float32)
    candidate = reference + np.float32(0.5) * np.random.default_rng(5).standard_normal((2, 50)).astype(np.float32)
    p, q = naive(reference[:, 1:]), naive(candidate[:, 1:])
    reference[:, 0] = candidate[:, 0] = -np.inf
    found = score(candidate, np.ones(2, dtype=np.int64), reference=reference, pool=pool)
    np.testing.assert_allclose(found.kld, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-5)


def test_a_token_that_only_the_candidate_rules_out_is_infinitely_far(pool: ThreadPoolExecutor) -> None:
    reference = np.zeros((1, 50), dtype=np.float32)
    candidate = reference.copy()
    candidate[0, 3] = -np.inf
    found = score(candidate, np.zeros(1, dtype=np.int64), reference=reference, pool=pool)
    assert found.kld is not None and found.kld[0] == np.inf
