"""A decoder as an ONNX package for ONNX Runtime GenAI: model.onnx, model.onnx.data, genai_config.json, tokenizer.

The builder of onnxruntime-genai draws the graph (`genai_builder.py`); every weight is then read from the checkpoint,
quantized and written at its final place, some rows at a time (`decoder_graph.py`, `weight_file.py`), so memory does
not grow with the model. Recipes are data. The bytes do not depend on the number of threads.

What a recipe with calibration does beyond that is in `decoder_calibration.py`. Does not measure: a finished package is
measured in the real runtime by `measure/onnx_fidelity.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.errors import InputRefused, UsageError
from edgepack.onnx.decoder_recipes import RECIPES, Recipe, check_options, check_recipe, memory_bytes, predicted_bytes
from edgepack.onnx.genai_builder import ARCHITECTURES, PROVIDERS, check_architecture, draw
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.onnx.decoder_graph import DecoderGraph, Matrix
    from edgepack.onnx.matmul_nbits import Format, Quantized
    from edgepack.onnx.weight_file import Slot

__all__ = [
    "ARCHITECTURES",
    "PROVIDERS",
    "RECIPES",
    "Recipe",
    "check_recipe",
    "export",
    "memory_bytes",
    "predicted_bytes",
]

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"


def export(
    *,
    model: str,
    folder: str,
    recipe: str,
    provider: str = "cpu",
    options: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a decoder package's model folder (worker function; a process of its own, see `genai_builder.py`).

    Args:
        model: Path of a checkpoint folder.
        folder: Where the files go; exists, without them.
        recipe: A key of `RECIPES`.
        provider: A key of `PROVIDERS`.
        options: `threads` (default 2); `context`: most tokens a generation may hold, default what the model was made
            for (the cache is allocated for it); with calibration: `bits_per_weight` (of the whole package, default
            5.1), `calibration` (path of a text, default the packaged one), `windows` of 512 tokens (default 64).
        progress: In weights written.

    Returns:
        `files`, `bytes`, `parameters`, `bits_per_weight` (8 x bytes of graph and data / parameters of the
        checkpoint), `bytes_by_part`, `formats` (matrix -> format), `weights_by_format`, `streamed`, `recipe`,
        `provider`, `builder` (version of onnxruntime-genai), with calibration also `calibration`.

    Raises:
        InputRefused: The checkpoint is unsafe, or of an architecture the builder lacks, or has NaN weights.
        UsageError: Recipe, provider or options that do not fit.
        MissingError: onnxruntime-genai is not installed.
        StorageError: The disk is full or refused.
    """
    chosen = check_recipe(recipe, provider)
    settings = check_options(options, chosen)
    checkpoint = open_checkpoint(Path(model))
    check_architecture(checkpoint)
    target = Path(folder)
    before = {path.name for path in target.iterdir()}
    try:
        result = _export(checkpoint, target, chosen, provider, settings, progress)
    except BaseException:
        for path in target.iterdir():
            if path.name not in before and path.is_file():
                path.unlink()
        raise
    names = sorted(path.name for path in target.iterdir() if path.name not in before)
    return {"files": names, **result}


