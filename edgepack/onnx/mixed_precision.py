"""Which format each matrix gets, when all of them together may take so many bytes.

Every matrix has some formats, each with its bytes and its cost: the divergence it is predicted to cause; costs add up.
Start from the smallest of each and buy the upgrade that lowers the cost most per byte, as long as bytes are left. Only
formats on the lower convex hull of a matrix are ever bought, so the choice is optimal but for the last purchase.
Source: greedy of the multiple-choice knapsack problem, Kellerer et al., "Knapsack Problems", 2004, section 11.2.

Knows nothing of models.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edgepack.errors import BudgetError

F = TypeVar("F")


@dataclass(frozen=True)
class Choice(Generic[F]):
    """One format of a matrix.

    Args:
        form: The format.
        nbytes: What the matrix takes in it.
        cost: What it is predicted to cost.
    """

    form: F
    nbytes: int
    cost: float


def choose(options: Mapping[str, Sequence[Choice[F]]], budget: int) -> dict[str, Choice[F]]:
    """The choices with the least cost within a number of bytes.

    Args:
        options: Matrix name -> its formats, at least one.
        budget: Bytes for all matrices.

    Raises:
        BudgetError: Even the smallest formats take more.
    """
    hulls = {name: hull(choices) for name, choices in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(steps[0].nbytes for steps in hulls.values())
    if left < 0:
        raise BudgetError(
            f"the matrices take {budget - left:,} bytes in their smallest formats, and {budget:,} are allowed",
            hint="Allow more bits per weight.",
        )
    queue = [(-_gain(steps[0], steps[1]), name) for name, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        steps, at = hulls[name], chosen[name]
        price = steps[at + 1].nbytes - steps[at].nbytes
        if price > left:
            continue
        left -= price
        chosen[name] = at + 1
        if at + 2 < len(steps):
            heapq.heappush(queue, (-_gain(steps[at + 1], steps[at + 2]), name))
    return {name: hulls[name][at] for name, at in chosen.items()}


def hull(choices: Sequence[Choice[F]]) -> list[Choice[F]]:
    """The choices worth buying: each next one costs more bytes, and less per byte than any before it."""
    kept: list[Choice[F]] = []
    for choice in sorted(choices, key=lambda item: (item.nbytes, item.cost)):
        if kept and choice.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _gain(low: Choice[F], high: Choice[F]) -> float:
    return (low.cost - high.cost) / (high.nbytes - low.nbytes)
