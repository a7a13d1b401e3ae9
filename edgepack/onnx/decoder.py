"""A decoder as an ONNX package for ONNX Runtime GenAI: model.onnx, model.onnx.data, genai_config.json, tokenizer.

The builder of onnxruntime-genai draws the graph (`genai_builder.py`); every weight is then read from the checkpoint,
quantized and written at its final place, some rows at a time (`decoder_graph.py`, `weight_file.py`), so memory does
not grow with the model. Recipes are data. The bytes do not depend on the number of threads.

What a recipe with calibration does beyond that is in `decoder_calibration.py`. Does not measure: a finished package is
measured in the real runtime by `measure/onnx_fidelity.py`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.errors import InputRefused, UsageError
from edgepack.onnx.genai_builder import ARCHITECTURES, PROVIDERS, check_architecture, draw
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.onnx.decoder_graph import DecoderGraph, Matrix, Stored
    from edgepack.onnx.matmul_nbits import Format, Quantized
    from edgepack.onnx.weight_file import Slot, WeightFile

__all__ = ["ARCHITECTURES", "PROVIDERS", "RECIPES", "Recipe", "check_recipe", "export", "memory_bytes"]

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"

# Formats are (bits, weights per scale). Blocks of 32 and symmetric codes are what every CPU kernel takes, KleidiAI's
# on ARM included; 8 bits lose next to nothing at any block size, and larger blocks are smaller and faster.
_INT4, _INT8 = (4, 32), (8, 128)


@dataclass(frozen=True)
class Recipe:
    """One way to store a decoder.

    Args:
        name: As users write it.
        summary: One line for help and the card.
        precision: What the builder is asked for; it decides the type of activations on each provider.
        body: Format of the matrices in the layers; None for float.
        head: Format of the output matrix, which the embedding shares when tied.
        embedding: Format of an embedding of its own.
        calibrated: Whether formats and codes are chosen with a calibration text.
    """

    name: str
    summary: str
    precision: str
    body: tuple[int, int] | None
    head: tuple[int, int] | None
    embedding: tuple[int, int] | None
    calibrated: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("int4", "4 bits, output matrix 8 bits; no calibration", "int4", _INT4, _INT8, _INT4),
            Recipe("int4-small", "4 bits throughout; no calibration", "int4", _INT4, _INT4, _INT4),
            Recipe(
                "int4-mixed",
                "4 and 8 bits by what each matrix costs on a calibration text, with error feedback",
                "int4",
                _INT4,
                _INT8,
                _INT4,
                calibrated=True,
            ),
            Recipe("int8", "8 bits throughout; no calibration", "int8", _INT8, _INT8, _INT8),
            Recipe("fp16", "float16, for GPUs", "fp16", None, None, None),
            Recipe("fp32", "float32", "fp32", None, None, None),
        )
    }
)

_OPTIONS = {"threads", "context", "bits_per_weight", "calibration", "windows"}
_CHUNK_WEIGHTS = 1 << 20  # read, quantized and written at a time by each thread: 4 MB of float32
# Resident memory, measured on Linux with torch 2.13 and onnxruntime-genai 0.18 (docs/onnx-decoders.md): imports and
# graph, and the temporaries of one thread.
_IMPORTS_BYTES, _CHUNK_BYTES = 450 << 20, 64 << 20


def memory_bytes(parameters: int, recipe: str, *, largest: int = 0, threads: int = 2) -> int:
    """Resident memory an export is predicted to need at its peak.

    Args:
        parameters: Of the model.
        recipe: A key of `RECIPES`.
        largest: Weights of the largest matrix that must be computed whole (joined query, key and value; an output
            matrix that is not stored as it is used); 0: small beside the rest.
        threads: Worker threads.

    Raises:
        UsageError: Unknown recipe.
    """
    chosen = _recipe(recipe)
    streamed = _IMPORTS_BYTES + threads * _CHUNK_BYTES + 12 * largest
    return streamed + (_calibration_bytes(parameters) if chosen.calibrated else 0)


def _calibration_bytes(parameters: int) -> int:
    # float32 weights in transformers, activations of one window with their gradients, second moments of the inputs.
    return 4 * parameters + parameters + (600 << 20)


def check_recipe(recipe: str, provider: str) -> Recipe:
    """The recipe, if the provider can run what it makes.

    Raises:
        UsageError: Unknown recipe or provider, float16 on CPU, a combination that has no operators.
    """
    chosen = _recipe(recipe)
    if provider not in PROVIDERS:
        raise UsageError(f"provider {provider!r} is unknown; expected one of {', '.join(PROVIDERS)}")
    if recipe == "fp16" and provider == "cpu":
        raise UsageError(
            "fp16 decoders do not run on CPU: onnxruntime-genai fails on their cache, and its maintainers do not "
            "support them (onnxruntime-genai #1098)",
            hint="Use int8 or int4 on CPU, or fp32.",
        )
    if recipe == "fp32" and provider != "cpu":
        raise UsageError(f"fp32 decoders are for cpu; {provider} runs float16", hint="Use fp16, int8 or int4.")
    if provider == "NvTensorRtRtx" and recipe in ("int8", "int4", "int4-mixed"):
        raise UsageError(
            f"{recipe} holds 8-bit matrices, and NvTensorRtRtx takes 4-bit ones only (DequantizeLinear)",
            hint="Use int4-small or fp16.",
        )
    return chosen


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"decoder recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


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
            for (the cache is allocated for it); with calibration: `bits_per_weight` (size of the matrices, default
            5.0), `calibration` (path of a text, default the packaged one), `windows` of 512 tokens (default 32).
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
    settings = _settings(options, chosen)
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
    from edgepack.onnx.weight_file import create, lay_out, save_graph

    torch.set_num_threads(1)  # parallel over chunks of rows instead: small operations gain nothing from more
    with tempfile.TemporaryDirectory(prefix="edgepack-") as scratch:
        drawing = draw(checkpoint, folder, precision=recipe.precision, provider=provider, scratch=Path(scratch))
    _set_context(folder / CONFIG, settings["context"])
    graph = take_apart(drawing.model)
    found = matrices(graph)
    chosen, ready, calibration = _choose(checkpoint, found, recipe, provider, settings, drawing.deferred, _rest(graph, found))
    tensors, pairs = replace(graph, chosen, provider)
    slots, data_bytes = lay_out(tensors)
    with create(folder / DATA, data_bytes) as file:
        offsets = {slot.stored.name: slot.offset for slot in slots}
        jobs = _Writing(file, offsets, settings["threads"], progress, sum(_weights(slot.stored) for slot in slots))
        jobs.plain(slots)
        for name, (matrix, form) in chosen.items():
            jobs.quantized(matrix, form, pairs[name], ready.get(name))
        graph_bytes = save_graph(graph.proto, slots, folder / MODEL, DATA)
    return _report(checkpoint, recipe, provider, drawing, slots, chosen, graph_bytes + data_bytes, graph_bytes) | (
        {"calibration": calibration} if calibration else {}
    )


def _settings(options: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The options with their defaults, checked."""
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise UsageError(f"decoder option {unknown[0]!r} is unknown; expected one of {', '.join(sorted(_OPTIONS))}")
    settings = {"threads": 2, "context": None, "bits_per_weight": 5.0, "calibration": None, "windows": 32} | options
    for name, low, high in (("threads", 1, 1024), ("windows", 2, 4096), ("context", 1, 1 << 24)):
        value = settings[name]
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise UsageError(f"decoder option {name} is {value!r}, expected a whole number from {low} to {high}")
    bits = settings["bits_per_weight"]
    if type(bits) not in (int, float) or not 4.5 <= bits <= 8.5:
        raise UsageError(f"decoder option bits_per_weight is {bits!r}, expected 4.5 to 8.5, scales included")
    if not recipe.calibrated and (given := {"bits_per_weight", "calibration", "windows"} & set(options)):
        raise UsageError(
            f"decoder option {sorted(given)[0]} belongs to int4-mixed; {recipe.name} does not calibrate",
            hint="Use --quantize int4-mixed.",
        )
    return settings


