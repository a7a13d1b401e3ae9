"""The way from `--auto` to what is built: text split, tokens settled, candidates tried, the model made ready."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.events import Event
from edgepack.preparing import Prepared, Wish, untouched

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target
    from edgepack.workshop import Workshop


def decided(
    shop: Workshop,
    source: Source,
    target: Target,
    wish: Wish,
    text: Path,
    *,
    quantize: str | None,
) -> tuple[Prepared, Plan]:
    """Let `decide` choose, and bring the model into the state it chose.

    Args:
        shop: Where results are kept.
        source: The model, hashed; one that `refuse_unsuited` lets pass.
        target: The profile.
        wish: Tokens and options of healing; what to prune is decided here.
        text: Evaluation text: nothing is chosen by it.
        quantize: The user's own choice; None fills the budgets.

    Returns:
        The model made ready, and the plan to build it by, with every candidate in `choice`.

    Raises:
        BudgetError: Nothing meets the budgets.
    """
    from edgepack.auto.decide import decide
    from edgepack.auto.parts import parts
    from edgepack.auto.trials import Bench, affordable_tokens
    from edgepack.building import parameters_of
    from edgepack.calibrate.texts import resolve
    from edgepack.heal.command import Options

    tokens = wish.heal or affordable_tokens(parameters_of(source), shop.threads)
    calibration = target.quantize.calibration
    bench = Bench(
        shop=shop,
        source=source,
        target=target,
        text=text,
        parts=parts(shop, source.path, calibration),
        tokens=tokens,
        options=wish.options or Options(),
        text_name=resolve(calibration).origin,
        quantize=quantize,
    )
    decision = decide(bench)
    shop.listener(Event("note", "auto", f"{decision.record['chosen']}: {decision.record['why']}"))
    prepared = bench.prepared(decision.wish) if decision.wish.prune else untouched(source)
    return prepared, replace(bench.plan_of(prepared.source), choice=decision.record)
