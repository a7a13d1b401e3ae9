"""Refuse calibration text that holds what fidelity is measured on.

Texts are compared as runs of words without case, punctuation and line breaks, so that a copy that was wrapped anew is
still one. A word counts as shared when it lies in a run of 13 words that both texts have: the rule by which GPT-3's
authors looked for test sets in their training text (Brown et al. 2020, arXiv:2005.14165, appendix C), distinct runs
counted once as in Broder's containment (1997, "On the resemblance and containment of documents"). Words become 64-bit
hashes, piece by piece: 256 MB against the text that ships take 14 s. Knows nothing of tokens and models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused
from edgepack.text import text_sha256

SHINGLE_WORDS = 13
# Two thirds of a window of 512 tokens (English: 0.75 words a token). Longer than what strangers share: the notice at
# the head of a file has 86 words under the Apache licence and 104 under the GPL, the whole MIT licence 172, BSD 230.
LONGEST_RUN_WORDS = 256
# Of the evaluation text, in pieces of any length. Documents from the same books and manuals share 1.3 to 2.3 %
# (measured on the texts that ship and on their halves): notices, figure credits, phrases of a template.
LARGEST_SHARE = 0.05

# Scripts that put no spaces between words (Thai to Khmer, Japanese, Chinese): every character is a word.
_UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_BORDER = re.compile(rf"[\W_{_UNSPACED}]")
_PIECE_CHARACTERS = 1 << 20
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word is lost in the product (Knuth 6.4, the golden ratio)
_FILTER_BITS = 22

Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


def refuse_overlap(calibration: str, evaluation: str) -> None:
    """Raise if the calibration text is, or holds, evaluation text.

    Refused are the same text; a shared run of `LONGEST_RUN_WORDS` words; and shared runs of 13 words and more that
    make up `LARGEST_SHARE` of the evaluation text and as many words as that. A licence notice both carry, a quotation,
    a table of contents stay below both.

    Args:
        calibration: The text to calibrate on.
        evaluation: The text to measure on.

    Raises:
        InputRefused: They overlap; the message says how much, and how the longest run begins.
    """
    hint = (
        "What is measured must not have been calibrated on: give another text with --calibration, or measure on another"
        " one with --evaluation."
    )
    if text_sha256(calibration) == text_sha256(evaluation):
        raise InputRefused("the calibration text is the evaluation text (same sha256)", hint=hint)
    ours = np.concatenate([*_word_hashes(evaluation), np.empty(0, np.uint64)])
    shingles = _shingles(ours)
    shared = _found(shingles, calibration)
    if not shared.any():
        return
    length, start = _longest_run(shared, shingles)
    words = _covered(shared, shingles)
    least = max(LONGEST_RUN_WORDS, LARGEST_SHARE * len(ours))
    if length >= LONGEST_RUN_WORDS or words >= least:
        match = next(itertools.islice(_WORD.finditer(evaluation), start, None))
        shown = " ".join(evaluation[match.start() : match.start() + 400].split())[:60]
        raise InputRefused(
            f"the calibration text holds {words:,} of the {len(ours):,} words of the evaluation text, the longest run"
            f" {length:,} words, beginning {shown!r}",
            hint=hint,
        )


def _word_hashes(text: str) -> Iterator[Hashes]:
    """Hashes of the words of a text, piece by piece; Python's own of the folded word, equal within one process."""
    start = 0
    while start < len(text):
        border = _BORDER.search(text, start + _PIECE_CHARACTERS)
        end = border.start() if border else len(text)
        words = _WORD.findall(text[start:end].casefold())
        yield np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        start = end


def _shingles(words: Hashes) -> Hashes:
    """One hash for every run of `SHINGLE_WORDS` words: a polynomial in `_MIX`, modulo 2**64."""
    count = max(0, len(words) - SHINGLE_WORDS + 1)
    mixed = words ^ (words >> np.uint64(29))
    found = np.zeros(count, np.uint64)
    for place in range(SHINGLE_WORDS):
        found = found * _MIX + mixed[place : place + count]
    return found ^ (found >> np.uint64(32))


def _found(shingles: Hashes, text: str) -> Flags:
    """Which of the shingles occur in a text."""
    if not len(shingles):
        return np.zeros(0, bool)
    known, place = np.unique(shingles, return_inverse=True)
    seen = np.zeros(len(known), bool)
    # A table that most foreign shingles miss: it stays in the processor's cache, the search in `known` would not.
    low = np.uint64((1 << _FILTER_BITS) - 1)
    table = np.zeros(1 << _FILTER_BITS, bool)
    table[known & low] = True
    rest = np.empty(0, np.uint64)
    for piece in _word_hashes(text):
        words = np.concatenate([rest, piece])
        theirs = _shingles(words)
        theirs = theirs[table[theirs & low]]
        index = np.minimum(np.searchsorted(known, theirs), len(known) - 1)
        seen[index[known[index] == theirs]] = True
        rest = words[-(SHINGLE_WORDS - 1) :]
    return seen[place]


def _longest_run(shared: Flags, shingles: Hashes) -> tuple[int, int]:
    """(Words, first word) of the longest run of shared shingles; what repeats in it, as zeros do, counts once."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shared, [False]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    count, start = max(((len(np.unique(shingles[first:end])), -int(first)) for first, end in runs), default=(0, 0))
    return count + SHINGLE_WORDS - 1, -start


def _covered(shared: Flags, shingles: Hashes) -> int:
    """Words that lie in a shared shingle, each shingle at its first place only: what is boilerplate counts once."""
    first = np.zeros(len(shingles), bool)
    first[np.unique(shingles, return_index=True)[1]] = True
    starts = np.flatnonzero(shared & first)
    change = np.zeros(len(shingles) + SHINGLE_WORDS, np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, starts + SHINGLE_WORDS, -1)
    return int((np.cumsum(change) > 0).sum())