def _export(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    provider: str,
    settings: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    import torch

    from edgepack.onnx.decoder_graph import matrices, replace, take_apart
    from edgepack.onnx.decoder_weights import Filling
    from edgepack.onnx.weight_file import create, lay_out, save_graph

    torch.set_num_threads(1)  # parallel over chunks of rows instead: small operations gain nothing from more
    with tempfile.TemporaryDirectory(prefix="edgepack-") as scratch:
        drawing = draw(checkpoint, folder, precision=recipe.precision, provider=provider, scratch=Path(scratch))
    _set_context(folder / CONFIG, settings["context"])
    graph = take_apart(drawing.model)
    found = matrices(graph)
    budget = int(settings["bits_per_weight"] * checkpoint.parameters / 8) - _rest(graph, found)
    if recipe.calibrated:
        chosen, ready, calibration = _calibrated(checkpoint, found, provider, settings, budget, drawing.deferred)
    else:
        chosen, ready, calibration = _by_recipe(found, recipe, provider), {}, None
    tensors, pairs = replace(graph, chosen, provider)
    slots, data_bytes = lay_out(tensors)
    with create(folder / DATA, data_bytes) as file, torch.no_grad():
        filling = Filling(file, slots, settings["threads"], progress)
        filling.plain(slots)
        for name, (matrix, form) in chosen.items():
            filling.quantized(matrix, form, pairs[name], ready.get(name))
        graph_bytes = save_graph(graph.proto, slots, folder / MODEL, DATA)
    sizes = _sizes(checkpoint, slots, chosen, graph_bytes, data_bytes)
    return {
        **sizes,
        "streamed": drawing.deferred,
        "recipe": recipe.name,
        "provider": provider,
        "builder": drawing.version,
        **({} if calibration is None else {"calibration": calibration}),
    }


def _set_context(path: Path, context: int | None) -> None:
    """Limit what a generation may hold: the runtime allocates the cache for `search.max_length` tokens."""
    config = json.loads(path.read_text(encoding="utf-8"))
    trained = int(config["model"]["context_length"])
    if context is not None:
        if context > trained:
            raise UsageError(f"context is {context} tokens, but the model was made for {trained}")
        config["search"]["max_length"] = context
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _by_recipe(found: Sequence[Matrix], recipe: Recipe, provider: str) -> dict[str, tuple[Matrix, Format]]:
    """The formats a recipe names, for the matrices that can be stored so; the others stay float."""
    from edgepack.onnx.decoder_graph import quantizable
    from edgepack.onnx.matmul_nbits import Format

    by_part = {"head": recipe.head, "embedding and head": recipe.head, "embedding": recipe.embedding}
    chosen = {}
    for matrix in found:
        named = by_part.get(matrix.part, recipe.body)
        form = None if named is None else Format(*named).fitted(matrix.width)
        if form is not None and quantizable(matrix, form, provider):
            chosen[matrix.name] = (matrix, form)
    return chosen


def _calibrated(
    checkpoint: Checkpoint,
    found: Sequence[Matrix],
    provider: str,
    settings: Mapping[str, Any],
    budget: int,
    deferred: bool,
) -> tuple[dict[str, tuple[Matrix, Format]], dict[str, Quantized], dict[str, Any] | None]:
    from edgepack.onnx.decoder_calibration import calibrated

    if not deferred:
        raise InputRefused(
            f"{checkpoint.path}: calibration needs weights under the names transformers gives them",
            hint="Use --quantize int4.",
        )
    return calibrated(checkpoint, found, provider, settings, budget)


def _rest(graph: DecoderGraph, found: Sequence[Matrix]) -> int:
    """Bytes of everything that is no matrix: graph, norms, rotary caches."""
    matrices = {matrix.name for matrix in found}
    read = {reader for matrix in found for reader in (matrix.product, matrix.lookup) if reader}
    names = {name for node in graph.proto.graph.node if node.name not in read for name in node.input}
    plain: int = sum(
        values.numel() * values.element_size()
        for name, (_, values) in graph.stored.items()
        if name in names and name not in matrices
    )
    # Each matrix adds two initializers, a node and a cast to the graph: about 600 bytes of names and numbers.
    return plain + int(graph.proto.ByteSize()) + 600 * len(found)


def _sizes(
    checkpoint: Checkpoint,
    slots: Sequence[Slot],
    chosen: Mapping[str, tuple[Matrix, Format]],
    graph_bytes: int,
    data_bytes: int,
) -> dict[str, Any]:
    """Where the bytes go."""
    parts: Counter[str] = Counter({"graph": graph_bytes})
    for slot in slots:
        if slot.offset is not None:
            parts[slot.stored.part] += slot.stored.nbytes
    weights: Counter[str] = Counter()
    for matrix, form in chosen.values():
        weights[form.name] += matrix.parameters
    return {
        "bytes": graph_bytes + data_bytes,
        "parameters": checkpoint.parameters,
        "bits_per_weight": 8 * (graph_bytes + data_bytes) / checkpoint.parameters,
        "bytes_by_part": dict(parts.most_common()),
        "formats": {name: form.name for name, (_, form) in sorted(chosen.items())},
        "weights_by_format": dict(weights.most_common()),
    }
