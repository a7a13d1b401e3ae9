"""ONNX behind the pipeline: encoders for onnxruntime, decoders for ORT GenAI; the functions of `edgepack/backend.py`.

Which of the two a model is decides everything else, so this module only chooses; each side has its own steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepack.backend import Backend, Candidate, Described
from edgepack.errors import InputRefused, UsageError
from edgepack.events import step
from edgepack.gguf.size import is_size
from edgepack.onnx import app_files, decoder_steps, encoder_steps, providers
from edgepack.onnx.tasks import kind_of
from edgepack.worker import run
from edgepack.workshop import Exported, keyed

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target
    from edgepack.workshop import Workshop


def describe(source: Source, target: Target) -> Described:
    """What the checkpoint is: an encoder with a task, or a decoder that ORT GenAI knows.

    Raises:
        InputRefused: A GGUF, or a model neither side takes.
    """
    if source.kind == "gguf":
        raise InputRefused(
            f"{source.name}: ONNX is made from a checkpoint, not from a GGUF", hint="Give the model folder."
        )
    from edgepack.checkpoint import open_checkpoint
    from edgepack.planning import is_encoder

    encoder = is_encoder(source)
    found = _side(encoder).describe(source, target)
    if encoder:
        checkpoint = open_checkpoint(source.path)
        app_files.require_files(checkpoint, kind_of(checkpoint.config))
    return found


def names(described: Described, target: Target) -> Sequence[str]:
    """Quantizations to choose from, best first; one, where the profile names it."""
    if described.embedding and target.onnx.recipe:
        return (target.onnx.recipe,)
    return _side(described.embedding).names(described, target)


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """One quantization and what it is predicted to cost."""
    if is_size(quantize):
        raise UsageError(
            f"{quantize}: ONNX is quantized by recipe, not to a size",
            hint="Name one with --quantize; int4-mixed takes its size from --set onnx.bits_per_weight=N.",
        )
    return _side(described.embedding).candidate(described, source, target, quantize)


def filling(
    described: Described, source: Source, target: Target, fits: Callable[[Candidate], bool]
) -> tuple[Candidate | None, str | None]:
    """Nothing: a calibrated recipe has its size, and stands among the names."""
    return None, None


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Write the artifact.

    Raises:
        MissingError: The profile says that speed is measured on this machine, on a provider that is not here.
    """
    target = plan.target
    if target.device.is_this_machine and target.measure.latency:
        providers.require_for_speed(target)
    exported = _side(plan.embedding).export(shop, source, _without_sequence(source, plan), stem)
    return _with_ort(shop, plan, exported) if target.onnx.ort and plan.embedding else exported


def _with_ort(shop: Workshop, plan: Plan, exported: Exported) -> Exported:
    """The artifact with `model.ort` and its operator list beside it; both are counted in its size."""
    options = {"arch": plan.target.device.arch}
    with step(shop.listener, "ort", "model.ort for minimal builds", unit="steps") as handle:

        def make(folder: Path) -> None:
            arguments = options | {"model": str(exported.path), "files": list(exported.files), "folder": str(folder)}
            report = run("edgepack.onnx.ort_format:convert", arguments, what="conversion to .ort",
                         progress=handle.progress)  # fmt: skip
            (folder / "report.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")

        entry = shop.store.step("onnx-ort", keyed(options | {"artifact": exported.digest}), make)
        report = json.loads(entry.files["report.json"].path.read_text(encoding="utf-8"))
        handle.cached = entry.cached
        handle.outcome = f"model.ort  {report['bytes'] / 1e6:,.1f} MB, outputs within {report['max_abs_diff']:.1e}"
    files = tuple(sorted(file for file in entry.files if file != "report.json"))
    return Exported(entry, files, exported.main, dict(exported.report) | {"ort": report})


def _without_sequence(source: Source, plan: Plan) -> Plan:
    """The plan without the profile's length of texts where the model reads images; one the user set is refused."""
    from edgepack.checkpoint import open_checkpoint

    target = plan.target
    asked = any(pair.startswith("onnx.sequence=") for pair in target.overrides)
    if not plan.embedding or not target.onnx.sequence or asked:
        return plan
    if kind_of(open_checkpoint(source.path).config) == "text":
        return plan
    return replace(plan, target=replace(target, onnx=replace(target.onnx, sequence=None)))


def conform(shop: Workshop, source: Source, plan: Plan, exported: Exported) -> dict[str, Any]:
    """Token ids (and chats of decoders) against the source."""
    return _side(plan.embedding).conform(shop, source, plan, exported)


def samples(shop: Workshop, plan: Plan, exported: Exported) -> list[dict[str, Any]]:
    """Load the artifact in its runtime and keep what it says to fixed inputs."""
    here = replace(plan, target=providers.for_fidelity(plan.target)) if plan.embedding else plan
    return _side(plan.embedding).samples(shop, here, exported)


def fidelity(
    shop: Workshop, source: Source, target: Target, artifact: Path, digest: str, text: Path, *, parameters: int
) -> dict[str, Any]:
    """Rows that hold the artifact against transformers in float32."""
    if _is_decoder(artifact):
        return decoder_steps.fidelity(shop, source, target, artifact, digest, text, parameters=parameters)
    here = providers.for_fidelity(target)
    found = encoder_steps.fidelity(shop, source, here, artifact, digest, text, parameters=parameters)
    return found | {"rows": providers.with_note(found["rows"], target)}


def conversion(shop: Workshop, source: Source, target: Target, *, parameters: int) -> dict[str, Any]:
    """Nothing: the export compares what it writes with transformers."""
    return {}


def latency(shop: Workshop, target: Target, artifact: Path, digest: str, context: int) -> dict[str, Any]:
    """Rows of speed and memory on this machine.

    Raises:
        MissingError: The target's provider is not here.
    """
    providers.require_for_speed(target)
    return _side(not _is_decoder(artifact)).latency(shop, target, artifact, digest, context)


def runtime(plan: Plan, exported: Exported) -> dict[str, Any]:
    """Load options for `runtime.json`; of an encoder also what an app has to do before and after the graph."""
    from edgepack.checkpoint import open_checkpoint

    found = _side(plan.embedding).runtime(plan, exported)
    if not plan.embedding:
        return found
    checkpoint = open_checkpoint(plan.source.path)
    return found | app_files.runtime(checkpoint, plan.target, exported)


def tokenizer(source: Source, exported: Exported) -> Mapping[str, bytes]:
    """Tokenizer or preprocessor files for an app; ORT GenAI keeps its own beside the model."""
    return _side(not _is_decoder(exported.path)).tokenizer(source, exported)


def recipe(exported: Exported) -> dict[str, Any]:
    """What came of the options, for the manifest."""
    found = _side(not _is_decoder(exported.path)).recipe(exported)
    return found | ({"ort": exported.report["ort"]} if "ort" in exported.report else {})


def toolchain(exported: Exported) -> dict[str, Any]:
    """Versions of what wrote and runs the graph."""
    from importlib.metadata import version

    names = ("onnx", "onnxruntime", "onnxruntime-genai", "onnxscript")
    return {name: version(name) for name in names}


def _side(embedding: bool) -> Backend:
    return cast("Backend", encoder_steps if embedding else decoder_steps)


def _is_decoder(artifact: Path) -> bool:
    """ORT GenAI's configuration lies beside its graphs, and beside no other."""
    return (artifact.parent / "genai_config.json").is_file()
