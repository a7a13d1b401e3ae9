"""Plans and trials of variants: what a candidate of `--auto` is predicted to be, and what it is measured to be.

A trial leaves everything in the store that the build after it needs: pruned folder, statistics, artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.auto import expect
from edgepack.auto.attempt import Attempt
from edgepack.auto.parts import Parts
from edgepack.auto.variants import WHOLE, Variant, shrunk, variants
from edgepack.errors import BudgetError, InputRefused, UsageError
from edgepack.events import step
from edgepack.figures import significant
from edgepack.preparing import Prepared, Wish, prepare, untouched

if TYPE_CHECKING:
    from edgepack.heal.command import Options
    from edgepack.measurement import Measurement
    from edgepack.planning import Plan
    from edgepack.prune.anatomy import Anatomy, Sizes
    from edgepack.source import Source
    from edgepack.targets import Target
    from edgepack.workshop import Workshop

_SPEED, _FIRST_TOKEN = "decode_tokens_per_s_p10", "ttft_ms_p90"
TRIAL_SHARE = 0.1  # of the tokens that the winner will be healed on
_PRICED_WINDOWS = 16  # half of them to choose on, half to price


@dataclass
class Bench:
    """Where candidates are planned and tried.

    Args:
        shop: Where results are kept.
        source: The whole model, hashed.
        target: The profile.
        text: Evaluation text: nothing is chosen by it.
        parts: Calibration text, and text to judge by.
        tokens: To heal the winner on; None heals nothing.
        options: How to heal.
        text_name: What the calibration text is called.
        quantize: The user's own choice; None fills the budgets.
    """

    shop: Workshop
    source: Source
    target: Target
    text: Path
    parts: Parts
    tokens: int | None
    options: Options
    text_name: str
    quantize: str | None = None
    _speed: float = 1.0  # measured over predicted tokens per second, learned from trials
    _first_token: tuple[float, float] | None = None  # measured ms, and the operations per token they were of
    _cache: dict[str, Any] = field(default_factory=dict)

    @property
    def trial_tokens(self) -> int | None:
        """Tokens that a trial is healed on."""
        from edgepack.heal.budget import LEAST_TOKENS

        return None if self.tokens is None else max(LEAST_TOKENS, int(self.tokens * TRIAL_SHARE))

    @property
    def kld_limit(self) -> float | None:
        """The budget on divergence, if the profile has one and it is measured."""
        return self.target.limits().get("mean_kld", {}).get("max")

    def variants(self) -> list[Variant]:
        """Smaller models that could be made; none where the model can't be pruned."""
        anatomy = self._anatomy()
        return [] if anatomy is None else variants(*anatomy)

    def planned(self, variant: Variant, prices: Mapping[str, Any] | None = None) -> Attempt:
        """A variant at the best quantization within the budgets.

        Args:
            variant: What is left out.
            prices: From `prices`; None for the whole model.
        """
        from edgepack.planning import plan_for

        lost = expect.pruning(variant, prices or {})
        if lost is None:
            return Attempt(variant, obstacle="not priced: its layers could not be chosen")
        described = self._described(variant)
        try:
            plan = plan_for(described, self.source, self._planning_target(), "gguf", self.quantize)
        except BudgetError as error:
            return Attempt(variant, None, error.message.partition(": ")[2] or error.message, lost)
        late = self._too_late(variant)
        if late or plan.chosen.misses:
            return Attempt(variant, None, late or "; ".join(miss.sentence() for miss in plan.chosen.misses), lost)
        return Attempt(variant, plan, pruned_kld=lost)

    def tried(self, attempt: Attempt, tokens: int | None = None) -> Attempt:
        """Make a candidate and measure it; what can't be made says why.

        Args:
            attempt: With a plan.
            tokens: To heal it on; None takes those of a trial.
        """
        tokens = tokens or self.trial_tokens
        try:
            prepared = self._prepared(attempt.variant, tokens)
            rows = self._measured(prepared)
        except (InputRefused, BudgetError) as error:
            return replace(attempt, plan=None, obstacle=error.message)
        gone = [
            document["removed"]["depth"]["layers"] for document in prepared.pruning if "depth" in document["removed"]
        ]
        return replace(attempt, rows=tuple(rows), layers=tuple(gone[0]) if gone else ())

    def learn(self, attempt: Attempt) -> bool:
        """Correct the predictions by what a trial of the whole model measured; True where plans change by it.

        Only of a target that is this machine; speed elsewhere stays predicted.
        """
        if attempt.plan is None or not self._times:
            return False
        predicted = attempt.plan.prediction.decode_tokens_per_s
        first, speed = attempt.value(_FIRST_TOKEN), attempt.value(_SPEED)
        if first is not None:
            self._first_token = (first, self._operations(attempt.variant))
        if speed is None or not predicted:
            return False
        self._speed = speed / predicted
        return any(row.name == _SPEED for row in attempt.missed)

    def scale(self, whole: Attempt) -> float:
        """How much more rounding costs this model than the one the curve is of."""
        if whole.plan is None or whole.measured_kld is None:
            return 1.0
        return expect.scale_of(whole.plan.prediction.bits_per_weight, whole.measured_kld)

    def unbound(self, plan: Plan) -> bool:
        """True where the profile's best candidate fits: no budget takes bits away."""
        best = self.target.quantize.candidates[:1]
        return self.quantize is not None or plan.quantize in best

    def prices(self) -> dict[str, Any]:
        """What leaving layers or neurons out costs, by number."""
        from edgepack.auto.variants import MOST_SHARE, widths
        from edgepack.calibrate.texts import resolve
        from edgepack.worker import run
        from edgepack.workshop import sha256

        anatomy = self._anatomy()
        if anatomy is None:
            return {"depth": {}, "ffn": {}}
        row, sizes = anatomy
        settings = {
            "depth": int(sizes.layers * MOST_SHARE) // row.period * row.period,
            "widths": widths(sizes),
            "windows": _PRICED_WINDOWS,
            "window_tokens": 512,
            "threads": self.shop.threads,
        }
        inputs = settings | {"model": self.source.files, "text": sha256(self.parts.training)}
        arguments = settings | {
            "model": str(self.source.path),
            "calibration": resolve(str(self.parts.training)).as_json(),
            "evaluation": str(self.text),
        }
        with step(self.shop.listener, "price", f"layers and neurons of {self.source.name}", unit="windows") as handle:
            found, handle.cached = self.shop.remember(
                "damage",
                inputs,
                lambda: run("edgepack.prune.damage:damage", arguments, what="pricing", progress=handle.progress),
            )
            first = next(iter(found["depth"].values()), None)
            handle.outcome = f"one layer less costs KLD {first['mean_kld']:.3g}" if first else "no layer can go"
        return dict(found)

    def prepared(self, wish: Wish) -> Prepared:
        """The model pruned and healed on the training part of the text."""
        return prepare(self.shop, self.source, wish, calibration=str(self.parts.training), evaluation=self.text)

    def plan_of(self, source: Source) -> Plan:
        """The best quantization of a finished candidate within the budgets, calibrated on the training part.

        Args:
            source: The model, or a smaller one made from it.
        """
        from edgepack.planning import make_plan

        plan = make_plan(source, self._planning_target(), format="gguf", quantize=self.quantize)
        return replace(plan, target=self._calibrating(plan.quantize))

    @property
    def _times(self) -> bool:
        return self.target.device.is_this_machine and self.target.measure.latency

    def _anatomy(self) -> tuple[Anatomy, Sizes] | None:
        from edgepack.checkpoint import open_checkpoint
        from edgepack.prune.anatomy import find_anatomy, sizes_of

        if "anatomy" not in self._cache:
            try:
                checkpoint = open_checkpoint(self.source.path)
                anatomy = find_anatomy(checkpoint)
                self._cache["anatomy"] = (anatomy, sizes_of(checkpoint, anatomy))
            except InputRefused:
                self._cache["anatomy"] = None
        found: tuple[Anatomy, Sizes] | None = self._cache["anatomy"]
        return found

    def _described(self, variant: Variant) -> Any:
        from edgepack.planning import load_backend

        if "described" not in self._cache:
            self._cache["described"] = load_backend("gguf").describe(self.source, self.target)
        whole = self._cache["described"]
        if variant == WHOLE:
            return whole
        anatomy = self._anatomy()
        if anatomy is None:
            raise ValueError(f"{variant.name}: {self.source.name} can't be pruned, and has no variants")
        model, imatrix = whole.model
        smaller = shrunk(model, variant, anatomy[1])
        return replace(whole, model=(smaller, imatrix), parameters=smaller.parameters)

    def _planning_target(self) -> Target:
        """The profile with its speed budget in the predictions' own measure."""
        from edgepack.targets import with_overrides

        limit = self.target.limits().get(_SPEED, {}).get("min")
        if limit is None or self._speed == 1.0:
            return self.target
        return with_overrides(self.target, [f"budget.{_SPEED}={limit / self._speed:.6g}"])

    def _too_late(self, variant: Variant) -> str:
        """Why the first token comes too late, by operations per token; empty where it does not or nobody knows."""
        limit = self.target.limits().get(_FIRST_TOKEN, {}).get("max")
        if limit is None or self._first_token is None:
            return ""
        milliseconds = self._first_token[0] * self._operations(variant) / self._first_token[1]
        return f"first token after about {milliseconds:.3g} ms, allowed {limit:g} ms" if milliseconds > limit else ""

    def _operations(self, variant: Variant) -> float:
        from edgepack.gguf.tuning import multiplied

        return float(2 * sum(tensor.parameters for tensor in multiplied(self._described(variant).model[0])))

    def _prepared(self, variant: Variant, tokens: int | None) -> Prepared:
        if variant == WHOLE:
            return untouched(self.source)
        return self.prepared(Wish(variant.request, tokens, self.options))

    def _calibrating(self, quantize: str) -> Target:
        """Calibration on the training part, where the quantization needs any or the user named a text."""
        from edgepack.gguf.size import is_size
        from edgepack.targets import with_overrides

        if not (quantize and is_size(quantize)) and self.target.quantize.calibration is None:
            return self.target
        return with_overrides(self.target, [f"quantize.calibration={self.parts.training}"])

    def _measured(self, prepared: Prepared) -> list[Measurement]:
        """Quantize what was made so that it fills the budgets, and measure that on the judging text."""
        from edgepack.building import parameters_of
        from edgepack.judgement import judged
        from edgepack.measurement import Measurement
        from edgepack.planning import load_backend

        plan = self.plan_of(prepared.source)
        backend = load_backend("gguf")
        exported = backend.export(self.shop, prepared.source, plan, f"{prepared.source.name}-{plan.quantize}")
        rows = [Measurement("artifact_bytes", exported.size, "bytes").as_json()]
        found = backend.fidelity(
            self.shop, prepared.reference, plan.target, exported.path, exported.digest, self.parts.judging,
            parameters=parameters_of(prepared.reference),
        )  # fmt: skip
        rows += found["rows"]
        if self._times:
            timed = backend.latency(self.shop, plan.target, exported.path, exported.digest, plan.context)
            rows += timed["rows"]
        return judged(rows, self.target, {}, embedding=False)