def _set_context(path: Path, context: int | None) -> None:
    """Limit what a generation may hold: the runtime allocates the cache for `search.max_length` tokens."""
    config = json.loads(path.read_text(encoding="utf-8"))
    trained = int(config["model"]["context_length"])
    if context is not None:
        if context > trained:
            raise UsageError(f"context is {context} tokens, but the model was made for {trained}")
        config["search"]["max_length"] = context
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _choose(
    checkpoint: Checkpoint,
    found: Sequence[Matrix],
    recipe: Recipe,
    provider: str,
    settings: Mapping[str, Any],
    deferred: bool,
    rest: int,
) -> tuple[dict[str, tuple[Matrix, Format]], dict[str, Quantized], dict[str, Any] | None]:
    """A format for every matrix that gets one, codes that are made already, and what calibration found."""
    from edgepack.onnx.decoder_graph import quantizable
    from edgepack.onnx.matmul_nbits import Format

    if recipe.calibrated:
        from edgepack.onnx.decoder_calibration import calibrated

        if not deferred:
            raise InputRefused(
                f"{checkpoint.path}: calibration needs weights under the names transformers gives them",
                hint="Use --quantize int4.",
            )
        budget = int(settings["bits_per_weight"] * checkpoint.parameters / 8) - rest
        return calibrated(checkpoint, found, provider, settings, budget)
    chosen = {}
    for matrix in found:
        form = {"head": recipe.head, "embedding and head": recipe.head, "embedding": recipe.embedding}.get(
            matrix.part, recipe.body
        )
        if form is not None and quantizable(matrix, Format(*form), provider):
            chosen[matrix.name] = (matrix, Format(*form))
    return chosen, {}, None


