"""One candidate of an automatic plan: what it is predicted to be, what was measured of it, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepack.auto import expect
from edgepack.auto.variants import WHOLE, Variant
from edgepack.figures import significant

if TYPE_CHECKING:
    from edgepack.measurement import Measurement
    from edgepack.planning import Plan


@dataclass(frozen=True)
class Attempt:
    """A variant at the best quantization that fits the budgets.

    Args:
        variant: What is left out.
        plan: How it would be quantized; None where no quantization fits.
        obstacle: Why none fits, or why the variant can't be tried.
        pruned_kld: What leaving its parts out costs, nats per token; 0 for the whole model.
        scale: Of the rounding curve, see `expect.rounding`.
        rows: Measurements of the trial, judged; empty where it was not tried.
        layers: Layers that the trial left out.
        healed_tokens: Tokens that it was healed on.
        outcome: What became of it, as a sentence.
    """

    variant: Variant
    plan: Plan | None = None
    obstacle: str = ""
    pruned_kld: float | None = None
    scale: float = 1.0
    rows: tuple[Measurement, ...] = ()
    layers: tuple[int, ...] = ()
    healed_tokens: int | None = None
    outcome: str = ""

    @property
    def expected_kld(self) -> float | None:
        """With the share of healing that is usual."""
        return self._predicted(expect.EXPECTED_BACK)

    @property
    def best_kld(self) -> float | None:
        """With more healing than was ever seen: below this it can't come."""
        return self._predicted(expect.MOST_BACK)

    def _predicted(self, back: float) -> float | None:
        if self.plan is None or self.pruned_kld is None:
            return None
        return self.pruned_kld * (1 - back) + expect.rounding(self.plan.prediction.bits_per_weight, self.scale)

    @property
    def measured_kld(self) -> float | None:
        """Of the trial, on the judging text."""
        return self.value("mean_kld")

    @property
    def missed(self) -> tuple[Measurement, ...]:
        """Budgets that the trial missed."""
        return tuple(row for row in self.rows if row.verdict == "fail")

    def value(self, name: str) -> float | None:
        """A measured value of the trial."""
        return next((row.value for row in self.rows if row.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the plan."""
        prediction = None if self.plan is None else self.plan.prediction
        measured = {row.name: _short(row.value) for row in self.rows if row.name in _SHOWN and row.value is not None}
        pruned = self.variant != WHOLE
        return {
            "variant": self.variant.name,
            "quantize": None if self.plan is None else self.plan.quantize,
            "artifact_bytes": None if prediction is None else prediction.artifact_bytes,
            "bits_per_weight": None if prediction is None else round(prediction.bits_per_weight, 3),
            "predicted_decode_tokens_per_s": None if prediction is None else _short(prediction.decode_tokens_per_s),
            "pruned_kld": _short(self.pruned_kld) if pruned else None,
            "expected_kld": _short(self.expected_kld) if pruned else None,
            "best_kld": _short(self.best_kld) if pruned else None,
            "measured": measured,
            "layers": list(self.layers),
            "healed_tokens": self.healed_tokens if pruned else None,
            "outcome": self.outcome or self.obstacle,
        }


_SHOWN = ("mean_kld", "perplexity", "top1_agreement", "ttft_ms_p90", "decode_tokens_per_s_p10")


def _short(value: float | None) -> float | None:
    return None if value is None else significant(value, 4)