def refuse_unsuited(source: Source, target: Target, format: str) -> None:
    """Say before any work what `--auto` can't compare.

    Raises:
        UsageError: No language model, no Hugging Face folder, no GGUF to be made, an importance matrix of the whole
            model, fidelity not measured.
    """
    from edgepack.planning import is_encoder

    reason = None
    if source.kind == "gguf":
        reason = f"{source.name} is a GGUF, which can't be pruned"
    elif is_encoder(source):
        reason = f"{source.name} is an encoder: candidates are compared by next-token predictions"
    elif format != "gguf":
        reason = f"candidates are compared as GGUF, and this build makes {format}"
    elif target.quantize.imatrix:
        reason = "quantize.imatrix is of the whole model"
    elif not target.measure.fidelity:
        reason = "measure.fidelity is off, and candidates are compared by it"
    if reason:
        raise UsageError(f"--auto: {reason}", hint="Choose yourself: --quantize, --prune, --heal.")


def affordable_tokens(parameters: int, cores: int) -> int | None:
    """Tokens that healing on this machine manages in half an hour; None where that is too few to be worth it.

    Args:
        parameters: Of the model.
        cores: To compute with.
    """
    from edgepack.gguf.calibrated import AUTO_SECONDS, CORE_FLOPS

    operations = 8 * parameters  # per token: 2 forward and 4 backward in the student, 2 in the teacher
    tokens = min(_MOST_TOKENS, AUTO_SECONDS * cores * CORE_FLOPS / operations)
    if tokens < _LEAST_USEFUL_TOKENS:
        return None
    return int(significant(tokens, 1))


# Two million tokens are where the study's models had most of what they got back; below some tens of thousands training
# has not left its warm-up (docs/healing.md).
_MOST_TOKENS, _LEAST_USEFUL_TOKENS = 2_000_000, 50_000
