"""`--auto`: fewer bits, fewer layers or narrower ones? Predict, try the best few, keep what is measured to be closest.

The whole model comes first. Where some quantization of it meets every budget, measured, a pruned model is only tried if
it could be closer to the source at the same budgets; where none does, pruned ones are the only way. Every trial is a
real one: pruned, healed for a tenth of the tokens, quantized to fill the same budgets, measured in the runtime on text
that nothing was chosen on. A budget is never relaxed: where nothing meets all of them, it says what each lacks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepack.auto.attempt import Attempt
from edgepack.auto.trials import Bench
from edgepack.auto.variants import WHOLE
from edgepack.errors import BudgetError
from edgepack.preparing import Wish
from edgepack.prune.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_TRIALS = 3
_CORRECTIONS = 2  # rounds in which the plan learns how fast this machine really is


@dataclass(frozen=True)
class Decision:
    """What to build.

    Args:
        wish: What to prune, and how to heal it.
        record: Every candidate, why the winner won and the others lost: for the plan and the card.
    """

    wish: Wish
    record: dict[str, Any]


def decide(bench: Bench) -> Decision:
    """Choose between the model itself and smaller ones.

    Args:
        bench: Plans and tries candidates.

    Raises:
        BudgetError: Nothing meets the budgets; the message says what came nearest, and why the others lost.
    """
    whole = _whole(bench)
    others = [] if _settled(whole, bench) else _priced(bench, whole)
    others = _tried(bench, whole, others)
    if _best([whole, *others]) is None:
        others = _last_chance(bench, others)
    winner = _best([whole, *others])
    attempts = [_named(attempt, winner, whole) for attempt in (whole, *others)]
    record = {
        "chosen": winner.variant.name if winner else None,
        "why": _why(winner, attempts),
        "judged_on": f"the last tenth of {bench.text_name}",
        "trial_tokens": bench.trial_tokens,
        "tokens": bench.tokens,
        "candidates": [attempt.as_json() for attempt in attempts],
    }
    if winner is None:
        raise _refusal(bench, attempts)
    return Decision(_wish(bench, winner), record)


def _whole(bench: Bench) -> Attempt:
    """The model itself at the best bits, tried; planned anew where this machine is slower than was predicted."""
    attempt = bench.planned(WHOLE)
    for _ in range(_CORRECTIONS):
        if attempt.plan is None:
            break
        attempt = bench.tried(attempt)
        if not bench.learn(attempt):
            break
        attempt = bench.planned(WHOLE)
    return attempt


def _settled(whole: Attempt, bench: Bench) -> bool:
    """True where the whole model meets every budget with the largest candidate of the profile: nothing binds."""
    return whole.plan is not None and not whole.missed and bool(whole.rows) and bench.unbound(whole.plan)


def _priced(bench: Bench, whole: Attempt) -> list[Attempt]:
    """Every variant with its plan and its price; none where the model can't be pruned."""
    scale = bench.scale(whole)
    prices = bench.prices()
    return [replace(bench.planned(variant, prices), scale=scale) for variant in bench.variants()]


def _tried(bench: Bench, whole: Attempt, others: Sequence[Attempt]) -> list[Attempt]:
    """The others, the most promising of them tried."""
    limit = _limit(whole, bench.kld_limit)
    promising = sorted(
        (a for a in others if a.best_kld is not None and a.best_kld < limit), key=lambda a: a.expected_kld or 0.0
    )
    chosen = {attempt.variant for attempt in promising[:MOST_TRIALS]}
    return [bench.tried(attempt) if attempt.variant in chosen else attempt for attempt in others]


def _last_chance(bench: Bench, others: Sequence[Attempt]) -> list[Attempt]:
    """Where every trial misses a budget: all the tokens for the one that only misses the divergence, by the least."""
    near = [a for a in others if a.missed and all(row.name == "mean_kld" for row in a.missed)]
    if not near or bench.tokens is None or bench.tokens == bench.trial_tokens:
        return list(others)
    best = min(near, key=lambda attempt: attempt.measured_kld or 0.0)
    return [bench.tried(a, bench.tokens) if a is best else a for a in others]


