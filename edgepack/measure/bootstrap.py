"""Standard errors and confidence intervals of measurements whose samples come in correlated groups.

Tokens of one window share their context, so windows are drawn, not tokens: the block bootstrap of Künsch (1989) with
the window as the block. Two artifacts measured on the same windows are compared on the same draws (paired). All draws
use one fixed seed: the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000  # enough for a stable 95 % percentile interval (Efron & Tibshirani 1993, chapter 13)
SEED = 20240501

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic with its uncertainty.

    Args:
        value: The statistic on the samples themselves.
        standard_error: Standard deviation over the draws; None with fewer than two blocks.
        ci95: 2.5 % and 97.5 % quantiles over the draws; None with fewer than two blocks.
    """

    value: float
    standard_error: float | None
    ci95: tuple[float, float] | None


def draws(blocks: int, resamples: int = RESAMPLES) -> npt.NDArray[np.int64]:
    """How often each block is drawn: `[resamples, blocks]`, every row adding up to `blocks`."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)


def mean(samples: Array, transform: Callable[[Array], Array] | None = None) -> Estimate:
    """The mean over all samples, or a function of it (`np.exp` for perplexity).

    Args:
        samples: `[blocks, samples per block]`.
        transform: Monotonic function of the mean.
    """
    apply = transform or _same
    per_block = samples.mean(axis=1)
    replicates = apply(draws(len(samples)) @ per_block / len(samples))
    return estimate(float(apply(np.array([per_block.mean()]))[0]), replicates, len(samples))


def quantile(samples: Array, fraction: float) -> Estimate:
    """A quantile of all samples (linear interpolation); each draw takes it from the windows drawn.

    Args:
        samples: `[blocks, samples per block]`.
        fraction: 0.5 for the median.
    """
    flat = samples.ravel()
    order = np.argsort(flat, kind="stable")
    ordered, owner = flat[order], order // samples.shape[1]
    replicates = np.empty(RESAMPLES)
    for number, weights in enumerate(draws(len(samples))):
        seen = np.cumsum(weights[owner])
        replicates[number] = ordered[np.searchsorted(seen, fraction * seen[-1])]
    return estimate(float(np.quantile(flat, fraction)), replicates, len(samples))


def _same(values: Array) -> Array:
    return values


def ratio(hits: Array, counts: Array) -> Estimate:
    """Hits over counts where blocks are of different size and drawn whole.

    Args:
        hits: `[blocks]`.
        counts: `[blocks]`, each at least 1.
    """
    weights = draws(len(hits))
    return estimate(float(hits.sum() / counts.sum()), (weights @ hits) / (weights @ counts), len(hits))


def estimate(value: float, replicates: Array, blocks: int) -> Estimate:
    """A statistic with the spread of its bootstrap replicates.

    Args:
        value: The statistic on the samples themselves.
        replicates: The statistic on each draw.
        blocks: How many blocks were drawn from.
    """
    if blocks < 2:
        return Estimate(value, None, None)
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(value, float(replicates.std(ddof=1)), (float(low), float(high)))
