"""Export an encoder to one float32 ONNX graph: traced, optimised, stripped, checked, and proved against transformers.

The graph takes what the model's tokenizer or image processor gives and returns what the task is asked for. The same
checkpoint, edgepack and toolchain give the same bytes, in whatever folder. Runs in a worker process only: it loads
torch, transformers and onnxruntime.

Sources: torch.onnx.export(dynamo=True) and torch.export of torch 2.13; onnx_ir for the graph in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import MissingError, StepError, UsageError
from edgepack.onnx.check import check_model
from edgepack.onnx.encoders import Encoder, image_size, load, traceable, tracing_inputs
from edgepack.onnx.optimise import fuse_attention, simplify
from edgepack.onnx.parity import compare
from edgepack.onnx.pooling import describe_sentences
from edgepack.onnx.strip import strip
from edgepack.onnx.tasks import kind_of, task_of, tasks_of
from edgepack.worker import Progress

MODEL = "model.onnx"
DATA = "model.onnx.data"
OPSET = 20  # the lowest with Gelu as one operator: onnxruntime 1.17 (February 2024) and later run it
# Weights up to this many bytes stay inside model.onnx: an app then ships, and may load from memory, a single file.
# Above, loading would hold them twice, once as protobuf; protobuf itself ends at 2 GiB.
SINGLE_FILE_BYTES = 256 << 20
_PACKAGES = ("torch", "transformers", "optimum", "onnx", "onnxscript", "onnxruntime")
_SMALL = 1024  # bytes of a tensor; shapes and axes take a few dozen
_STEPS = 5  # load, trace, optimise and strip, write and check, compare


def export(
    *,
    model: str,
    folder: str,
    task: str | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    fuse: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Export a checkpoint folder.

    Args:
        model: The checkpoint: config.json and safetensors, with `modules.json` for sentence-transformers.
        folder: An existing folder for the result.
        task: Name of the task; None: what the checkpoint was made for (`tasks.task_of`).
        batch: Rows of every input; None: any number.
        sequence: Tokens of every row; None: any number up to the model's limit. For images, `batch` fixes height and
            width to the model's own size as well: runtimes that need fixed shapes need all of them.
        fuse: One `com.microsoft::Attention` per layer where the model allows: 2 to 8 % faster on onnxruntime's CPU
            provider, but for static quantization and other providers the graph has to be of standard operators.
        progress: Called with (steps done, 5).

    Returns:
        `model`, `files`, `task`, `tasks` (all the checkpoint could be exported for), `inputs` and `outputs` (name,
        shape with names for free axes, dtype), `parameters`, `opset`, `operators` (name -> nodes), `fused`
        (attentions), `max_abs_diff` (to transformers), `compared` (shapes), `max_sequence`, `labels` (id -> label, of
        classifiers), `sentence` (max_sequence_length, lower_case, prompts, similarity: what an app has to do before the
        graph), `image` (height and width).

    Raises:
        InputRefused: Not an encoder, weights missing, steps that can't be kept, the exporter has no way for the model.
        MissingError: A package is not installed.
        UsageError: The task is unknown or the checkpoint has no head for it; a size that makes no sense.
        ConformanceError: The graph computes something else than transformers.
        StepError: The exporter failed.
    """
    _need_packages()
    checkpoint = open_checkpoint(Path(model))
    chosen = task_of(checkpoint.config, checkpoint.path, task)
    steps = iter(range(1, _STEPS + 1))
    with _quiet():
        encoder = load(checkpoint, chosen)
        fixed = _fixed(encoder, batch, sequence, checkpoint)
        progress(next(steps), _STEPS)
        graph = _trace(encoder, fixed)
        progress(next(steps), _STEPS)
        strip(graph)
        simplify(graph)
        fused = fuse_attention(graph) if fuse else 0
        progress(next(steps), _STEPS)
        files = _write(graph, Path(folder))
        ports = {"inputs": _ports(graph.graph.inputs), "outputs": _ports(graph.graph.outputs)}
        operators = _operators(graph)
        del graph
        progress(next(steps), _STEPS)
        parity = compare(encoder, Path(folder) / MODEL, fixed)
        progress(next(steps), _STEPS)
    return {
        "model": MODEL,
        "files": files,
        "task": chosen.name,
        "tasks": list(tasks_of(checkpoint.config, checkpoint.path)),
        **ports,
        "parameters": encoder.parameters,
        "opset": OPSET,
        "operators": operators,
        "fused": fused,
        "max_abs_diff": parity["max_abs_diff"],
        "compared": parity["shapes"],
        "max_sequence": fixed.get("sequence", encoder.max_sequence),
        "labels": labels(encoder),
        "sentence": describe_sentences(checkpoint) if encoder.steps else None,
        "image": list(image_size(checkpoint, encoder.config)) if kind_of(checkpoint.config) == "image" else None,
    }


