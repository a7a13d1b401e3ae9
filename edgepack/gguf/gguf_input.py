"""A float GGUF as input: any architecture that llama.cpp's converter knows can be quantized, measured and packaged.

Metadata and tensors are copied through; only what describes the file itself (its type, its split, its alignment) is
left to the writer. Quantized files are refused: quantizing twice loses quality that no measurement can give back. Knows
nothing of tokenizers and of what the tensors mean.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, StorageError
from edgepack.gguf.cursor import shown
from edgepack.gguf.file import GgufFile, Metadata, TensorEntry, read_gguf_shards
from edgepack.gguf.gguf_attention import ENCODERS, MAX_LAYERS, Keys, read_attention, read_heads
from edgepack.gguf.model import ModelSpec, ReadRows, TensorSpec

_STORED: Mapping[str, npt.DTypeLike] = MappingProxyType({"F32": "<f4", "F16": "<f2", "BF16": "<u2"})
_BRING_FLOAT = (
    "Bring the float GGUF it was made from (convert_hf_to_gguf.py --outtype bf16), or the Hugging Face checkpoint"
)
# Keys of the file, not of the model: the writer makes its own.
_OF_THE_FILE = ("general.file_type", "general.quantization_version", "general.alignment")


def describe_gguf(path: Path) -> ModelSpec:
    """Describe an F32, F16 or BF16 GGUF, single or split, without reading a weight.

    Args:
        path: The file, or any file of a split set.

    Returns:
        The model as it will be written: tensors in file order, widened to float32 exactly as they are read.

    Raises:
        InputRefused: The file is unsound, no language model or embedder, holds types other than F32, F16 and BF16, or
            its metadata contradicts its tensors.
    """
    shards = read_gguf_shards(path)
    first = shards[0]
    _check_kind(first)
    _check_types(shards)
    keys = Keys(first)
    layers = keys.number("block_count")
    if not 1 <= layers <= MAX_LAYERS:
        raise keys.refuse("block_count", layers, f"1 to {MAX_LAYERS}")
    heads, kv_heads = read_heads(keys, layers)
    tensors = tuple(_tensor(shard, entry) for shard in shards for entry in shard.tensors.values())
    _check_embedding(keys, {tensor.name: tensor for tensor in tensors})
    return ModelSpec(
        architecture=first.architecture,
        metadata=_copied(first.metadata),
        tensors=tensors,
        heads=heads[0],
        kv_heads=kv_heads[0],
        context_length=keys.number("context_length", at_least=1),
        embedding=first.architecture in ENCODERS or keys.number("pooling_type", 0) > 0,
        attention=read_attention(keys, layers, heads, kv_heads),
        experts=keys.number("expert_count", 0),
    )


def _check_kind(file: GgufFile) -> None:
    kind = file.get("general.type", "model")
    if kind != "model" or file.architecture == "clip":
        raise InputRefused(
            f"{shown(file.path)}: a GGUF of type {kind} and architecture {file.architecture}; expected a language model"
        )


def _check_types(shards: Sequence[GgufFile]) -> None:
    counts = Counter(entry.type.name for shard in shards for entry in shard.tensors.values())
    if not counts:
        raise InputRefused(f"{shown(shards[0].path)}: no tensors, only metadata; expected a whole model")
    if set(counts) - set(_STORED):
        found = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        raise InputRefused(
            f"{shown(shards[0].path)}: already quantized, tensors by type: {found}; expected F32, F16 or BF16",
            hint=_BRING_FLOAT,
        )


def _copied(metadata: Metadata) -> Metadata:
    return {k: v for k, v in metadata.items() if k not in _OF_THE_FILE and not k.startswith("split.")}


def _check_embedding(keys: Keys, tensors: Mapping[str, TensorSpec]) -> None:
    """The embedding has one row per token and the width the metadata says: llama.cpp would not load it otherwise."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputRefused(
            f"{shown(keys.file.path)}: no tensor token_embd.weight; expected a language model or embedder"
        )
    width = keys.number("embedding_length", at_least=1)
    if embedding.width != width:
        raise keys.refuse("embedding_length", width, f"{embedding.width}, the width of token_embd.weight")
    tokens = keys.file.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens.value) != embedding.rows:
        raise InputRefused(
            f"{shown(keys.file.path)}: tokenizer.ggml.tokens has {len(tokens.value)} tokens; "
            f"expected {embedding.rows}, the rows of token_embd.weight"
        )


def _tensor(file: GgufFile, entry: TensorEntry) -> TensorSpec:
    return TensorSpec(
        name=entry.name,
        shape=entry.shape,
        read=_reader(file.path, file.data_offset + entry.offset, entry),
        keep_f32=len(entry.shape) == 1,
        source=entry.name,
        source_bytes=entry.nbytes,
    )


def _reader(path: Path, start_of_data: int, entry: TensorEntry) -> ReadRows:
    stored = np.dtype(_STORED[entry.type.name])
    width, rows = entry.shape[-1], math.prod(entry.shape[:-1])

    def read(start: int, stop: int) -> npt.NDArray[np.float32]:
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start}:{stop} of tensor {entry.name}, which has {rows}")
        raw: npt.NDArray[Any] = np.empty((stop - start, width), dtype=stored)
        _read_into(path, start_of_data + start * width * stored.itemsize, raw, entry.name)
        if entry.type.name == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        rows_read: npt.NDArray[np.float32] = raw.astype(np.float32, copy=False)
        return rows_read

    return read


def _read_into(path: Path, offset: int, out: npt.NDArray[np.generic], name: str) -> None:
    view = out.reshape(-1).view(np.uint8).data
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise InputRefused(f"{shown(path)}: ends inside tensor {name}: changed while it was being read")
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{shown(path)}: tensor {name} can't be read ({error.strerror})") from error
