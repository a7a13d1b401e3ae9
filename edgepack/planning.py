"""From a source and a target to a plan: what will be built, what it is predicted to cost, or why it can't be.

Reads config, tokenizer and safetensors headers; never a weight. The quantization is the user's, the profile's, or the
best candidate of the profile whose prediction meets every budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from edgepack.backend import Backend, Candidate, Described
from edgepack.errors import BudgetError, UsageError
from edgepack.plugins import load
from edgepack.predict import MB, Prediction

if TYPE_CHECKING:
    from edgepack.source import Source
    from edgepack.targets import Target

ChosenBy = Literal["command line", "profile", "budgets"]


@dataclass(frozen=True)
class Miss:
    """A budget that the prediction does not meet.

    Args:
        budget: Measurement name the budget is on, for example `artifact_bytes`.
        predicted: What is predicted, in the measurement's unit.
        limit: What the budget allows.
    """

    budget: str
    predicted: float
    limit: float

    def sentence(self) -> str:
        """The miss in words, with by how much."""
        relation = "over" if self.predicted > self.limit else "under"
        gap = self._amount(abs(self.predicted - self.limit))
        return f"{self._amount(self.predicted)}, {gap} {relation} the budget"

    def _amount(self, value: float) -> str:
        if self.budget == "artifact_bytes":
            return f"{value / MB:,.1f} MB on disk"
        if self.budget == "peak_rss_mb":
            return f"{value:,.0f} MB of memory"
        return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.3g} tokens/s"


@dataclass(frozen=True)
class Plan:
    """What `build` will do.

    Args:
        source: The resolved input.
        target: The profile with every override applied.
        format: `gguf`.
        chosen: The quantization and its prediction.
        chosen_by: Who chose it.
        candidates: Every quantization that was considered, best first.
        architecture: llama.cpp's architecture name.
        parameters: Weights of the model.
        context: Tokens the key-value cache is sized for.
        embedding: True for a model that gives vectors or labels.
        steps: Names of the steps, in order.
        notes: What a user should know before it is built.
        choice: Of an automatic plan: every candidate and what became of it (`edgepack/auto`).
    """

    source: Source
    target: Target
    format: str
    chosen: Candidate
    chosen_by: ChosenBy
    candidates: tuple[Candidate, ...]
    architecture: str
    parameters: int
    context: int
    embedding: bool
    steps: tuple[str, ...]
    notes: tuple[str, ...] = ()
    choice: Mapping[str, Any] | None = None

    @property
    def quantize(self) -> str:
        """The chosen quantization."""
        return self.chosen.quantize

    @property
    def prediction(self) -> Prediction:
        """The chosen quantization's prediction."""
        return self.chosen.prediction

    def as_json(self) -> dict[str, Any]:
        """The document of `edgepack plan --json` and of `evidence/plan.json`; holds no path and no time."""
        return {
            "schema_version": 1,
            "model": self.source.id or self.source.name,
            "commit": self.source.commit,
            "target": self.target.name,
            "format": self.format,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "context": self.context,
            "quantize": self.quantize,
            "chosen_by": self.chosen_by,
            "feasible": not self.chosen.misses,
            "prediction": self.prediction.as_json(),
            "steps": list(self.steps),
            "notes": list(self.notes),
            "candidates": [candidate.as_json() for candidate in self.candidates],
            **({} if self.choice is None else {"auto": dict(self.choice)}),
        }


def make_plan(source: Source, target: Target, *, format: str | None = None, quantize: str | None = None) -> Plan:
    """Resolve everything before anything is done.

    Args:
        source: The resolved input.
        target: The profile, overrides applied.
        format: `gguf`; None takes the profile's choice.
        quantize: A preset; None takes the profile's default, and with `auto` the best candidate within the budgets.

    Returns:
        The plan. With an explicit `quantize` it may carry misses: the user asked for it, the build will say `fail`.

    Raises:
        BudgetError: No candidate meets the budgets; the message says by how much and what would fit.
        InputRefused: The model can't be described.
        UsageError: An unknown preset or format.
    """
    chosen_format = format or format_of(source, target)
    if target.quantize.refine and chosen_format != "gguf":
        raise UsageError(
            f"--refine trains the codes of a GGUF, and this model becomes {chosen_format}",
            hint="Leave --refine out, or add --format gguf.",
        )
    described = load_backend(chosen_format).describe(source, target)
    return plan_for(described, source, target, chosen_format, quantize)


def format_of(source: Source, target: Target) -> str:
    """The format that a profile gives a model of this kind."""
    return target.format.encoder if is_encoder(source) else target.format.decoder


