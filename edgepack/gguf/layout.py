"""Where every byte of a GGUF file will be, decided before a weight is read.

`plan_layout` gives each tensor its type and offset and encodes the headers: the plan's file sizes are exact, and the
writer may put down tensors in any order. Knows nothing of weights, threads or disks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from types import MappingProxyType

from edgepack.errors import InputRefused, UsageError
from edgepack.gguf.file import Metadata, TensorEntry, Value, encode_header, i32, pad, string, u16, u32
from edgepack.gguf.ggml import QUANTIZATION_VERSION
from edgepack.gguf.imatrix import Imatrix
from edgepack.gguf.model import ModelSpec
from edgepack.gguf.recipes import Preset, assign_types, find_preset, needs_imatrix
from edgepack.gguf.types import TYPES, GgmlType, row_bytes

ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT of llama.cpp ggml/include/gguf.h
MAX_SHARDS = 65_535  # split.count is a 16-bit number

# Keys that describe one written file: an input GGUF's own are replaced.
_WRITTEN_HERE = ("general.file_type", "general.quantization_version", "general.alignment")
_WRITTEN_HERE_PREFIXES = ("split.", "quantize.imatrix.", "edgepack.")


@dataclass(frozen=True)
class Shard:
    """One file of the artifact.

    Args:
        suffix: What follows the stem in its name: `.gguf`, or `-00001-of-00003.gguf`.
        header: Metadata and tensor table, padded: the data section starts at its end.
        entries: The tensors, in file order; offsets count from the end of the header.
    """

    suffix: str
    header: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the finished file."""
        last = self.entries[-1] if self.entries else None
        return len(self.header) + (pad(last.offset + last.nbytes, ALIGNMENT) if last else 0)


