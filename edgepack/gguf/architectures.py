"""From a Hugging Face checkpoint to the description of a GGUF, by the table in `families.py`.

Every tensor of the checkpoint is accounted for: written, known to take no part in what the GGUF computes, or refused. A
setting that llama.cpp's graph would silently compute otherwise is refused too. Reads no weights (but compares an output
matrix with the embedding where config.json ties two tensors that are both there).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from edgepack.checkpoint import Checkpoint, TensorInfo, read_rows
from edgepack.errors import InputRefused
from edgepack.gguf.families import ARCHITECTURES, HEADS, MODEL_TYPES
from edgepack.gguf.family import Architecture, Module
from edgepack.gguf.file import Metadata, u32
from edgepack.gguf.general import general_metadata
from edgepack.gguf.hyperparameters import Config, Hyperparameters, hyperparameter_metadata, read_hyperparameters
from edgepack.gguf.model import ModelSpec, TensorSpec
from edgepack.gguf.pooling import POOLING, read_pooling
from edgepack.gguf.rope import rope_tensors
from edgepack.gguf.tokenizer import vocabulary
from edgepack.gguf.transforms import TRANSFORMS, Span, computed, reader

__all__ = ["ARCHITECTURES", "Architecture", "describe_checkpoint", "find_architecture"]

BRING_A_GGUF = (
    "Convert it with llama.cpp's convert_hf_to_gguf.py --outtype f16 and build from the result: "
    "edgepack build model-f16.gguf -t TARGET"
)
# llama.cpp keeps these in float32 whatever the type (src/llama-quant.cpp, tensor_allows_quantization)
_FLOAT32_TARGETS = ("position_embd", "token_types")
_COMPARE_BYTES = 16 << 20  # per read when two tied tensors are compared


def find_architecture(checkpoint: Checkpoint) -> Architecture:
    """The row for a checkpoint, by `architectures` of config.json, or by `model_type` where it names no class.

    Raises:
        InputRefused: The class is not in the table.
    """
    classes = checkpoint.config.get("architectures") or [MODEL_TYPES.get(checkpoint.model_type)]
    name = classes[0] if len(classes) == 1 else None
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        found = " + ".join(map(str, classes)) if classes != [None] else f"model_type {checkpoint.model_type}"
        raise InputRefused(
            f"config.json: architecture {found} is not supported; expected one of {known}", hint=BRING_A_GGUF
        )
    return ARCHITECTURES[str(name)]


def describe_checkpoint(checkpoint: Checkpoint) -> ModelSpec:
    """Describe the GGUF of a checkpoint.

    Args:
        checkpoint: From `open_checkpoint`.

    Returns:
        Metadata and tensors, in the order token embedding, output, layers.

    Raises:
        InputRefused: The architecture, a setting, the tokenizer or a tensor is not supported; config.json contradicts
            the tensors; a tensor is missing or unknown.
    """
    architecture = find_architecture(checkpoint)
    numbers = read_hyperparameters(checkpoint.config, architecture)
    pooling = read_pooling(checkpoint)
    if pooling is None and not architecture.causal:
        pooling = "mean"  # what sentence-transformers does with a checkpoint that has no modules.json
    tensors = tuple(_tensors(checkpoint, architecture, numbers, embedder=pooling is not None))
    keys: Metadata = general_metadata(checkpoint, architecture.name, sum(tensor.parameters for tensor in tensors))
    keys |= hyperparameter_metadata(numbers, architecture)
    if pooling is not None:
        keys[f"{architecture.name}.pooling_type"] = u32(POOLING[pooling])
    keys |= vocabulary(checkpoint, rows=numbers.sizes["vocab"])
    return ModelSpec(
        architecture=architecture.name,
        metadata=keys,
        tensors=tensors,
        heads=numbers.sizes["heads"],
        kv_heads=numbers.sizes["kv_heads"],
        context_length=numbers.context,
        embedding=pooling is not None,
        attention=numbers.attention,
    )


def _tensors(
    checkpoint: Checkpoint, architecture: Architecture, numbers: Hyperparameters, *, embedder: bool
) -> Iterator[TensorSpec]:
    """Every tensor of the file, each tensor of the checkpoint used once."""
    config = Config(checkpoint.config, architecture)
    prefix = _prefix(checkpoint, architecture)
    used: set[str] = set()
    for module in _expanded(architecture.modules, numbers.sizes["layers"]):
        name = _source_name(module, prefix)
        if module.source.startswith("output:"):
            found = _output(checkpoint, architecture, numbers, f"{name}.weight", prefix, embedder)
            used.add(f"{name}.weight")
            if found is None:
                continue
            name = found.removesuffix(".weight")
        wants_bias = config.flag(module.bias) if isinstance(module.bias, str) else module.bias
        for suffix in ("weight", "bias") if wants_bias else ("weight",):
            info = checkpoint.tensors.get(f"{name}.{suffix}")
            if info is None:
                raise InputRefused(
                    f"{checkpoint.path.name}: tensor {name}.{suffix} is missing; {architecture.name} with "
                    f"{numbers.sizes['layers']} layers needs it"
                )
            used.add(info.name)
            yield _tensor(module, suffix, info, numbers)
    if numbers.rope is not None:
        for target, values in rope_tensors(numbers.rope).items():
            yield TensorSpec(target, values.shape, computed(values), keep_f32=True, source="computed")
    _refuse_unknown(checkpoint, architecture, prefix, used)


def _prefix(checkpoint: Checkpoint, architecture: Architecture) -> str:
    """What stands before the module names: depends on the class that was saved (LlamaModel has none)."""
    first = architecture.modules[0].source
    for prefix in architecture.prefixes:
        if f"{prefix}{first}.weight" in checkpoint.tensors:
            return prefix
    names = " or ".join(f"{prefix}{first}.weight" for prefix in architecture.prefixes)
    raise InputRefused(f"{checkpoint.path.name}: the token embedding is missing; expected a tensor {names}")


def _expanded(modules: tuple[Module, ...], layers: int) -> Iterator[Module]:
    """Modules of the whole model, then those of layer 0, of layer 1, ..."""
    yield from (module for module in modules if "{i}" not in module.source)
    for i in range(layers):
        for module in modules:
            if "{i}" in module.source:
                yield replace(module, source=module.source.format(i=i), target=module.target.format(i=i))


def _source_name(module: Module, prefix: str) -> str:
    outside = module.source.removeprefix("output:")
    return outside if outside != module.source else prefix + module.source


def _tensor(module: Module, suffix: str, info: TensorInfo, numbers: Hyperparameters) -> TensorSpec:
    sizes, transform = numbers.sizes, TRANSFORMS[module.transform]
    wanted = tuple(sizes[word] for word in module.shape.split())
    skip = 0
    if suffix == "bias":
        wanted = wanted[:1]
        transform = TRANSFORMS["copy"] if transform.transposed else transform
    stored = wanted[::-1] if transform.transposed else wanted
    if module.target == "position_embd":
        skip = sizes["offset"]
        stored = (stored[0] + skip, *stored[1:])
    if info.shape != stored:
        raise InputRefused(
            f"{info.file.name}: tensor {info.name} has shape {list(info.shape)}; config.json makes it {list(stored)}"
        )
    rows = stored[0] if len(stored) > 1 else 1
    gguf_rows = wanted[0] if len(wanted) > 1 else 1
    return TensorSpec(
        name=f"{module.target}.{suffix}",
        shape=wanted,
        read=reader([Span(info, skip, rows)], transform, sizes["head"]),
        row_block=transform.block(gguf_rows, sizes["head"]),
        keep_f32=len(wanted) == 1 or module.target in _FLOAT32_TARGETS,
        source=info.name,
        source_bytes=info.nbytes,
    )


def _output(
    checkpoint: Checkpoint,
    architecture: Architecture,
    numbers: Hyperparameters,
    name: str,
    prefix: str,
    embedder: bool,
) -> str | None:
    """The tensor that becomes `output.weight`; None where the graph takes the token embedding."""
    embedding = f"{prefix}{architecture.modules[0].source}.weight"
    present = name in checkpoint.tensors
    # transformers 5 unties two tensors that are both there and differ (modeling_utils.py, tie_weights)
    tied = numbers.tied and not (present and not _same(checkpoint.tensors[name], checkpoint.tensors[embedding]))
    if not tied and not present and not embedder:
        raise InputRefused(
            f"{checkpoint.path.name}: no {name}, and tie_word_embeddings is false: a model without an output matrix",
            hint="An embedder needs modules.json and the pooling it names; a language model its whole checkpoint.",
        )
    if architecture.output == "tied" and not tied:
        raise InputRefused(
            f"{checkpoint.path.name}: {name} differs from the token embedding; llama.cpp's {architecture.name} graph "
            "uses the embedding for both"
        )
    if architecture.output == "required" and tied:
        return embedding
    return name if present and not tied else None


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = a.shape[0]
    step = max(1, _COMPARE_BYTES * rows // max(a.nbytes, 1))
    return all(
        np.array_equal(read_rows(a, i, min(i + step, rows)), read_rows(b, i, min(i + step, rows)))
        for i in range(0, rows, step)
    )


def _refuse_unknown(checkpoint: Checkpoint, architecture: Architecture, prefix: str, used: set[str]) -> None:
    """No weight is dropped silently."""
    ignored: Mapping[bool, tuple[str, ...]] = {True: architecture.ignored, False: () if architecture.causal else HEADS}
    for name in checkpoint.tensors:
        if name in used:
            continue
        inside = name.startswith(prefix)
        patterns = ignored[True] if inside else ()
        short = name.removeprefix(prefix) if inside else name
        if any(re.fullmatch(pattern, short) for pattern in patterns):
            continue
        if any(re.fullmatch(pattern, name) for pattern in ignored[False]):
            continue
        raise InputRefused(
            f"{checkpoint.tensors[name].file.name}: tensor {name} is not part of {architecture.name} with this "
            "config.json; it would be lost",
            hint=BRING_A_GGUF,
        )