def plan_for(described: Described, source: Source, target: Target, format: str, quantize: str | None) -> Plan:
    """Choose a quantization of a described model.

    Args:
        described: The model as the format's backend sees it, or a smaller one of its kind that does not exist yet.
        source: The resolved input.
        target: The profile, overrides applied.
        format: As `described`.
        quantize: As `make_plan`.

    Raises:
        BudgetError: No candidate meets the budgets; the message says by how much and what would fit.
        UsageError: An unknown preset.
    """
    from edgepack.targets import with_overrides

    backend = load_backend(format)
    target = with_overrides(target, described.defaults)
    asked = quantize or (None if target.quantize.default == "auto" else target.quantize.default)
    names = backend.names(described, target) if asked is None else (asked,)
    candidates = [_checked(backend.candidate(described, source, target, name), target) for name in names]
    feasible = [candidate for candidate in candidates if not candidate.misses]
    notes: tuple[str, ...] = ()
    if asked is None and feasible[:1] != candidates[:1]:
        filling, why_not = backend.filling(described, source, target, lambda found: not _checked(found, target).misses)
        if filling is not None:
            filling = _checked(filling, target)
            candidates, feasible = [filling, *candidates], [filling]
        notes = (why_not,) if why_not else ()
    if asked is None and not feasible:
        raise _nothing_fits(described, target, candidates)
    chosen = candidates[0] if asked else feasible[0]
    chosen_by: ChosenBy = "budgets" if asked is None else ("command line" if quantize else "profile")
    return Plan(
        source=source,
        target=target,
        format=format,
        chosen=chosen,
        chosen_by=chosen_by,
        candidates=tuple(candidates),
        architecture=described.architecture,
        parameters=described.parameters,
        context=described.context,
        embedding=described.embedding,
        steps=_steps(target),
        notes=notes + ((chosen.note,) if chosen.note else ()) + described.notes,
    )


def load_backend(format: str) -> Backend:
    """The module that serves a format.

    Raises:
        UsageError: No such format.
    """
    return cast("Backend", load("format", format))


def is_encoder(source: Source) -> bool:
    """True for a model that gives vectors or labels: judged by its class and its files, before a format is chosen."""
    if source.path.is_file():
        return False  # a GGUF stays one, whatever it holds
    from edgepack.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source.path)
    classes = checkpoint.config.get("architectures") or [""]
    generates = str(classes[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return not generates or (source.path / "modules.json").is_file()


def _checked(candidate: Candidate, target: Target) -> Candidate:
    return replace(candidate, misses=tuple(misses(candidate.prediction, target.limits())))


def misses(prediction: Prediction, limits: Mapping[str, Mapping[str, float]]) -> list[Miss]:
    """Budgets the prediction misses. Speed is a range: only a budget beyond its best end is a miss."""
    best_speed = prediction.decode_range[1] if prediction.decode_range else None
    predicted = {
        "artifact_bytes": float(prediction.artifact_bytes),
        "peak_rss_mb": prediction.ram_mb,
        "decode_tokens_per_s_p10": best_speed,
    }
    found = []
    for name, value in predicted.items():
        limit = limits.get(name)
        if limit is None or value is None:
            continue
        if value > limit.get("max", value):
            found.append(Miss(name, value, limit["max"]))
        if value < limit.get("min", value):
            found.append(Miss(name, value, limit["min"]))
    return found


def _nothing_fits(model: Described, target: Target, candidates: list[Candidate]) -> BudgetError:
    smallest = min(candidates, key=lambda candidate: candidate.prediction.artifact_bytes)
    misses = "; ".join(miss.sentence() for miss in smallest.misses)
    return BudgetError(
        f"no quantization of this model meets the budgets of {target.name}: "
        f"the smallest candidate, {smallest.quantize}, needs {misses}",
        hint=_what_would_fit(model, target, smallest),
    )


def _what_would_fit(model: Described, target: Target, smallest: Candidate) -> str:
    """Advice from the smallest candidate: a shorter context where the cache is at fault, else a smaller model."""
    advice = []
    by_name = {miss.budget: miss for miss in smallest.misses}
    memory = by_name.get("peak_rss_mb")
    if memory is not None:
        spare = smallest.prediction.kv_mb - (memory.predicted - memory.limit)
        context = model.context
        if spare > 0 and smallest.prediction.kv_mb > 0:
            shorter = int(context * spare / smallest.prediction.kv_mb) // 256 * 256
            if shorter >= 256:
                advice.append(f"--set runtime.context={shorter} would fit {smallest.quantize}")
    ratio = min((_room(miss) for miss in smallest.misses), default=1.0)
    if not advice:
        fitting = f"about {model.parameters * ratio / 1e6:,.1f}M parameters would fit"
        advice.append(
            f"at {smallest.prediction.bits_per_weight:.2f} bits per weight {fitting}, "
            f"this model has {model.parameters / 1e6:,.1f}M"
        )
    budgets = ", ".join(f"budget.{_budget_key(name)}" for name in by_name)
    return "; ".join(advice) + f"; or raise {budgets} with --set"


def _room(miss: Miss) -> float:
    return miss.limit / miss.predicted if miss.predicted > miss.limit else miss.predicted / miss.limit


def _budget_key(measurement: str) -> str:
    return {"artifact_bytes": "disk_mb", "peak_rss_mb": "ram_mb"}.get(measurement, measurement)


def _steps(target: Target) -> tuple[str, ...]:
    measured = {
        "fidelity": target.measure.fidelity,
        "latency": target.measure.latency and target.device.is_this_machine,
    }
    refine = ("refine",) if target.quantize.refine else ()
    return ("export", *refine, "conform", "samples", *(name for name, wanted in measured.items() if wanted), "package")
