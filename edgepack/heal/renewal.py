"""Text drawn anew: the same windows with some of their tokens as the teacher would have gone on.

A text that is passed many times is learned by heart: the loss on it goes on falling where that on held-out text does
not. Writing more (`sampling.py`) takes a pass of the teacher for every token. Here a window changes between its passes:
each of its tokens is, with probability `SHARE`, drawn from the teacher's prediction at that place, which training has
asked for anyway. What comes out is drawn from again the next time, so that a window moves away from the text it began
as, like the state of a Gibbs sampler. The teacher has an answer to any text, so it need not make sense to be learned
from; measured against repeated text and other ways of changing it in docs/healing.md.
"""

from __future__ import annotations

import torch

SHARE = 0.5
_SEED = 20260304


def noise(version: int) -> torch.Generator:
    """Random numbers of one version of a text, the same in every run."""
    return torch.Generator().manual_seed(_SEED + version)


def drawn_anew(
    window: torch.Tensor, indices: torch.Tensor, logs: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A window with tokens drawn anew; the first stays, nothing predicts it. All on the CPU.

    Args:
        window: Token ids `[tokens]`.
        indices: The teacher's `k` likeliest next tokens after each, `[tokens, k]`.
        logs: Their log-probabilities; where a draw falls to a token that is none of them, the old one stays.
        generator: Of random numbers.

    Returns:
        `[tokens]`.
    """
    indices, sums, old = indices[:-1].long(), logs[:-1].float().exp().cumsum(dim=-1), window[1:]
    places = torch.rand(len(old), 1, generator=generator)
    chosen = torch.rand(len(old), generator=generator) < SHARE
    ranks = torch.searchsorted(sums, places, right=True)
    known = ranks[:, 0] < indices.shape[1]
    new = indices.gather(1, ranks.clamp(max=indices.shape[1] - 1))[:, 0]
    return torch.cat([window[:1], torch.where(chosen & known, new, old)])
