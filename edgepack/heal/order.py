"""Which windows every step reads: all of them once in each pass, each pass in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIKE = 8  # windows of similar lengths that are read together, where lengths differ
_POOL_STEPS = 16  # whose windows are sorted by length


class Order:
    """The order of a run, the same whenever it is asked for: a resumed run needs no state of it.

    Args:
        lengths: Tokens of every window.
        batch: Windows of a step, at most all.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = lengths, batch, seed

    def passes(self, step: int) -> int:
        """Passes over all windows that are complete before a step, counted from 0."""
        return step * self._batch // len(self._lengths)

    def places(self, step: int) -> list[int]:
        """Numbers of the windows of a step, the shortest first: little of each micro-batch is padding.

        A step may end one pass and begin the next.
        """
        count, first = len(self._lengths), step * self._batch
        found: list[int] = []
        for number in range(self.passes(step), (first + self._batch - 1) // count + 1):
            start = number * count
            found += self._of_pass(number)[max(0, first - start) : first + self._batch - start]
        return sorted(found, key=self._lengths.__getitem__)

    def _of_pass(self, number: int) -> list[int]:
        """All windows; where lengths differ, similar ones side by side, but steps mixed."""
        generator = torch.Generator().manual_seed(self._seed + number)
        order: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        if len(set(self._lengths)) == 1:
            return order
        found: list[int] = []
        pool_windows = _POOL_STEPS * self._batch
        for start in range(0, len(order), pool_windows):
            pool = sorted(order[start : start + pool_windows], key=self._lengths.__getitem__)
            groups = [pool[first : first + ALIKE] for first in range(0, len(pool), ALIKE)]
            found += [place for group in torch.randperm(len(groups), generator=generator) for place in groups[group]]
        return found