@dataclass(frozen=True)
class Layout:
    """Every file of the artifact, byte for byte except for the weights.

    Args:
        preset: The recipe it follows.
        shards: The files; one unless shards were asked for.
        types: Type by tensor name, in file order.
        parameters: Weights in all tensors.
        without_importance: Tensors quantized without importance values though an importance matrix was given.
    """

    preset: Preset
    shards: tuple[Shard, ...]
    types: Mapping[str, GgmlType]
    parameters: int
    without_importance: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def tensor_bytes_by_type(self) -> Mapping[str, int]:
        """Bytes of weights by type name, headers and padding not counted."""
        sizes: Counter[str] = Counter()
        for shard in self.shards:
            for entry in shard.entries:
                sizes[entry.type.name] += entry.nbytes
        return dict(sizes)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight, headers not counted: what llama-quantize prints as BPW."""
        return sum(self.tensor_bytes_by_type.values()) * 8 / self.parameters


def plan_layout(
    model: ModelSpec,
    preset: str,
    *,
    overrides: Mapping[str, str] = MappingProxyType({}),
    imatrix: Imatrix | None = None,
    shard_bytes: int | None = None,
    extra_metadata: Mapping[str, Value] = MappingProxyType({}),
) -> Layout:
    """Decide types, offsets and headers. Reads no weights.

    Args:
        model: What to write.
        preset: Name of a preset of llama-quantize, in any case.
        overrides: Pattern -> type, see `overrides.py`.
        imatrix: Importance values; some recipes choose other types where there are any.
        shard_bytes: Largest size of one file, header included; None for a single file. A tensor that is larger than
            this on its own gets a file to itself.
        extra_metadata: Further keys, written last (`edgepack.*`).

    Returns:
        The layout. `general.quantization_version` is 2; `general.file_type` is the preset's id with overrides too, as
        llama-quantize has it.

    Raises:
        UsageError: See `assign_types`; shards too small to hold the header; a key given twice.
        InputRefused: Importance values of the wrong size, or missing where a type needs them.
    """
    recipe = find_preset(preset)
    metadata = _metadata(model, recipe, imatrix, extra_metadata)
    shapes = [(tensor.name, tensor.shape) for tensor in model.tensors]
    types = assign_types(
        shapes,
        recipe.name,
        architecture=model.architecture,
        layers=_block_count(model),
        heads=model.heads,
        kv_heads=model.kv_heads,
        experts=model.experts,
        has_imatrix=imatrix is not None,
        overrides=overrides,
    )
    types |= {tensor.name: TYPES["F32"] for tensor in model.tensors if tensor.keep_f32}
    bare = _check_importance(model, types, recipe, imatrix) if imatrix else ()
    table = [(name, shape, types[name]) for name, shape in shapes]
    shards = _shards(metadata, table, shard_bytes)
    return Layout(recipe, shards, MappingProxyType(types), model.parameters, bare)


def _block_count(model: ModelSpec) -> int:
    """Layers as llama.cpp counts them: the metadata key, which hybrid models have more of than key-value caches."""
    count = model.metadata.get(f"{model.architecture}.block_count")
    return int(count.value) if count else model.layers


def _metadata(model: ModelSpec, recipe: Preset, imatrix: Imatrix | None, extra: Mapping[str, Value]) -> Metadata:
    kept = {
        key: value
        for key, value in model.metadata.items()
        if key not in _WRITTEN_HERE and not key.startswith(_WRITTEN_HERE_PREFIXES)
    }
    own = {
        "general.quantization_version": u32(QUANTIZATION_VERSION),
        "general.file_type": u32(recipe.file_type),
    }
    if imatrix:
        # llama-quantize writes the whole path here; a file name says as much and tells nothing about the machine
        own |= {"quantize.imatrix.dataset": string(_base_name(imatrix.datasets[0]))} if imatrix.datasets else {}
        own |= {
            "quantize.imatrix.entries_count": u32(len(imatrix.values)),
            "quantize.imatrix.chunks_count": u32(imatrix.chunks),
            "edgepack.imatrix_sha256": string(imatrix.sha256),
        }
    twice = sorted(extra.keys() & (kept | own).keys())
    if twice:
        raise UsageError(f"metadata key {twice[0]} is already written from the model or the recipe")
    return {**kept, **own, **extra}


def _base_name(path: str) -> str:
    return PureWindowsPath(PurePosixPath(path).name).name


def _check_importance(
    model: ModelSpec, types: Mapping[str, GgmlType], recipe: Preset, imatrix: Imatrix
) -> tuple[str, ...]:
    """Refuse importance values of another model; name the tensors that have none.

    llama.cpp's rules (src/llama-quant.cpp): a wrong size is an error except for token_embd, which is then quantized
    without; a missing entry is an error only where the type can't do without.
    """
    bare: list[str] = []
    for tensor in model.tensors:
        kind = types[tensor.name]
        if kind.block == 1:
            continue
        values = imatrix.of(tensor.name, tensor.shape)
        if values is not None:
            continue
        if tensor.name in imatrix.values and tensor.name != "token_embd.weight":
            raise InputRefused(
                f"the importance matrix has {imatrix.values[tensor.name].size} values for {tensor.name}, expected "
                f"{tensor.width * _experts(tensor.shape)}",
                hint="It was made for another model.",
            )
        if needs_imatrix(tensor.name, kind, recipe):
            raise InputRefused(
                f"the importance matrix has no values for {tensor.name}, which {kind.name} can't be quantized without",
                hint="Gather it over more text, or set quantize.tensors.<name> to another type.",
            )
        bare.append(tensor.name)
    if not any(tensor.name in imatrix.values for tensor in model.tensors):
        raise InputRefused("the importance matrix names no tensor of this model", hint="It was made for another model.")
    return tuple(bare)


def _experts(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-2])


_Table = list[tuple[str, tuple[int, ...], GgmlType]]


def _shards(metadata: Metadata, table: _Table, shard_bytes: int | None) -> tuple[Shard, ...]:
    """One file, or a set as llama-gguf-split makes it: all metadata in the first, split.* keys in every one."""
    header, entries = encode_header(metadata, table, alignment=ALIGNMENT)
    whole = Shard(".gguf", header, tuple(entries))
    if shard_bytes is None or whole.file_bytes <= shard_bytes:
        return (whole,)
    if len(header) >= shard_bytes:
        raise UsageError(
            f"shards of {shard_bytes} bytes can't hold the header of {len(header)} bytes",
            hint="Raise delivery.shard_mb.",
        )
    groups = _groups(metadata, table, shard_bytes)
    if len(groups) > MAX_SHARDS:
        raise UsageError(
            f"{len(groups)} shards, a split GGUF has {MAX_SHARDS} at most", hint="Raise delivery.shard_mb."
        )
    shards = []
    for number, group in enumerate(groups):
        split = _split_keys(number, len(groups), len(table))
        header, entries = encode_header(metadata | split if number == 0 else split, group, alignment=ALIGNMENT)
        shards.append(Shard(f"-{number + 1:05d}-of-{len(groups):05d}.gguf", header, tuple(entries)))
    return tuple(shards)


def _split_keys(number: int, count: int, tensors: int) -> Metadata:
    return {"split.no": u16(number), "split.count": u16(count), "split.tensors.count": i32(tensors)}


def _groups(metadata: Metadata, table: _Table, shard_bytes: int) -> list[_Table]:
    """Cut the tensor table, in order, into files of at most `shard_bytes`; no group is empty."""
    groups: list[_Table] = []
    room = 0
    for name, shape, kind in table:
        # the table's line (GGUF: name length and name, dimension count, dimensions, type, offset), then the weights
        line = 8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8
        size = line + pad(math.prod(shape[:-1]) * row_bytes(kind, shape[-1]), ALIGNMENT)
        if not groups or size > room:
            keys = _split_keys(0, 0, 0) | ({} if groups else metadata)
            room = shard_bytes - len(encode_header(keys, [], alignment=ALIGNMENT)[0]) - ALIGNMENT
            groups.append([])
        groups[-1].append((name, shape, kind))
        room -= size
    return groups
