"""A draft model for a finished artifact: made from its source, measured beside it, kept only where it is worth it.

    source -> prune -> quantize -> measure -> [heal -> quantize -> measure] -> in the package, or a reason

The draft has the tokens of the artifact and the source as its teacher; the artifact may be quantized or pruned in any
way. What is asked for decides how the draft is made, measurement whether it goes anywhere. It is measured before it is
healed: healing takes hours, and changes what is proposed but not what proposing costs. For GGUF: llama.cpp checks
drafted tokens itself. Every step keeps its result in the store; torch and llama.cpp are loaded in workers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused, UsageError
from edgepack.events import Event, step
from edgepack.measure.draft_worth import Elsewhere, Worth, hopeless, judge
from edgepack.package.layout import DRAFT_FOLDER
from edgepack.planning import is_encoder, load_backend, make_plan
from edgepack.predict import MB, RUNTIME_MB
from edgepack.worker import run
from edgepack.workshop import Exported, Workshop, sha256

if TYPE_CHECKING:
    from edgepack.draft_request import DraftRequest
    from edgepack.planning import Plan
    from edgepack.prune.request import Request
    from edgepack.source import Source
    from edgepack.store import Store
    from edgepack.targets import Target

# Twelve answers of 64 tokens bring the acceptance to a few percent and take as long as a few latency runs.
PROMPTS, TUNING_PROMPTS = 12, 4
PROMPT_TOKENS = ANSWER_TOKENS = 64
LENGTHS = (2, 4, 8)
# Of what a measurement gives, all that depends on the machine it was made on.
_OF_THIS_MACHINE = (
    "speed_up",
    "alone_tokens_per_s",
    "together_tokens_per_s",
    "draft_cost",
    "prompt_ms",
    "prompt_with_draft_ms",
)


@dataclass(frozen=True)
class Drafted:
    """What came of a draft model.

    Args:
        record: For the manifest's recipe: how it was made, what was measured, the verdict and its reason.
        exported: Its files; None where it does not go into the package.
        runtime: What `runtime.json` says of it; empty where it does not go into the package.
    """

    record: Mapping[str, Any]
    exported: Exported | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known_sha256(self) -> dict[str, str]:
        """Path in the package -> sha256."""
        if self.exported is None:
            return {}
        files = self.exported.entry.files
        return {f"{DRAFT_FOLDER}{name}": files[name].sha256 for name in self.exported.files}

    def place(self, store: Store, model: Path) -> None:
        """Put the files into a package that is being built; nothing where there are none.

        Args:
            store: That holds them; `settle` it after publishing, as for the artifact.
            model: The package's `model/`.
        """
        if self.exported is None:
            return
        folder = model.parent / DRAFT_FOLDER
        folder.mkdir()
        for name in self.exported.files:
            store.release(self.exported.entry, name, folder / name)

    def settle(self, store: Store) -> None:
        """After publishing, as for the artifact."""
        if self.exported is not None:
            store.settle(self.exported.entry)


def refuse_early(source: Source, request: DraftRequest, format: str) -> None:
    """Refuse from headers what no draft can be made for.

    Args:
        source: The model.
        request: The draft asked for.
        format: Of the artifact.

    Raises:
        InputRefused: A GGUF, an encoder, a model that can't be pruned.
        UsageError: Another format than GGUF, or numbers that don't fit the model.
    """
    from edgepack.prune.command import refuse_early as refuse_cut

    if source.kind == "gguf":
        raise InputRefused(
            f"{source.path.name}: a GGUF can't be made smaller, so there is no draft of it",
            hint="Build from the Hugging Face folder it was made from.",
        )
    if is_encoder(source):
        raise InputRefused(
            f"{source.name}: an encoder answers in one pass: a draft has nothing to propose", hint="Leave --draft out."
        )
    if format != "gguf":
        raise UsageError(
            f"--draft is for GGUF: llama.cpp checks drafted tokens, and this model becomes {format}",
            hint="Leave --draft out, or add --format gguf.",
        )
    refuse_cut(source, _cut(source, request))


def drafted(
    shop: Workshop, source: Source, exported: Exported, plan: Plan, request: DraftRequest, text: Path
) -> Drafted:
    """Make a draft model, measure it beside the artifact, and judge it.

    Args:
        shop: Where results are kept.
        source: What the artifact was made from, with the artifact's tokens and before anything else was pruned; hashed.
        exported: The artifact.
        plan: The artifact's.
        request: How the draft is made.
        text: Evaluation text; of the draft, only its length is chosen on it, on prompts that nothing is measured on.

    Raises:
        InputRefused, UsageError: As `refuse_early`.
        StepError, StorageError: A step failed.
    """
    from edgepack.prune.command import pruned_source

    refuse_early(source, request, plan.format)
    calibration = plan.target.quantize.calibration
    small, pruning = pruned_source(shop, source, _cut(source, request), calibration=calibration, evaluation=text)
    own_plan = make_plan(small, _for_draft(plan.target), format=plan.format, quantize=request.quantize)
    record = {"request": request.as_json(), "prune": _pruning(pruning), "parameters": own_plan.parameters}
    if broken := _broken_budget(plan, exported, own_plan):
        return Drafted(record | Worth(False, "budget", f"not worth it: {broken}").as_json())
    trial = _Trial(shop, exported, plan, own_plan, request, text)
    made, found = trial.run(small)
    worth = hopeless(found, trial.elsewhere) if request.heal else judge(found, trial.elsewhere)
    if worth is None:
        record["before_healing"] = {name: found[name] for name in ("length", "acceptance", "tokens_per_pass")}
        small, record["heal"] = _healed(shop, small, source, request.heal, calibration, text)
        made, found = trial.run(small)
        worth = judge(found, trial.elsewhere)
    shop.listener(Event("note", "draft", worth.words))
    shown = found if trial.elsewhere is None else _without_times(found)
    record |= {"bytes": made.size, "measured": shown} | worth.as_json()
    if not worth.worth:
        return Drafted(record)
    return Drafted(record | {"model": f"{DRAFT_FOLDER}{made.main}"}, made, _runtime(made, found["length"]))


def _cut(source: Source, request: DraftRequest) -> Request:
    """What is left out of the source, the default filled in."""
    from edgepack.checkpoint import open_checkpoint
    from edgepack.prune.anatomy import find_anatomy, sizes_of

    checkpoint = open_checkpoint(source.path)
    anatomy = find_anatomy(checkpoint)
    return request.cut(anatomy, sizes_of(checkpoint, anatomy))


def _for_draft(target: Target) -> Target:
    """The target without what was said of the artifact's tensors: the draft's have other numbers."""
    plain = replace(target.quantize, imatrix=None, calibration=None, refine=None, tensors={})
    return replace(target, quantize=plain)


def _broken_budget(plan: Plan, exported: Exported, own_plan: Plan) -> str | None:
    """The budget that artifact and draft together would break, in words."""
    limits = plan.target.limits()
    together = {
        "artifact_bytes": (exported.size + own_plan.prediction.artifact_bytes, MB, "MB on disk"),
        "peak_rss_mb": (plan.prediction.ram_mb + own_plan.prediction.ram_mb - RUNTIME_MB, 1, "MB of memory, predicted"),
    }
    for name, (need, unit, words) in together.items():
        most = limits.get(name, {}).get("max")
        if most is not None and need > most:
            return f"artifact and draft take {need / unit:,.1f} {words}, the budget is {most / unit:,.1f}"
    return None


def _healed(
    shop: Workshop, student: Source, teacher: Source, tokens: int, calibration: str | None, text: Path
) -> tuple[Source, dict[str, Any]]:
    from edgepack.heal.command import healed_source

    healed, report = healed_source(shop, student, teacher, tokens, calibration=calibration, evaluation=text)
    return healed, {key: value for key, value in report.items() if key not in ("cost", "held_out")}


def _pruning(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was left out, without scores."""
    return {"request": report["request"], "kept_layers": report["kept_layers"]}


