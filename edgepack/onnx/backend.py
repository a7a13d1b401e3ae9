"""ONNX behind the pipeline: encoders for onnxruntime, decoders for ORT GenAI; the functions of `edgepack/backend.py`.

Which of the two a model is decides everything else, so this module only chooses; each side has its own steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepack.backend import Backend, Candidate, Described
from edgepack.errors import InputRefused
from edgepack.onnx import decoder_steps, encoder_steps

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target
    from edgepack.workshop import Exported, Workshop


def describe(source: Source, target: Target) -> Described:
    """What the checkpoint is: an encoder with a task, or a decoder that ORT GenAI knows.

    Raises:
        InputRefused: A GGUF, or a model neither side takes.
    """
    if source.kind == "gguf":
        raise InputRefused(
            f"{source.name}: ONNX is made from a checkpoint, not from a GGUF", hint="Give the model folder."
        )
    from edgepack.planning import is_encoder

    return _side(is_encoder(source)).describe(source, target)


def names(described: Described, target: Target) -> Sequence[str]:
    """Quantizations to choose from, best first."""
    return _side(described.embedding).names(described, target)


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """One quantization and what it is predicted to cost."""
    return _side(described.embedding).candidate(described, source, target, quantize)


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Write the artifact."""
    return _side(plan.embedding).export(shop, source, plan, stem)


def conform(shop: Workshop, source: Source, plan: Plan, exported: Exported) -> dict[str, Any]:
    """Token ids (and chats of decoders) against the source."""
    return _side(plan.embedding).conform(shop, source, plan, exported)


def samples(shop: Workshop, plan: Plan, exported: Exported) -> list[dict[str, Any]]:
    """Load the artifact in its runtime and keep what it says to fixed inputs."""
    return _side(plan.embedding).samples(shop, plan, exported)


def fidelity(
    shop: Workshop, source: Source, target: Target, artifact: Path, digest: str, text: Path, *, parameters: int
) -> dict[str, Any]:
    """Rows that hold the artifact against transformers in float32."""
    side = _side(not _is_decoder(artifact))
    return side.fidelity(shop, source, target, artifact, digest, text, parameters=parameters)


def latency(shop: Workshop, target: Target, artifact: Path, digest: str, context: int) -> dict[str, Any]:
    """Rows of speed and memory on this machine."""
    return _side(not _is_decoder(artifact)).latency(shop, target, artifact, digest, context)


def runtime(plan: Plan) -> dict[str, Any]:
    """Load options for `runtime.json`."""
    return _side(plan.embedding).runtime(plan)


def tokenizer(source: Source, exported: Exported) -> Mapping[str, bytes]:
    """Tokenizer or preprocessor files for an app; ORT GenAI keeps its own beside the model."""
    return _side(not _is_decoder(exported.path)).tokenizer(source, exported)


def recipe(exported: Exported) -> dict[str, Any]:
    """What came of the options, for the manifest."""
    return _side(not _is_decoder(exported.path)).recipe(exported)


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
