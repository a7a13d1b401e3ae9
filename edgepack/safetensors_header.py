"""The header of a safetensors file, read as strictly as the format is written down, without touching the weights.

The file is `u64 header length, header JSON, data`; every tensor says dtype, shape and its byte range in the data. The
checks: ranges are in order, without hole, overlap or trailing bytes; length = shape x dtype; names are plain. Never
less strict than the `safetensors` library (which accepts a duplicate key, `../` names and tensors sharing an offset).
Source: https://github.com/huggingface/safetensors, README "Format" and safetensors/src/tensor.rs (0.8).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgepack import strict_json
from edgepack.errors import InputRefused
from edgepack.model_folder import open_regular, read_into

MAX_HEADER_BYTES = 8 << 20  # 60,000 tensors in one file, parsed in a second; the library allows 100 MB
MAX_DIMENSIONS = 8

# Bits per element: safetensors/src/tensor.rs, `Dtype::bitsize`.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
    | {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
    | {"I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
)

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")

# What people mistake for safetensors, by its first bytes.
_DISGUISES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "Run `git lfs pull` in the repository."),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle), not safetensors", "Save the model as safetensors."),
    (b"\x80\x02", "a Python pickle, not safetensors", "Save the model as safetensors."),
    (b"\x80\x03", "a Python pickle, not safetensors", "Save the model as safetensors."),
    (b"\x80\x04", "a Python pickle, not safetensors", "Save the model as safetensors."),
    (b"\x80\x05", "a Python pickle, not safetensors", "Save the model as safetensors."),
    (b"GGUF", "a GGUF file, not safetensors", "Rename it to .gguf and give the file itself."),
    (b"<!DOCTYPE", "an HTML page, not safetensors", "Download the file itself, not the page about it."),
    (b"<html", "an HTML page, not safetensors", "Download the file itself, not the page about it."),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Args:
        name: As the file spells it.
        dtype: The format's word: `BF16`, `F16`, `F32`, `I64`, ...
        shape: Outermost dimension first; () for a scalar.
        file: The real path, links resolved.
        offset: First byte, from the start of the file.
        nbytes: Length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def parameters(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


def read_header(path: Path, where: str | None = None) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Read and check the header of one file.

    Args:
        path: A regular file, links resolved.
        where: Name for messages; the path by default.

    Returns:
        The tensors in file order, and the file's `__metadata__`.

    Raises:
        InputRefused: The file is not safetensors or breaks a rule of the format; the message names the tensor.
        StorageError: The file system refused.
    """
    where = where or str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = bytearray(min(32, size))
        read_into(file, memoryview(head), path)
        length = _header_length(bytes(head), size, where)
        file.seek(8)
        data = bytearray(length)
        if read_into(file, memoryview(data), path) < length:
            raise InputRefused(f"{where}: changed while it was being read")
    document = strict_json.parse_object(bytes(data), f"{where}: header")
    metadata = _metadata(document.pop("__metadata__", None), where)
    data_bytes = size - 8 - length
    tensors = [_tensor(name, entry, path, 8 + length, where) for name, entry in document.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_layout(tensors, 8 + length, 8 + length + data_bytes, where)
    return tuple(tensors), metadata


def _header_length(head: bytes, size: int, where: str) -> int:
    for magic, what, hint in _DISGUISES:
        if head.startswith(magic):
            raise InputRefused(f"{where}: {what}", hint=hint)
    if size < 10:
        raise InputRefused(f"{where}: {size} bytes, too short for a safetensors file", hint="Fetch the file again.")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise InputRefused(f"{where}: header length {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are accepted")
    if 8 + length > size:
        raise InputRefused(
            f"{where}: header of {length:,} bytes in a file of {size:,}: truncated", hint="Fetch the file again."
        )
    if head[8:9] != b"{":
        raise InputRefused(f"{where}: the header must start with '{{', found {head[8:9]!r}: not a safetensors file")
    return length


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputRefused(f"{where}: __metadata__ must be an object, found {strict_json.kind(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            kind = strict_json.kind(text)
            raise InputRefused(f"{where}: __metadata__ key {key[:80]!r} must be a string, found {kind}")
    return value


def check_name(name: str, where: str) -> None:
    """Refuse a tensor name that could act as a path or hide characters.

    Raises:
        InputRefused: Other characters than letters, digits and `_.:/-`, longer than 256, or a `.`/`..` path segment.
    """
    if not _NAME.fullmatch(name) or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise InputRefused(f"{where}: tensor name {name[:100]!r} is not allowed")


def _tensor(name: str, entry: Any, path: Path, start: int, where: str) -> TensorInfo:
    check_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputRefused(f"{where}: tensor {name}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputRefused(f"{where}: tensor {name}: dtype {str(dtype)[:40]!r} is not one safetensors defines")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise InputRefused(
            f"{where}: tensor {name}: shape must be at most {MAX_DIMENSIONS} whole numbers >= 0, found {_short(shape)}"
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputRefused(f"{where}: tensor {name}: data_offsets must be [begin, end], found {_short(offsets)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]  # Python integers: a product that would wrap around simply differs
    nbytes = offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise InputRefused(
            f"{where}: tensor {name}: {dtype} {_short(shape)} needs {-(-bits // 8)} bytes, data_offsets give {nbytes}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _check_layout(tensors: list[TensorInfo], start: int, end: int, where: str) -> None:
    position, previous = start, ""
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the one before" if tensor.offset < position else "leaves a hole after the one before"
            raise InputRefused(f"{where}: tensor {tensor.name} {what} ({previous or 'start of the data'})")
        position += tensor.nbytes
        previous = tensor.name
    _check_empty(tensors, where)
    if position > end:
        raise InputRefused(
            f"{where}: truncated: the header describes {position:,} bytes, the file has {end:,}",
            hint="Fetch the file again.",
        )
    if position < end:
        raise InputRefused(f"{where}: {end - position:,} bytes after the last tensor that the header does not describe")


def _check_empty(tensors: list[TensorInfo], where: str) -> None:
    empty = [tensor for tensor in tensors if tensor.nbytes == 0]
    for first, second in itertools.pairwise(empty):
        if first.offset == second.offset:
            raise InputRefused(
                f"{where}: tensors {first.name} and {second.name} are both empty",
                hint="A checkpoint saved under DeepSpeed ZeRO-3 without gathering the weights looks like this.",
            )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _short(value: Any) -> str:
    return str(value)[:80]
