"""One build, from a hashed source and a plan to a published package: the order of the steps, and what each hands on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import source_index, waterfall
from edgepack.events import Listener, step
from edgepack.measurement import Measurement
from edgepack.planning import load_backend
from edgepack.predict import MB
from edgepack.preparing import Prepared
from edgepack.store import Store
from edgepack.toolchain import versions
from edgepack.worker import side_by_side
from edgepack.workshop import Exported, Workshop, machine_facts, physical_cores, sha256

if TYPE_CHECKING:
    from edgepack.draft_request import DraftRequest
    from edgepack.drafting import Drafted
    from edgepack.package import Package
    from edgepack.planning import Plan
    from edgepack.source import Source


# What of the evidence says that the artifact is its source, in the order of the checks.
CONFORMANCE = ("tokens", "chat", "logits", "reference")
LICENCE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
LICENCE_BYTES = 1 << 20


class Build:
    """A build of one plan.

    Args:
        prepared: The input, and what was done to it before quantization.
        plan: What to build from `prepared.source`.
        text: Evaluation text.
        listener: Told about steps and progress.
        draft: A draft model to try for speculative decoding; None tries none.
    """

    def __init__(
        self, prepared: Prepared, plan: Plan, text: Path, listener: Listener, *, draft: DraftRequest | None = None
    ) -> None:
        self.prepared = prepared
        self.source = prepared.source
        self.plan = plan
        self.draft = draft
        self.text = text
        self.listener = listener
        threads = plan.target.runtime.threads if plan.target.device.is_this_machine else 0
        self.shop = Workshop(Store(), listener, threads or physical_cores(), evaluation=text)
        self.backend = load_backend(plan.format)

    def run(self, output: Path, *, force: bool) -> Package:
        """Run every step and publish the package at `output`.

        Raises:
            UsageError: `output` exists and `force` is not set.
            StepError: A step failed; nothing is at `output` that was not there before.
        """
        exported = self.backend.export(self.shop, self.source, self.plan, self._stem())
        (samples, evidence), conformance = side_by_side(
            lambda: (self.backend.samples(self.shop, self.plan, exported), self._compare(exported)),
            lambda: self.backend.conform(self.shop, self.source, self.plan, exported),
        )
        evidence |= self._time(exported, evidence["rows"])
        rows = self._judge(exported, evidence)
        drafted = self._drafted(exported)
        with step(self.listener, "package", str(output)) as handle:
            package = self._package(output, force, exported, conformance | evidence, rows, samples, drafted)
            handle.outcome = str(output)
        return package

    def _steps(self) -> list[str]:
        """Names of all steps that were run, in order: those of the plan between what came before and beside it."""
        before = [name for name, done in (("prune", self.prepared.pruning), ("heal", self.prepared.healing)) if done]
        own = list(self.plan.steps)
        drafts = ["draft"] if self.draft is not None else []
        return [*before, *own[:-1], *drafts, *own[-1:]]

    def _stem(self) -> str:
        return f"{self.source.name}-{self.plan.quantize}"

    def _compare(self, exported: Exported) -> dict[str, Any]:
        """Rows that hold the artifact against its source."""
        plan = self.plan
        if not plan.target.measure.fidelity:
            return {"rows": []}
        reference = self.prepared.reference
        parameters = plan.parameters if reference is self.source else parameters_of(reference)
        found = self.backend.fidelity(
            self.shop, reference, plan.target, exported.path, exported.digest, self.text, parameters=parameters
        )
        if reference is not self.source:
            # what it was held against is not what it was made from: that this was read rightly is a question of its own
            logits = self.backend.conversion(self.shop, self.source, plan.target, parameters=plan.parameters)
            found = dict(found) | ({"logits": logits} if logits else {})
        return {name: found[name] for name in ("rows", "logits", "reference", "machine", "details") if name in found}

    def _drafted(self, exported: Exported) -> Drafted | None:
        """A draft model of what the artifact was made from, judged beside it."""
        if self.draft is None:
            return None
        from edgepack import drafting

        return drafting.drafted(self.shop, self.prepared.reference, exported, self.plan, self.draft, self.text)

    def _time(self, exported: Exported, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The rows with those of speed and memory added, if this machine is the target; nothing runs beside it."""
        plan = self.plan
        if not (plan.target.measure.latency and plan.target.device.is_this_machine):
            return {"rows": rows}
        found = self.backend.latency(self.shop, plan.target, exported.path, exported.digest, plan.context)
        return {"rows": [*rows, *found["rows"]], "machine": found["machine"]}

    def _judge(self, exported: Exported, evidence: Mapping[str, Any]) -> list[Measurement]:
        from edgepack.judgement import judged

        exact = [
            Measurement("artifact_bytes", exported.size, "bytes").as_json(),
            Measurement("bits_per_weight", round(exported.report["bits_per_weight"], 4), "1").as_json(),
        ]
        prediction = self.plan.prediction
        predicted: dict[str, float] = {
            "artifact_bytes": prediction.artifact_bytes,
            "bits_per_weight": round(prediction.bits_per_weight, 4),
            "peak_rss_mb": round(prediction.ram_mb, 1),
        }
        if prediction.decode_tokens_per_s is not None:
            predicted["decode_tokens_per_s_p50"] = round(prediction.decode_tokens_per_s, 1)
        return judged([*exact, *evidence["rows"]], self.plan.target, predicted, embedding=self.plan.embedding)

    def _package(
        self,
        output: Path,
        force: bool,
        exported: Exported,
        evidence: Mapping[str, Any],
        rows: list[Measurement],
        samples: list[dict[str, Any]],
        drafted: Drafted | None,
    ) -> Package:
        from edgepack.package import read_package, write_package
        from edgepack.publish import publish

        plan, target, entry = self.plan, self.plan.target, exported.entry
        steps = self._waterfall(exported, rows)

        def place(folder: Path) -> None:
            for name in exported.files:
                self.shop.store.release(entry, name, folder / name)
            if drafted is not None:
                drafted.place(self.shop.store, folder)

        def write(folder: Path) -> None:
            write_package(
                folder,
                name=self.source.name,
                target=target,
                source=self.prepared.original,
                recipe=self._recipe(exported) | ({} if drafted is None else {"draft": dict(drafted.record)}),
                toolchain=versions() | self.backend.toolchain(exported),
                runtime=self.backend.runtime(plan, exported) | ({} if drafted is None else dict(drafted.runtime)),
                measurements=rows,
                measured_on=evidence.get("machine") or machine_facts(),
                plan=plan.as_json() | {"steps": self._steps()} | steps,
                artifact=place,
                tokenizer=self.backend.tokenizer(self.source, exported),
                samples=samples,
                details=evidence.get("details"),
                pictures=self._pictures(exported, rows) | steps,
                conformance={name: evidence[name] for name in CONFORMANCE if name in evidence},
                licences=licence_texts(self.source.path),
                known_sha256={f"model/{name}": entry.files[name].sha256 for name in exported.files}
                | ({} if drafted is None else drafted.known_sha256),
            )

        published = publish(write, output, force=force)
        self.shop.store.settle(entry)
        if drafted is not None:
            drafted.settle(self.shop.store)
        source_index.remember(self.shop.store, self.prepared.original)
        return read_package(published)

    def _pictures(self, exported: Exported, rows: list[Measurement]) -> dict[str, Any]:
        """The artifact beside the best preset of its size, where types were allocated."""
        allocation = exported.report.get("allocation")
        if not allocation:
            return {}
        kld = next((row for row in rows if row.name == "mean_kld"), None)
        chosen = {
            "label": self.plan.quantize,
            "kind": "allocated",
            "bytes": exported.size,
            "bits_per_weight": exported.report["bits_per_weight"],
            "mean_kld": kld.value if kld else None,
            "ci95": list(kld.ci95) if kld and kld.ci95 else None,
            "predicted_kld": allocation["predicted_kld"],
            "chosen": True,
        }
        runner_up = allocation.get("runner_up")
        preset = runner_up and {
            "label": runner_up["quantize"],
            "kind": "preset",
            "bytes": runner_up["artifact_bytes"],
            "predicted_kld": runner_up["predicted_kld"],
        }
        return {"points": [point for point in (chosen, preset) if point]}

    def _waterfall(self, exported: Exported, rows: list[Measurement]) -> dict[str, Any]:
        """The steps from source to artifact, where there were any before quantization."""
        steps = waterfall.rows(
            self.prepared,
            self.plan.target,
            quantize=self.plan.quantize,
            artifact_bytes=exported.size,
            kv_bytes=self.plan.prediction.kv_mb * MB,
            predicted_rate=self.plan.prediction.decode_tokens_per_s,
            measured={row.name: row.value for row in rows},
        )
        return {"waterfall": steps} if steps else {}

    def _recipe(self, exported: Exported) -> dict[str, Any]:
        """Every option that shaped the artifact, with what came of it for each tensor."""
        quantize = self.plan.target.quantize
        return (
            {
                "format": self.plan.format,
                "quantize": self.plan.quantize,
                "chosen_by": self.plan.chosen_by,
                "overrides": dict(quantize.tensors),
                "imatrix_sha256": sha256(quantize.imatrix) if quantize.imatrix else None,
                "allow_nonfinite": quantize.allow_nonfinite,
                "shard_mb": self.plan.target.delivery.shard_mb,
                "architecture": self.plan.architecture,
                "parameters": self.plan.parameters,
                "context": self.plan.context,
                "embedding": self.plan.embedding,
            }
            | waterfall.in_manifest(self.prepared)
            | ({} if self.plan.choice is None else {"auto": dict(self.plan.choice)})
            | self.backend.recipe(exported)
        )


def parameters_of(source: Source) -> int:
    """Weights of a model, from its headers."""
    from edgepack.checkpoint import open_checkpoint

    return open_checkpoint(source.path).parameters


def licence_texts(source: Path) -> dict[str, bytes]:
    """Licence files that lie beside the weights, by name."""
    if source.is_file():
        return {}
    found = sorted(path for path in source.iterdir() if path.name.upper().startswith(LICENCE_NAMES) and path.is_file())
    return {path.name: path.read_bytes() for path in found if path.stat().st_size <= LICENCE_BYTES}