def _limit(whole: Attempt, kld_limit: float | None) -> float:
    """What a pruned model must be able to come below: the budget, and the whole model where that meets the budgets."""
    limits = [] if kld_limit is None else [kld_limit]
    if _meets(whole) and whole.measured_kld is not None:
        limits.append(whole.measured_kld)
    return min(limits, default=float("inf"))


def _meets(attempt: Attempt) -> bool:
    return bool(attempt.rows) and not attempt.missed


def _best(attempts: Sequence[Attempt]) -> Attempt | None:
    """The trial that met every budget and is closest to the source; the whole model where it is as close."""
    met = [attempt for attempt in attempts if _meets(attempt)]
    return min(met, key=lambda attempt: attempt.measured_kld or 0.0, default=None)


def _named(attempt: Attempt, winner: Attempt | None, whole: Attempt) -> Attempt:
    """With a word on what became of it."""
    return replace(attempt, outcome=_outcome(attempt, winner, whole))


def _outcome(attempt: Attempt, winner: Attempt | None, whole: Attempt) -> str:
    if attempt is winner:
        return f"chosen: KLD {attempt.measured_kld:.4g} measured"
    if attempt.rows and attempt.missed:
        return "tried: misses " + "; ".join(_miss(row) for row in attempt.missed)
    if attempt.rows and winner is not None:
        return f"tried: KLD {attempt.measured_kld:.4g}, {winner.variant.name} has {winner.measured_kld:.4g}"
    if attempt.plan is None or attempt.best_kld is None:
        return attempt.obstacle
    against = whole.measured_kld if _meets(whole) else None
    if against is not None and attempt.best_kld >= against:
        return f"not tried: at best KLD {attempt.best_kld:.3g}, bits alone has {against:.3g}"
    return f"not tried: KLD {attempt.expected_kld:.3g} expected, others promised more"


def _miss(row: Any) -> str:
    side, limit = next(iter(row.budget.items()))
    return f"{row.name} {row.value:.4g} {row.unit} ({'at most' if side == 'max' else 'at least'} {limit:g})"


def _why(winner: Attempt | None, attempts: Sequence[Attempt]) -> str:
    if winner is None:
        return "nothing meets the budgets"
    tried = sum(bool(attempt.rows) for attempt in attempts)
    if winner.variant != WHOLE:
        whole = attempts[0]
        lost = "can't meet the budgets" if whole.missed or not whole.rows else "is further from the source"
        return f"bits alone {lost} ({whole.outcome}); of {tried} that were tried this one is closest to the source"
    if len(attempts) == 1:
        return "every budget is met by the best quantization on offer: there is nothing to buy by pruning"
    return f"no pruned model of {len(attempts) - 1} is closer to the source within the same budgets"


def _refusal(bench: Bench, attempts: Sequence[Attempt]) -> BudgetError:
    """Why nothing will do: the whole model, and the pruned ones that came nearest."""
    whole, *others = attempts
    tried = [attempt for attempt in others if attempt.rows]
    near = tried or sorted(others, key=lambda a: a.best_kld or float("inf"))[:MOST_TRIALS]
    reasons = [f"{a.variant.name}: {_short_of(a, bench.kld_limit)}" for a in (whole, *near)]
    more = len(others) - len(near)
    return BudgetError(
        f"--auto: nothing meets the budgets of {bench.target.name}: "
        + "; ".join(reasons)
        + (f"; and {more} more" if more > 0 else ""),
        hint="Raise the budget that is missed with --set, give --heal more tokens, or take a smaller model.",
    )


def _short_of(attempt: Attempt, kld_limit: float | None) -> str:
    if not attempt.rows and attempt.best_kld is not None and kld_limit is not None and attempt.best_kld >= kld_limit:
        return f"KLD {attempt.best_kld:.3g} at best, allowed is {kld_limit:g}"
    return attempt.outcome


def _wish(bench: Bench, winner: Attempt) -> Wish:
    """The winner as a build takes it: the layers that the trial chose, all the tokens."""
    if winner.variant == WHOLE:
        return Wish()
    request = winner.variant.request
    if winner.layers:
        request = Request(layers=winner.layers, ffn=winner.variant.ffn)
    return Wish(request, bench.tokens, bench.options)