def _rest(graph: DecoderGraph, found: Sequence[Matrix]) -> int:
    """Bytes of everything that is no matrix: graph, norms, rotary caches."""
    matrices = {matrix.name for matrix in found}
    read = {reader for matrix in found for reader in (matrix.product, matrix.lookup) if reader}
    names = {name for node in graph.proto.graph.node if node.name not in read for name in node.input}
    plain = sum(
        values.numel() * values.element_size()
        for name, (_, values) in graph.stored.items()
        if name in names and name not in matrices
    )
    # Each matrix adds two initializers, a node and a cast to the graph: about 600 bytes of names and numbers.
    return plain + int(graph.proto.ByteSize()) + 600 * len(found)


def _weights(stored: Stored) -> int:
    import math

    return math.prod(stored.shape)


class _Writing:
    """Fill the data file."""

    def __init__(
        self, file: WeightFile, offsets: Mapping[str, int | None], threads: int, progress: Progress, total: int
    ) -> None:
        self._file, self._offsets, self._threads = file, offsets, threads
        self._progress, self._done, self._total = progress, 0, total

    def plain(self, slots: Sequence[Slot]) -> None:
        """Write every tensor that is not quantized."""
        for slot in slots:
            if slot.stored.values is None or slot.offset is None:
                continue
            for start, part in _pieces(slot.stored):
                self._file.write(part, slot.offset + start)
            self._advance(_weights(slot.stored))

    def quantized(
        self, matrix: Matrix, form: Format, pair: tuple[Stored, Stored], ready: Quantized | None
    ) -> None:
        """Quantize a matrix, or take the codes that are made, and write it."""
        import torch

        from edgepack.onnx.decoder_graph import as_stored
        from edgepack.onnx.deferred import row_reader
        from edgepack.onnx.matmul_nbits import Quantized, quantize

        codes_at, scales_at = (self._offsets[stored.name] for stored in pair)
        step = max(1, _CHUNK_WEIGHTS // matrix.width)
        read = None if ready is not None else row_reader(matrix.weights)
        if read is not None:
            read(0, 1)  # what must be computed whole is, before threads ask for it

        def one(start: int) -> int:
            stop = min(start + step, matrix.rows)
            if ready is not None:
                part = Quantized(form, matrix.width, ready.codes[start:stop], ready.scales[start:stop])
            elif read is not None:
                part = quantize(read(start, stop), form, where=matrix.name)
            self._file.write(as_stored(part.codes, pair[0].kind), (codes_at or 0) + start * form.row_bytes(matrix.width))
            self._file.write(part.scales, (scales_at or 0) + 2 * start * form.blocks(matrix.width))
            return (stop - start) * matrix.width

        with ThreadPoolExecutor(self._threads) as pool, torch.no_grad():
            for count in pool.map(one, range(0, matrix.rows, step)):
                self._advance(count)

    def _advance(self, weights: int) -> None:
        self._done = min(self._done + weights, self._total)
        self._progress(self._done, self._total)


def _pieces(stored: Stored) -> Iterator[tuple[int, Any]]:
    """Byte offset and values of a tensor, in chunks of rows where the checkpoint can be read so."""
    import torch

    from edgepack.onnx.deferred import materialize, row_reader, without_casts
    from edgepack.onnx.weight_file import stored_values

    values = stored.values
    if values is None:
        return
    if values.ndim == 2 and values.dtype.is_floating_point and values.numel() > _CHUNK_WEIGHTS:
        read = row_reader(without_casts(values))
        step = max(1, _CHUNK_WEIGHTS // int(values.shape[1]))
        row = stored.nbytes // int(values.shape[0])
        for start in range(0, int(values.shape[0]), step):
            part = stored_values(read(start, min(start + step, int(values.shape[0]))), stored.kind)
            _refuse_nonfinite(part, stored.name)
            yield start * row, part
        return
    whole = stored_values(materialize(values), stored.kind)
    if torch.is_floating_point(whole):
        _refuse_nonfinite(whole, stored.name)
    yield 0, whole


def _refuse_nonfinite(values: Any, name: str) -> None:
    import torch

    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise InputRefused(f"{name}: {bad} weights are NaN or infinite, or too large for the type they are stored in")


def _report(
    checkpoint: Checkpoint,
    recipe: Recipe,
    provider: str,
    drawing: Any,
    slots: Sequence[Slot],
    chosen: Mapping[str, tuple[Matrix, Format]],
    nbytes: int,
    graph_bytes: int,
) -> dict[str, Any]:
    parts: Counter[str] = Counter({"graph": graph_bytes})
    for slot in slots:
        if slot.offset is not None:
            parts[slot.stored.part] += slot.stored.nbytes
    weights: Counter[str] = Counter()
    for matrix, form in chosen.values():
        weights[form.name] += matrix.parameters
    return {
        "bytes": nbytes,
        "parameters": checkpoint.parameters,
        "bits_per_weight": 8 * nbytes / checkpoint.parameters,
        "bytes_by_part": dict(parts.most_common()),
        "formats": {name: form.name for name, (_, form) in sorted(chosen.items())},
        "weights_by_format": dict(weights.most_common()),
        "streamed": drawing.deferred,
        "recipe": recipe.name,
        "provider": provider,
        "builder": drawing.version,
    }
