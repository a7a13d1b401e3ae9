"""Where in a text two models part: divergence by position, by window, and token by token in the worst windows.

Rides along with the scoring of `fidelity.py`. A window's logits are gone once it is scored, and which windows are the
worst is known only at the end: so what a window would show is kept while it is among the worst seen so far (about
`5 (1 + ln n/5)` windows of n ever are), as a few numbers. Nothing here changes a measured row.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.figures import significant
from edgepack.measure.divergence import Floats, Scores

SCHEMA_VERSION = 1
WORST_WINDOWS = 5  # a screen or two of text to read
WORST_POSITIONS = 10  # of each
CHOICES = 3  # likeliest tokens of each model there
CONTEXT_TOKENS = 48  # shown before the first scored token of a window, so that a reader knows where he is
_DIGITS = 4  # significant digits kept: these are for the eye

Array = npt.NDArray[np.float64]
Decode = Callable[[Sequence[int]], bytes]
_Choice = tuple[int, float]


@dataclass(frozen=True)
class _Position:
    place: int
    reference: list[_Choice]
    candidate: list[_Choice]


@dataclass
class Watch:
    """Sees every scored block once, keeps what the worst windows will show.

    Args:
        per_window: Scored positions of each window.
    """

    per_window: int
    _kept: dict[int, tuple[float, list[_Position]]] = field(default_factory=dict)
    _seen: int = 0

    def see(self, scores: Scores, candidate: Floats, reference: Floats) -> None:
        """Take in a scored block.

        Args:
            scores: Of whole windows, in the order of the text.
            candidate: `[positions, vocabulary]` as `score` left it: probabilities up to a factor per row.
            reference: The same for the reference.
        """
        if scores.kld is None:
            return
        for number, kld in enumerate(scores.kld.reshape(-1, self.per_window)):
            rows = slice(number * self.per_window, (number + 1) * self.per_window)
            self._consider(self._seen + number, kld, candidate[rows], reference[rows])
        self._seen += len(scores.kld) // self.per_window

    def _consider(self, window: int, kld: Array, candidate: Floats, reference: Floats) -> None:
        mean = float(kld.mean())
        if not np.isfinite(kld).all():
            return
        if len(self._kept) == WORST_WINDOWS:
            best = min(self._kept, key=lambda kept: (self._kept[kept][0], -kept))
            if mean <= self._kept[best][0]:
                return
            del self._kept[best]
        worst = np.argsort(-kld, kind="stable")[:WORST_POSITIONS]
        self._kept[window] = (
            mean,
            [_Position(int(place), _choices(reference[place]), _choices(candidate[place])) for place in worst],
        )

    def details(self, scores: Scores, pieces: Sequence[Sequence[int]], decode: Decode) -> dict[str, Any] | None:
        """What `evidence/details.json` holds.

        Args:
            scores: Of all windows.
            pieces: Token ids of all windows.
            decode: Ids to the bytes of their text.

        Returns:
            `window_tokens`, `first` (position of the first scored token in its window), `kld_by_position`
            (mean over windows), `kld_by_window` (mean over positions) and `worst`: the worst windows, worst first,
            each with `window` (its number), `mean_kld`, `context` (text before), `tokens` (text pieces), `kld` (of the
            distribution each token was drawn from) and `positions`: `at` (index into `tokens`), `kld`, and
            `reference` and `candidate`, lists of `{"token", "p"}`. None without a reference or with NaN in the scores.
        """
        if scores.kld is None or not np.isfinite(scores.kld).all():
            return None
        kld = scores.kld.reshape(-1, self.per_window)
        first = len(pieces[0]) - self.per_window
        order = sorted(self._kept, key=lambda window: (-self._kept[window][0], window))
        return {
            "schema_version": SCHEMA_VERSION,
            "unit": "nats/token",
            "window_tokens": len(pieces[0]),
            "first": first,
            "kld_by_position": _rounded(kld.mean(axis=0)),
            "kld_by_window": _rounded(kld.mean(axis=1)),
            "worst": [self._shown(window, kld[window], pieces[window], first, decode) for window in order],
        }

    def _shown(self, window: int, kld: Array, ids: Sequence[int], first: int, decode: Decode) -> dict[str, Any]:
        mean, positions = self._kept[window]
        before = ids[max(0, first - CONTEXT_TOKENS) : first]

        def named(choices: Sequence[_Choice]) -> list[dict[str, Any]]:
            return [{"token": alone(decode([token])), "p": _rounded([p])[0]} for token, p in choices]

        return {
            "window": window,
            "mean_kld": _rounded([mean])[0],
            "context": "".join(text_pieces(before, decode)),
            "tokens": text_pieces(ids[first:], decode),
            "kld": _rounded(kld),
            "positions": [
                {
                    "at": position.place,
                    "kld": _rounded([kld[position.place]])[0],
                    "reference": named(position.reference),
                    "candidate": named(position.candidate),
                }
                for position in positions
            ],
        }


def _choices(row: Floats) -> list[_Choice]:
    """The likeliest tokens of a row and their probabilities."""
    count = min(CHOICES, len(row))
    top = np.argpartition(row, len(row) - count)[-count:]
    top = top[np.lexsort((top, -row[top]))]
    total = float(row.sum(dtype=np.float64))
    return [(int(token), float(row[token]) / total) for token in top]


def text_pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token; joined, they are the text.

    A letter whose bytes are spread over tokens stands with the token that completes it; those before are empty.

    Args:
        ids: Token ids in the order of the text.
        decode: One id to its bytes.
    """
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [reader.decode(decode([token])) for token in ids]
    if pieces:
        pieces[-1] += reader.decode(b"", final=True)
    return pieces


def alone(piece: bytes) -> str:
    r"""A token on its own: bytes that are no text by themselves are written `\xe2`."""
    return piece.decode("utf-8", "backslashreplace")


def _rounded(values: Sequence[float] | Array) -> list[float]:
    return [significant(value, _DIGITS) for value in values]
