"""Warn when calibration text looks unlike the evaluation text: another language, code instead of prose.

The measure is the Jensen-Shannon divergence (base 2: 0 the same, 1 nothing in common; Lin 1991, "Divergence measures
based on the Shannon entropy") of how often each token occurs. Two finite samples of one text are apart as well, the
more the fewer tokens and the larger the vocabulary; so the same number of tokens is drawn from each text, and what two
disjoint samples of the evaluation text give is subtracted. It sees words, not what they say: a text that passes may
still be a poor one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgepack.text import WINDOW_TOKENS

# Measured on the evaluation text that ships, with vocabularies of 2,048 and 8,192: the calibration text that ships 0.01
# and 0.04, Python's PEPs 0.05 and 0.07, PowerShell's manual 0.11 and 0.12; Python code 0.24 and 0.28, C++ 0.37 and
# 0.42, German, French and Spanish 0.40 to 0.48, Polish and Turkish 0.47 to 0.55, Russian, Greek, Japanese, Chinese and
# Korean 0.69 to 0.83.
LARGEST_EXCESS = 0.2
_MOST_TOKENS = 1 << 15  # a sample; more change the third decimal
_LEAST_TOKENS = WINDOW_TOKENS  # fewer say nothing
_BLOCK = 64  # tokens drawn together: samples come from all over a text and are no list of single words

Ids = npt.NDArray[np.int64]


def unlike(calibration: Sequence[int], evaluation: Sequence[int]) -> str | None:
    """A warning sentence when two texts differ more than text of one kind does; None when they don't.

    Args:
        calibration: Token ids, of the whole text or of its windows one after the other.
        evaluation: Token ids by the same tokenizer.
    """
    ours, theirs = _blocks(calibration), _blocks(evaluation)
    size = min(len(ours), len(theirs) // 2, _MOST_TOKENS // _BLOCK)
    if size * _BLOCK < _LEAST_TOKENS:
        return None
    one, other = _spread(theirs[::2], size), _spread(theirs[1::2], size)
    within = divergence(one, other)
    across = divergence(_spread(ours, size), one)
    if across - within < LARGEST_EXCESS:
        return None
    return (
        f"the calibration text looks unlike the evaluation text: their tokens are {across:.2f} apart (Jensen-Shannon"
        " divergence, from 0 for the same to 1 for nothing in common), two samples of the evaluation text"
        f" {within:.2f}; calibrate on text of the kind the model will see"
    )


def divergence(one: Ids, other: Ids) -> float:
    """Jensen-Shannon divergence in bits of the frequencies of non-negative integers."""
    size = int(max(one.max(), other.max())) + 1
    p, q = (np.bincount(ids, minlength=size) / len(ids) for ids in (one, other))
    return max(0.0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(frequencies: npt.NDArray[np.float64]) -> float:
    positive = frequencies[frequencies > 0]
    return float(-(positive * np.log2(positive)).sum())


def _blocks(tokens: Sequence[int]) -> Ids:
    """Tokens in rows of `_BLOCK`; what is left at the end is dropped."""
    ids = np.asarray(tokens, np.int64)
    count = len(ids) // _BLOCK
    return ids[: count * _BLOCK].reshape(count, _BLOCK)


def _spread(blocks: Ids, size: int) -> Ids:
    """`size` blocks from all over."""
    return blocks[np.linspace(0, len(blocks) - 1, size).astype(np.int64)].ravel()