def _need_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(
            f"exporting to ONNX needs {', '.join(missing)}, not installed in this environment",
            hint=f"pip install {' '.join(missing)}",
        )


def labels(encoder: Encoder) -> dict[str, str] | None:
    """Names of the classes by index, of a classifier; None otherwise."""
    if not encoder.task.name.endswith("-classification"):
        return None
    return {str(index): str(name) for index, name in sorted(encoder.config.id2label.items())}


def _fixed(encoder: Encoder, batch: int | None, sequence: int | None, checkpoint: Any) -> dict[str, int]:
    """Axis -> length, of the axes the user fixed."""
    axes = {axis for shape in encoder.inputs.values() for axis in shape if isinstance(axis, str)}
    limit = encoder.max_sequence
    if sequence is not None and "pixel_values" in encoder.inputs:
        raise UsageError(f"sequence = {sequence}: {encoder.task.name} reads images, which have no sequence")
    for name, length in (("batch", batch), ("sequence", sequence)):
        if length is not None and length < 1:
            raise UsageError(f"{name} = {length}: expected 1 or more")
    if sequence is not None and limit is not None and sequence > limit:
        raise UsageError(f"sequence = {sequence}: the model has positions for {limit} tokens")
    fixed = {axis: length for axis, length in (("batch", batch), ("sequence", sequence)) if length is not None}
    if "height" in axes and batch is not None:
        fixed |= dict(zip(("height", "width"), image_size(checkpoint, encoder.config), strict=True))
    return fixed


def _trace(encoder: Encoder, fixed: Mapping[str, int]) -> Any:
    """The graph as an `onnx_ir.Model`, with a symbolic axis for every one that is not fixed."""
    import torch

    names = list(encoder.inputs)
    free = {
        axis: torch.export.Dim(axis, min=1)
        for axis in ("batch", "sequence", "height", "width")
        if axis not in fixed and any(axis in shape for shape in encoder.inputs.values())
    }
    shapes = tuple(
        {index: free[axis] for index, axis in enumerate(encoder.inputs[name]) if axis in free} for name in names
    )
    try:
        program = torch.onnx.export(
            traceable(encoder, exact=False),
            tracing_inputs(encoder, fixed),
            dynamo=True,
            dynamic_shapes={"tensors": shapes} if free else None,
            input_names=names,
            output_names=list(encoder.task.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise StepError(
            f"{type(encoder.model).__name__}: torch can't export it with {', '.join(free) or 'no'} free: {reason}",
            hint="Fixed shapes may work: give batch and sequence.",
        ) from error
    for name, value in zip(names, program.model.graph.inputs, strict=True):
        axes = zip(encoder.inputs[name], value.shape, strict=True)
        frozen = [str(axis) for axis, length in axes if axis in free and isinstance(length, int)]
        if frozen:  # torch falls back to another way of tracing, which may drop what was asked for
            raise StepError(
                f"{type(encoder.model).__name__}: torch made {', '.join(frozen)} of {name} a constant",
                hint="The model computes with that length in Python; fixed shapes may work: give batch and sequence.",
            )
    return program.model


def _write(graph: Any, folder: Path) -> list[str]:
    """Write model.onnx, with model.onnx.data beside it for large models, and check it.

    Returns:
        Names of the files.
    """
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    external = weights > SINGLE_FILE_BYTES
    if external:
        # Small constants stay: shape inference reads them, and only from the graph.
        graph = onnx_ir.external_data.unload_from_model(graph, folder, DATA, size_threshold_bytes=_SMALL)
    proto = onnx_ir.to_proto(graph)
    # onnx_ir notes the shape of initializers a second time; after a quantizer has transposed one, that is a lie, and
    # shape inference stops. The shapes of computed values stay: onnxruntime fuses Add and LayerNormalization by them.
    stored = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    (folder / MODEL).write_bytes(proto.SerializeToString(deterministic=True))
    del proto
    check_model(folder / MODEL)
    return [MODEL, DATA] if external else [MODEL]


def _ports(values: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": value.name,
            "shape": [axis if isinstance(axis, int) else str(axis) for axis in value.shape],
            "dtype": value.dtype.numpy().name,
        }
        for value in values
    ]


def _operators(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.graph:
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks to its own developers: deprecations inside it, axes with the same name, torchvision."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            exporter.setLevel(level)
