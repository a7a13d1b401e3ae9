"""One greedy answer of a model, alone and with a draft model beside it, timed.

With a draft it is llama.cpp's own loop (examples/speculative-simple, llama-server with `--spec-type draft-simple`): the
draft proposes tokens one by one, the artifact reads them all in one pass and keeps those it would have chosen itself
and the one after them; then the draft reads what the artifact has read, and both forget what was rejected. So the
output is the artifact's, whatever is proposed. End-of-text is ignored: every answer has the length asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgepack.runtimes.llama_cpp import Model


@dataclass(frozen=True)
class Answer:
    """One answer from an empty cache.

    Args:
        ids: Generated tokens.
        prompt_ms: Until the first of them was known.
        ms: For all after the first.
        drafted: Tokens proposed, one value a pass.
        accepted: Of them, those kept.
        passes_ms: Of `ms`, the artifact's passes over drafted tokens.
    """

    ids: tuple[int, ...]
    prompt_ms: float
    ms: float
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    passes_ms: float = 0.0


def alone(artifact: Model, prompt: Sequence[int], tokens: int) -> Answer:
    """Generate `tokens` tokens greedily, one pass each."""
    artifact.clear()
    started = time.perf_counter()
    artifact.feed(prompt, 0)
    ids = [artifact.greedy()]
    ready = time.perf_counter()
    for position in range(len(prompt), len(prompt) + tokens - 1):
        artifact.feed(ids[-1:], position)
        ids.append(artifact.greedy())
    return Answer(tuple(ids), 1000 * (ready - started), 1000 * (time.perf_counter() - ready))


def together(artifact: Model, draft: Model, prompt: Sequence[int], tokens: int, length: int) -> Answer:
    """Generate `tokens` tokens greedily, the draft proposing up to `length` for every pass of the artifact."""
    artifact.clear()
    draft.clear()
    started = time.perf_counter()
    artifact.feed(prompt, 0)
    draft.feed(prompt, 0)
    ids = [artifact.greedy()]
    ready = time.perf_counter()
    place = len(prompt)  # of the newest token, which neither cache holds yet
    drafted, accepted, passes = [], [], 0.0
    while len(ids) < tokens:
        proposed = _propose(draft, ids[-1], place, min(length, tokens - len(ids) - 1))
        read = [ids[-1], *proposed]
        begun = time.perf_counter()
        choices = np.argmax(artifact.read(read, place), axis=1).tolist()
        passes += time.perf_counter() - begun
        kept = _agreeing(proposed, choices)
        ids += choices[: kept + 1]
        draft.forget(place)
        draft.feed(read, place)
        place += kept + 1
        artifact.forget(place)
        draft.forget(place)
        drafted.append(len(proposed))
        accepted.append(kept)
    spent = time.perf_counter() - ready
    return Answer(
        tuple(ids), 1000 * (ready - started), 1000 * spent, tuple(drafted), tuple(accepted), passes_ms=1000 * passes
    )


def _propose(draft: Model, token: int, position: int, count: int) -> list[int]:
    proposed: list[int] = []
    for place in range(position, position + count):
        draft.feed((token,), place)
        token = draft.greedy()
        proposed.append(token)
    return proposed


def _agreeing(proposed: Sequence[int], choices: Sequence[int]) -> int:
    """How many proposals are what the artifact chose at their place, up to the first that is not."""
    for place, token in enumerate(proposed):
        if choices[place] != token:
            return place
    return len(proposed)