@dataclass(frozen=True)
class _Trial:
    """Artifact and draft side by side in llama.cpp."""

    shop: Workshop
    exported: Exported
    plan: Plan
    own_plan: Plan
    request: DraftRequest
    text: Path

    @property
    def elsewhere(self) -> Elsewhere | None:
        """What is known of the target, where it is not this machine."""
        device = self.plan.target.device
        if device.is_this_machine:
            return None
        return Elsewhere(_predicted_cost(self.plan, self.own_plan), device.accelerator == "none")

    def run(self, small: Source) -> tuple[Exported, dict[str, Any]]:
        """Quantize a draft and measure it."""
        backend = load_backend(self.plan.format)
        made = backend.export(self.shop, small, self.own_plan, f"{small.name}-draft-{self.own_plan.quantize}")
        settings = self._settings()
        inputs = settings | {"artifact": self.exported.digest, "draft": made.digest, "text": sha256(self.text)}
        paths = {"artifact": str(self.exported.path), "draft": str(made.path), "text": str(self.text)}
        with step(self.shop.listener, "draft", f"{made.main} beside {self.exported.main}", unit="answers") as handle:
            found, handle.cached = self.shop.remember(
                "speculative",
                inputs,
                lambda: run(
                    "edgepack.measure.speculative:speculative",
                    settings | paths,
                    what="measurement of the draft model",
                    progress=handle.progress,
                ),
            )
            accepted = 100 * found["acceptance"]["value"]
            handle.outcome = f"{accepted:.0f} % of the drafted tokens accepted at {found['length']} per pass"
        return made, dict(found)

    def _settings(self) -> dict[str, Any]:
        half = self.plan.context // 2
        return {
            "lengths": [self.request.length] if self.request.length else list(LENGTHS),
            "prompts": PROMPTS,
            "tuning_prompts": TUNING_PROMPTS,
            "prompt_tokens": min(PROMPT_TOKENS, half),
            "tokens": min(ANSWER_TOKENS, half),
            "threads": self.shop.threads,
            "gpu_layers": 0 if self.elsewhere else self.plan.target.runtime.gpu_layers,
            "elsewhere": asdict(self.elsewhere) if self.elsewhere else None,
        }


def _predicted_cost(plan: Plan, own_plan: Plan) -> float | None:
    """Time of a token in the draft over that of one in the artifact, on the target."""
    speeds = plan.prediction.decode_tokens_per_s, own_plan.prediction.decode_tokens_per_s
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def _without_times(found: Mapping[str, Any]) -> dict[str, Any]:
    """What holds on every machine: times taken on this one say nothing of the target."""
    tried = [_without_times(row) for row in found.get("tried", ())]
    kept = {name: None if name in _OF_THIS_MACHINE else value for name, value in found.items()}
    return kept | ({"tried": tried} if "tried" in found else {})


def _runtime(draft: Exported, length: int) -> dict[str, Any]:
    """Of `runtime.json`: the draft, how many tokens it proposes, and what llama.cpp calls this kind of drafting."""
    return {"draft": {"model": f"{DRAFT_FOLDER}{draft.main}", "length": length, "type": "draft-simple"}}
