"""Which type each tensor gets, when all of them together may take so many bytes.

Every tensor has some options, each with its bytes and its cost, the divergence it is predicted to cause; costs add up
(measured: predicted over measured divergence 0.98 to 1.08, docs/allocation.md). Three passes:

    greedy   start from the smallest options and buy, again and again, the step that saves most cost per byte
    fill     with what is left, the single change anywhere that saves most and still fits
    swaps    give one tensor less and another more where the two together save cost and fit

Greedy over the lower convex hulls is the Lagrangian solution (all steps above one exchange rate of cost for bytes);
fill and swaps close the gap that whole tensors leave. Source: Kellerer et al., "Knapsack Problems", 2004, section 11.2
(the multiple-choice knapsack problem); Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", 1988.

Knows nothing of models, formats or how costs were found.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edgepack.errors import BudgetError

_SWAP_ROUNDS = 50  # each lowers the cost; a hundred tensors settle in five


K = TypeVar("K")


@dataclass(frozen=True)
class Option(Generic[K]):
    """One way to store a tensor.

    Args:
        kind: What it is: the name of a tensor type, a format.
        nbytes: What the tensor takes so.
        cost: What it is predicted to cost, in nats per token.
    """

    kind: K
    nbytes: int
    cost: float


Options = Mapping[str, Sequence[Option[K]]]
Choice = dict[str, Option[K]]


def allocate(options: Options[K], budget: int) -> Choice[K]:
    """The least cost within a number of bytes.

    Args:
        options: Tensor -> its options, at least one each.
        budget: Bytes for all tensors.

    Returns:
        Tensor -> its option, in the order of `options`. Never over the budget.

    Raises:
        BudgetError: Even the smallest options take more.
    """
    least = sum(min(option.nbytes for option in choices) for choices in options.values())
    if least > budget:
        raise BudgetError(
            f"the tensors take {least:,} bytes in their smallest types, and {budget:,} are allowed",
            hint="Allow more bytes, or smaller types.",
        )
    chosen = _greedy({name: hull(choices) for name, choices in options.items()}, budget)
    for _ in range(_SWAP_ROUNDS):
        if not (_fill(options, chosen, budget) or _swap(options, chosen, budget)):
            break
    return {name: chosen[name] for name in options}


def total_bytes(chosen: Mapping[str, Option[K]]) -> int:
    """Bytes of a choice."""
    return sum(option.nbytes for option in chosen.values())


def total_cost(chosen: Mapping[str, Option[K]]) -> float:
    """Predicted cost of a choice."""
    return sum(option.cost for option in chosen.values())


def hull(choices: Sequence[Option[K]]) -> list[Option[K]]:
    """The options worth buying in steps: each next one costs more bytes, and saves less per byte than any before."""
    kept: list[Option[K]] = []
    for option in sorted(choices, key=lambda item: (item.nbytes, item.cost)):
        if kept and option.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _rate(kept[-2], kept[-1]) <= _rate(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _rate(low: Option[K], high: Option[K]) -> float:
    return (low.cost - high.cost) / (high.nbytes - low.nbytes)


def _greedy(hulls: Mapping[str, Sequence[Option[K]]], budget: int) -> Choice[K]:
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(steps[0].nbytes for steps in hulls.values())
    queue = [(-_rate(steps[0], steps[1]), name) for name, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        steps, here = hulls[name], at[name]
        price = steps[here + 1].nbytes - steps[here].nbytes
        if price > left:
            continue
        left -= price
        at[name] = here + 1
        if here + 2 < len(steps):
            heapq.heappush(queue, (-_rate(steps[here + 1], steps[here + 2]), name))
    return {name: hulls[name][place] for name, place in at.items()}


def _fill(options: Options[K], chosen: Choice[K], budget: int) -> bool:
    """Make the one change that saves most and fits; False when there is none."""
    left = budget - total_bytes(chosen)
    best, saved = None, 0.0
    for name, choices in options.items():
        now = chosen[name]
        for option in choices:
            if option.nbytes - now.nbytes <= left and now.cost - option.cost > saved:
                best, saved = (name, option), now.cost - option.cost
    if best is None:
        return False
    chosen[best[0]] = best[1]
    return True


def _swap(options: Options[K], chosen: Choice[K], budget: int) -> bool:
    """Make the best pair of changes: bytes given up at one tensor, spent at another; False when none saves."""
    left = budget - total_bytes(chosen)
    changes = [
        (option.nbytes - chosen[name].nbytes, option.cost - chosen[name].cost, name, option)
        for name, choices in options.items()
        for option in hull(choices)
        if option is not chosen[name]
    ]
    cheaper = [change for change in changes if change[0] < 0]
    better = sorted((change for change in changes if change[1] < 0), key=lambda change: change[1])
    best, saved = None, -1e-12 * max(total_cost(chosen), 1e-30)
    for freed in cheaper:
        for spent in better:
            if freed[1] + spent[1] >= saved:
                break  # the ones after save less
            if spent[2] != freed[2] and freed[0] + spent[0] <= left:
                best, saved = (freed, spent), freed[1] + spent[1]
                break
    if best is None:
        return False
    for _, _, name, option in best:
        chosen[name] = option
    return True
