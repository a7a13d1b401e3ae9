"""What `--auto` decides, on a bench whose measurements are made up: every way it can end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from edgepack.auto import expect
from edgepack.auto.attempt import Attempt
from edgepack.auto.decide import MOST_TRIALS, decide
from edgepack.auto.variants import WHOLE, Variant
from edgepack.errors import BudgetError
from edgepack.measurement import Measurement, judge

DEPTHS = [Variant(1), Variant(2), Variant(3), Variant(ffn=1024)]


def plan(bits: float) -> Any:
    prediction = SimpleNamespace(artifact_bytes=int(bits * 1e6), bits_per_weight=bits, decode_tokens_per_s=100.0)
    return SimpleNamespace(quantize=f"{bits}bpw", prediction=prediction)


@dataclass
class Made:
    """A bench: `bits` and `lost` say what fits and what pruning costs, `measured` what a trial finds."""

    bits: dict[Variant, float | None]
    lost: dict[Variant, float]
    measured: dict[Variant, float]
    kld_limit: float | None = None
    slow: dict[Variant, bool] = field(default_factory=dict)
    settled: bool = False
    healed: dict[Variant, float] = field(default_factory=dict)
    tokens: int | None = 100_000
    trials: list[Variant] = field(default_factory=list)
    options: Any = None
    text_name: str = "text.txt"
    target: Any = field(default_factory=lambda: SimpleNamespace(name="board"))

    @property
    def trial_tokens(self) -> int:
        return 10_000

    def variants(self) -> list[Variant]:
        return [variant for variant in self.bits if variant != WHOLE]

    def planned(self, variant: Variant, prices: Any = None) -> Attempt:
        bits = self.bits[variant]
        lost = self.lost.get(variant, 0.0)
        return (
            Attempt(variant, None, "2 MB over the budget", lost)
            if bits is None
            else Attempt(variant, plan(bits), pruned_kld=lost)
        )

    def tried(self, attempt: Attempt, tokens: int | None = None) -> Attempt:
        self.trials.append(attempt.variant)
        value = (self.healed if tokens == self.tokens else self.measured)[attempt.variant]
        kld = judge(Measurement("mean_kld", value, "nats/token"), self.kld_limit and {"max": self.kld_limit})
        speed = judge(Measurement("ttft_ms_p90", 9.0 if self.slow.get(attempt.variant) else 1.0, "ms"), {"max": 5})
        return replace(attempt, rows=(kld, speed), layers=tuple(range(attempt.variant.depth)), healed_tokens=tokens)

    def learn(self, attempt: Attempt) -> bool:
        return False

    def scale(self, whole: Attempt) -> float:
        return 1.0

    def unbound(self, plan: Any) -> bool:
        return self.settled

    def prices(self) -> dict[str, Any]:
        return {}


def bench(whole_bits: float | None, **options: Any) -> Made:
    bits = {WHOLE: whole_bits, **dict(zip(DEPTHS, (5.0, 5.5, 6.0, 5.2), strict=True))}
    lost = dict(zip(DEPTHS, (0.114, 0.335, 0.644, 0.319), strict=True))
    measured = {WHOLE: 0.02, **dict(zip(DEPTHS, (0.08, 0.2, 0.4, 0.15), strict=True))}
    return Made(**{"bits": bits, "lost": lost, "measured": measured} | options)


def outcomes(decision: Any) -> dict[str, str]:
    return {row["variant"]: row["outcome"] for row in decision.record["candidates"]}


def test_where_nothing_binds_nothing_is_pruned_or_priced() -> None:
    made = bench(8.5, settled=True)
    decision = decide(made)
    assert decision.wish.prune is None and made.trials == [WHOLE]
    assert list(outcomes(decision)) == ["bits alone"]


def test_at_equal_bytes_the_whole_model_at_fewer_bits_is_kept_and_the_others_are_told_why() -> None:
    made = bench(4.5)
    decision = decide(made)
    assert decision.record["chosen"] == "bits alone" and made.trials == [WHOLE]
    assert all(
        "at best KLD" in words and "bits alone has 0.02" in words
        for name, words in outcomes(decision).items()
        if name != "bits alone"
    )


def test_at_the_low_end_a_pruned_model_wins_when_it_is_measured_to_be_closer() -> None:
    made = bench(2.6, measured={WHOLE: 0.55} | dict(zip(DEPTHS, (0.3, 0.25, 0.4, 0.45), strict=True)))
    decision = decide(made)
    assert decision.record["chosen"] == "depth=2"
    assert decision.wish.prune.layers == (0, 1) and decision.wish.heal == 100_000
    assert "tried: KLD 0.3, depth=2 has 0.25" in outcomes(decision)["depth=1"]


def test_a_pruned_model_that_loses_its_trial_is_not_taken() -> None:
    made = bench(2.6, measured={WHOLE: 0.2} | dict.fromkeys(DEPTHS, 0.21))
    decision = decide(made)
    assert decision.record["chosen"] == "bits alone" and set(made.trials) > {WHOLE}


def test_no_more_than_a_few_are_tried_and_the_most_promising_ones() -> None:
    made = bench(None, measured=dict.fromkeys(DEPTHS, 0.3))
    decide(made)
    assert made.trials == sorted(made.trials, key=DEPTHS.index) and len(made.trials) == MOST_TRIALS
    expected = {v: 0.5 * made.lost[v] + expect.rounding(made.bits[v]) for v in DEPTHS}
    assert set(made.trials) == set(sorted(DEPTHS, key=expected.__getitem__)[:MOST_TRIALS])


def test_where_the_whole_model_is_too_slow_a_pruned_one_is_chosen_although_it_is_further_from_the_source() -> None:
    decision = decide(bench(4.5, slow={WHOLE: True}))
    assert decision.record["chosen"] == "depth=1" and "bits alone can't meet" in decision.record["why"]
    assert "ttft_ms_p90 9 ms (at most 5)" in outcomes(decision)["bits alone"]


def test_a_budget_out_of_reach_is_refused_with_every_reason_and_without_a_trial() -> None:
    made = bench(None, kld_limit=0.01)
    with pytest.raises(BudgetError, match="bits alone: 2 MB over the budget") as refused:
        decide(made)
    assert "depth=1: KLD 0.0" in refused.value.message and "allowed is 0.01" in refused.value.message
    assert made.trials == [] and refused.value.exit_code == 3


def test_one_that_only_misses_the_divergence_is_healed_in_full_before_it_is_refused() -> None:
    made = bench(None, kld_limit=0.07, healed={Variant(1): 0.06, Variant(2): 0.1})
    decision = decide(made)
    assert decision.record["chosen"] == "depth=1" and made.trials[-1] == Variant(1)
    worse = bench(None, kld_limit=0.07, healed={Variant(1): 0.075})
    with pytest.raises(BudgetError, match=r"misses mean_kld 0\.075"):
        decide(worse)


def test_the_curve_of_rounding_falls_with_bits_and_passes_through_what_was_measured() -> None:
    values = [expect.rounding(bits / 10) for bits in range(26, 160)]
    assert values == sorted(values, reverse=True)
    assert expect.rounding(4.7, expect.scale_of(4.7, 0.3)) == pytest.approx(0.3)


def test_prices_of_layers_and_neurons_add_up_and_a_missing_one_is_no_price() -> None:
    prices = {"depth": {"1": {"mean_kld": 0.1}}, "ffn": {"1024": {"mean_kld": 0.3}}}
    assert expect.pruning(Variant(1, 1024), prices) == pytest.approx(0.4)
    assert expect.pruning(Variant(2), prices) is None and expect.pruning(WHOLE, prices) == 0
