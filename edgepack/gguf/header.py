"""The header of a GGUF file as bytes: metadata and tensor table, everything before the weights.

`encode_header` is the only writer of the format. Byte for byte what gguf-py's GGUFWriter writes for the same content;
the weights follow at the offsets it returns. `read_gguf` of `reader.py` is its inverse and its judge: the limits on
names live here, so that nothing is written that would be refused when read.

Source: llama.cpp `ggml/include/gguf.h` (layout), `ggml/src/gguf.cpp` (limits), gguf-py `gguf_writer.py`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from edgepack.errors import InputRefused
from edgepack.gguf.types import GgmlType, row_bytes
from edgepack.gguf.values import STRUCT, Metadata, PackedArray, Value, ValueType, u32

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT of gguf.h
MAX_DIMS = 4  # GGML_MAX_DIMS of ggml.h
MAX_NAME = 63  # bytes: GGML_MAX_NAME of ggml.h is 64 with the closing zero
MAX_KEY = 256  # bytes; the format allows 65,535, real keys stay below 60
ALIGNMENT_KEY = "general.alignment"

_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
_KEY = re.compile(r"[ -~]+")  # printable ASCII, as the format demands


@dataclass(frozen=True)
class TensorEntry:
    """One line of a file's tensor table.

    Args:
        name: GGUF name, `blk.0.attn_q.weight`.
        shape: numpy order: outermost first, width last (the file stores it reversed).
        type: How its weights are stored.
        offset: Bytes from the start of the data section.
        nbytes: Bytes of its weights, without the padding that follows.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int


def pad(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment` (GGML_PAD)."""
    return (size + alignment - 1) // alignment * alignment


def bad_name(name: str) -> str | None:
    """Why `name` can't be a tensor's name; None when it can."""
    if not 0 < len(name.encode(errors="surrogatepass")) <= MAX_NAME:
        return f"is not 1 to {MAX_NAME} bytes long"
    if not _NAME.fullmatch(name):
        return "has characters other than A-Z a-z 0-9 _ . : / -"
    if name.startswith("/") or ".." in name.split("/"):
        return "looks like a path"
    return None


def bad_key(key: str) -> str | None:
    """Why `key` can't be a metadata key; None when it can."""
    if not 0 < len(key) <= MAX_KEY:
        return f"is not 1 to {MAX_KEY} bytes long"
    if not _KEY.fullmatch(key):
        return "is not printable ASCII"
    return None


def bad_alignment(alignment: int) -> bool:
    """True unless it is a power of two from 8 (the format: a multiple of 8) to 1 MiB."""
    return not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1) != 0


def encode_header(
    metadata: Metadata,
    tensors: Sequence[tuple[str, tuple[int, ...], GgmlType]],
    *,
    alignment: int = ALIGNMENT,
) -> tuple[bytes, list[TensorEntry]]:
    """Encode metadata and tensor table, in the order given.

    Args:
        metadata: Written in its own order. `general.alignment` is added at the end when `alignment` is not 32.
        tensors: (name, shape in numpy order, type) of every tensor, in the order their weights will follow.
        alignment: Every tensor's data starts at a multiple of it. 32 is what every reader knows without being told.

    Returns:
        The header, zero-padded so that the data section starts at `len(header)`, and where each tensor goes. The last
        tensor must be padded to the alignment too.

    Raises:
        InputRefused: A key, name, value or shape that the format or llama.cpp's reader can't take.
    """
    metadata = _with_alignment(metadata, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        if reason := bad_key(key):
            raise InputRefused(f"GGUF metadata key {key[:80]!a} {reason}")
        parts += [_text(key), _encode(key, value)]
    entries = _lay_out(tensors, alignment)
    for entry in entries:
        dims = entry.shape[::-1]
        parts += [
            _text(entry.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.type.id, entry.offset),
        ]
    header = b"".join(parts)
    return header.ljust(pad(len(header), alignment), b"\0"), entries


def _with_alignment(metadata: Metadata, alignment: int) -> Metadata:
    if bad_alignment(alignment):
        raise InputRefused(f"GGUF alignment {alignment} is not a power of two from 8 to 1048576")
    declared = metadata.get(ALIGNMENT_KEY)
    if declared is None:
        return metadata if alignment == ALIGNMENT else metadata | {ALIGNMENT_KEY: u32(alignment)}
    if declared != u32(alignment):
        raise InputRefused(f"{ALIGNMENT_KEY} is {declared.value} but the tensors are aligned to {alignment}")
    return metadata


def _lay_out(tensors: Sequence[tuple[str, tuple[int, ...], GgmlType]], alignment: int) -> list[TensorEntry]:
    entries: list[TensorEntry] = []
    seen: set[str] = set()
    offset = 0
    for name, shape, kind in tensors:
        if reason := bad_name(name):
            raise InputRefused(f"tensor name {name[:80]!a} {reason}")
        if name in seen:
            raise InputRefused(f"tensor {name} appears twice")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
            raise InputRefused(
                f"tensor {name} has shape {shape}; GGUF takes 1 to {MAX_DIMS} dimensions, none of them zero"
            )
        seen.add(name)
        nbytes = row_bytes(kind, shape[-1]) * math.prod(shape[:-1])
        entries.append(TensorEntry(name, tuple(shape), kind, offset, nbytes))
        offset += pad(nbytes, alignment)
    return entries


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def packed(metadata: Metadata) -> Metadata:
    """The same metadata with every array in the form of the file: encoded once, however many headers are made of it."""
    return {
        key: Value(
            value.type, PackedArray(value.element, len(value.value), _pack(value.element, value.value)), value.element
        )
        if value.element is not None and not isinstance(value.value, PackedArray)
        else value
        for key, value in metadata.items()
    }


def _encode(key: str, value: Value) -> bytes:
    """Type id(s) and bytes of one value."""
    try:
        if value.type is not ValueType.ARRAY:
            return struct.pack("<I", value.type) + _pack(value.type, (value.value,))
        if value.element is None or value.element is ValueType.ARRAY:
            raise InputRefused(f"GGUF metadata {key}: an array needs one element type that is not itself an array")
        packed = isinstance(value.value, PackedArray) and value.value.element is value.element
        data = value.value.data if packed else _pack(value.element, value.value)
        return struct.pack("<IIQ", value.type, value.element, len(value.value)) + data
    except (struct.error, OverflowError, UnicodeEncodeError, AttributeError) as error:
        kind = value.type if value.element is None else value.element
        raise InputRefused(
            f"GGUF metadata {key}: {str(value.value)[:60]!a} is no {kind.name} value ({error})"
        ) from error


def _pack(kind: ValueType, values: Sequence[object]) -> bytes:
    if kind is ValueType.STRING:
        texts = [text.encode() for text in values]  # type: ignore[attr-defined]
        length = struct.Struct("<Q").pack
        return b"".join(part for text in texts for part in (length(len(text)), text))
    if kind is ValueType.BOOL and not all(isinstance(value, bool) for value in values):
        raise struct.error("required argument is not a bool")
    return struct.pack(f"<{len(values)}{STRUCT[kind]}", *values)
