"""Two models' logits at the same positions: KL divergence, log-likelihoods and agreement, per token, in float32.

With log-probabilities `l = r - max r - log S_r` (reference) and `m` likewise (candidate), the divergence of a position
is `sum p (l - m)` over the vocabulary, in nats, `p = exp l`: the definition llama-perplexity uses (llama.cpp
tools/perplexity/perplexity.cpp, `log_softmax` for `kl_divergence_result`), without its 16-bit logits file and its cut
at `log p < -16`. Rows are worked in blocks that fit in a core's cache, on all threads: beside the logits themselves a
vocabulary of any size takes the same memory. Identical logits give exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK_BYTES = 512 << 10  # of one model's logits: with the other's and their difference it fits in a 2 MB L2 cache

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Per-token results, each `[positions]`; NaN where the logits are not finite.

    Args:
        candidate_nll: Negative log-likelihood of the true next token, nats.
        reference_nll: The same for the reference; None where there is none.
        kld: KL divergence of the candidate from the reference, nats.
        same_top: 1.0 where both give the same token the highest logit (the first of equals).
    """

    candidate_nll: Array
    reference_nll: Array | None = None
    kld: Array | None = None
    same_top: Array | None = None


def score(
    candidate: Floats, targets: npt.NDArray[np.int64], *, reference: Floats | None = None, pool: ThreadPoolExecutor
) -> Scores:
    """Score logits against the tokens that followed, and against a reference's logits.

    Args:
        candidate: `[positions, vocabulary]`; overwritten with `exp(logit - largest)`: the probabilities of each row up
            to a factor.
        targets: `[positions]`: the token after each position.
        reference: Same shape as `candidate`; overwritten likewise.
        pool: Threads to work on; numpy releases Python's lock.
    """
    count, vocabulary = candidate.shape
    out = np.full((4, count), np.nan)
    rows = max(1, _BLOCK_BYTES // (4 * vocabulary))
    blocks = [slice(start, min(count, start + rows)) for start in range(0, count, rows)]

    def work(block: slice) -> None:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if reference is None:
                out[0, block] = _likelihood(candidate[block], targets[block])
            else:
                out[:, block] = list(_pair(candidate[block], reference[block], targets[block]))

    list(pool.map(work, blocks))
    if reference is None:
        return Scores(out[0])
    return Scores(out[0], out[1], out[2], out[3])


def _likelihood(logits: Floats, targets: npt.NDArray[np.int64]) -> Array:
    index = np.arange(len(logits))
    logits -= logits.max(axis=1, keepdims=True)
    hit = logits[index, targets].astype(np.float64)
    np.exp(logits, out=logits)
    nll: Array = np.log(logits.sum(axis=1, dtype=np.float64)) - hit
    return nll


def _pair(candidate: Floats, reference: Floats, targets: npt.NDArray[np.int64]) -> Iterator[Array]:
    """Candidate likelihood, reference likelihood, divergence, same first choice."""
    index = np.arange(len(targets))
    best_c, best_r = candidate.argmax(axis=1), reference.argmax(axis=1)
    candidate -= candidate[index, best_c][:, None]
    reference -= reference[index, best_r][:, None]
    hit_c, hit_r = candidate[index, targets].astype(np.float64), reference[index, targets].astype(np.float64)
    difference = reference - candidate
    difference[reference == -np.inf] = 0  # p log p -> 0: a token both rule out, or only the reference does
    np.exp(candidate, out=candidate)
    np.exp(reference, out=reference)
    sum_c, sum_r = (x.sum(axis=1, dtype=np.float64) for x in (candidate, reference))
    gap = np.log(sum_r) - np.log(sum_c)
    kld = np.einsum("ij,ij->i", reference, difference, dtype=np.float32).astype(np.float64) / sum_r - gap
    same = np.where(np.isfinite(kld), best_c == best_r, np.nan)
    yield np.log(sum_c) - hit_c
    yield np.log(sum_r) - hit_r
    yield kld
    yield same
