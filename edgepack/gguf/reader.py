"""Read the header of a GGUF file and refuse everything that is not exactly what the format allows.

llama.cpp's reader has had memory errors with files made to hurt it, and gguf-py checks next to nothing, so nothing else
opens a file before this did. At least as strict as llama.cpp's reader: what passes here, passes there. Also applied to
our own output. Reads the header only: no weights, no interpretation of metadata, no dequantization.

Source: llama.cpp `ggml/src/gguf.cpp` (gguf_init_from_reader), `src/llama-model-loader.cpp` (splits, data bounds),
`docs/gguf.md` of ggml.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import InputRefused, StorageError
from edgepack.gguf.cursor import MAX_STRING, Cursor, shown, take_strings
from edgepack.gguf.header import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    MAGIC,
    MAX_DIMS,
    TensorEntry,
    bad_alignment,
    bad_key,
    bad_name,
    pad,
)
from edgepack.gguf.types import REMOVED_IDS, TYPES_BY_ID, row_bytes
from edgepack.gguf.values import SIZE, STRUCT, Metadata, PackedArray, Value, ValueType

# Limits of this reader: far above what models need, and low enough that a hostile file costs less than 2 s and 300 MB.
MAX_KEYS = 1 << 16  # the vocabulary files in llama.cpp's own repository have 16 to 42
MAX_TENSORS = 1 << 16  # 512 layers (LLAMA_MAX_LAYERS) of 128 tensors
MAX_ELEMENTS = 1 << 22  # in all arrays; Gemma 4 has 1.3 million (262,144 tokens, scores and types, 514,906 merges)
MAX_TEMPLATE = 1 << 16  # bytes, as for checkpoints: a template is a program that is run
MAX_SPLITS = 1 << 10  # shards of 1 GB hold a model of 1 TB
MAX_INT64 = (1 << 63) - 1

_KEY_TYPES = {
    ALIGNMENT_KEY: ValueType.UINT32,
    "general.architecture": ValueType.STRING,
    "split.no": ValueType.UINT16,
    "split.count": ValueType.UINT16,
    "split.tensors.count": ValueType.INT32,
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read and found sound.

    Args:
        path: The file.
        version: 2 or 3.
        alignment: Of the data section, in bytes.
        metadata: In file order; arrays are `PackedArray`s.
        tensors: By name, in file order.
        data_offset: Where the data section starts; add a tensor's `offset` for its place in the file.
        file_bytes: Size of the file.
    """

    path: Path
    version: int
    alignment: int
    metadata: Metadata
    tensors: Mapping[str, TensorEntry]
    data_offset: int
    file_bytes: int

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key as plain Python: int, float, bool, str, or a tuple of them."""
        value = self.metadata.get(key)
        if value is None:
            return default
        return value.value.values() if isinstance(value.value, PackedArray) else value.value

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture.

        Raises:
            InputRefused: The file has none: a vocabulary of another tool, an importance matrix.
        """
        name = self.get("general.architecture")
        if not name:
            raise InputRefused(f"{shown(self.path)}: no general.architecture; this GGUF is not a model")
        return str(name)


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of one GGUF file.

    Raises:
        InputRefused: The file is missing, not a regular file, or its header breaks a rule; names file, place, reason.
        StorageError: The system could not read it.
    """
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputRefused(f"{shown(path)}: not a regular file; expected a .gguf")
        return _parse(Cursor(descriptor, path, status.st_size))
    except OSError as error:
        raise StorageError(f"{shown(path)}: can't be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def read_gguf_shards(path: Path) -> tuple[GgufFile, ...]:
    """Read one file, or every file of the split set that `path` is one of, in order.

    The first file of a set carries the metadata; the others carry tensors.

    Raises:
        InputRefused: As `read_gguf`; or a shard is missing, out of place, or the set's tensors don't add up.
    """
    first = read_gguf(path)
    count = first.get("split.count", 1)
    if count <= 1:
        return (first,)
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise InputRefused(
            f"{shown(path)}: one of {count} shards, but its name does not end in -00001-of-{count:05d}.gguf",
            hint="Give the shards their original names.",
        )
    shards = [
        _shard(path.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf"), i, count) for i in range(count)
    ]
    owner: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in owner:
                raise InputRefused(f"{shown(shard.path)}: tensor {name} is also in {shown(Path(owner[name].name))}")
            owner[name] = shard.path
    expected = shards[0].get("split.tensors.count")
    if expected is not None and expected != len(owner):
        raise InputRefused(f"{shown(path)}: the shards hold {len(owner)} tensors, split.tensors.count says {expected}")
    return tuple(shards)


def _shard(path: Path, number: int, count: int) -> GgufFile:
    if not path.exists():
        raise InputRefused(
            f"{shown(path)}: shard {number + 1} of {count} is missing", hint="All shards belong in one folder."
        )
    shard = read_gguf(path)
    found = (shard.get("split.no", 0), shard.get("split.count", 1))
    if found != (number, count):
        raise InputRefused(
            f"{shown(path)}: split.no {found[0]} of split.count {found[1]}, but its name says {number} of {count}"
        )
    return shard


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise InputRefused(f"{shown(path)}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputRefused(f"{shown(path)}: can't be opened ({getattr(error, 'strerror', error)})") from error


def _parse(cursor: Cursor) -> GgufFile:
    version, tensor_count, key_count = _counts(cursor)
    metadata: Metadata = {}
    for index in range(key_count):
        cursor.place = f"metadata entry {index}"
        key = _ascii(cursor, cursor.text(1 << 20, "the key"), "key", bad_key)
        if key in metadata:
            raise cursor.refuse(f"the key {key} appears twice")
        cursor.place = f"metadata {key}"
        metadata[key] = _value(cursor, key)
    alignment = _check_metadata(cursor, metadata)
    tensors: dict[str, TensorEntry] = {}
    offset = 0
    for index in range(tensor_count):
        cursor.place = f"tensor {index}"
        entry = _tensor(cursor, offset)
        if entry.name in tensors:
            raise cursor.refuse("the name appears twice")
        tensors[entry.name] = entry
        offset = pad(entry.offset + entry.nbytes, alignment)
    data_offset = pad(cursor.at, alignment) if tensors else cursor.at
    _check_end(cursor, data_offset, list(tensors.values()), alignment)
    return GgufFile(cursor.path, version, alignment, metadata, tensors, data_offset, cursor.size)


def _counts(cursor: Cursor) -> tuple[int, int, int]:
    if cursor.size < 24:
        raise cursor.refuse(f"the file has {cursor.size} bytes, a GGUF header takes at least 24")
    magic = cursor.take(4)
    if magic != MAGIC:
        raise cursor.refuse(f"starts with {magic!a}, a GGUF file starts with {MAGIC!a}")
    version = cursor.u32()
    if version in (2 << 24, 3 << 24):
        raise cursor.refuse("big-endian GGUF; only little-endian files are supported")
    if version not in (2, 3):
        raise cursor.refuse(f"GGUF version {version}; versions 2 and 3 are supported")
    tensor_count, key_count = cursor.u64(), cursor.u64()
    # the smallest entries: a one-letter name, one dimension; a one-letter key, one byte
    for what, count, limit, smallest in (
        ("tensors", tensor_count, MAX_TENSORS, 33),
        ("metadata entries", key_count, MAX_KEYS, 14),
    ):
        if count > limit:
            raise cursor.refuse(f"announces {count} {what}, at most {limit} allowed")
        if count * smallest > cursor.size - cursor.at:
            raise cursor.refuse(f"announces {count} {what}, which a file of {cursor.size} bytes can't hold")
    return version, tensor_count, key_count


def _ascii(cursor: Cursor, data: bytes, what: str, bad: Any) -> str:
    """A key or a name: `bad` gives the reason against it, which goes into the message."""
    text = data.decode("latin-1")  # never fails; whatever is not ASCII is refused by `bad`
    if reason := bad(text):
        raise cursor.refuse(f"the {what} {text[:60]!a} {reason}")
    return text


def _value(cursor: Cursor, key: str) -> Value:
    kind = _kind(cursor, cursor.u32())
    if kind is ValueType.STRING:
        template = key.startswith("tokenizer.chat_template") and not key.endswith("chat_templates")
        data = cursor.text(MAX_TEMPLATE if template else MAX_STRING, "the text")
        if 0 in data:
            raise cursor.refuse("the text holds a zero byte, where C readers would stop")
        return Value(kind, cursor.utf8(data))
    if kind is not ValueType.ARRAY:
        data = cursor.take(SIZE[kind])
        _check_bool(cursor, kind, data)
        return Value(kind, struct.unpack("<" + STRUCT[kind], data)[0])
    element = _kind(cursor, cursor.u32())
    if element is ValueType.ARRAY:
        raise cursor.refuse("an array of arrays, which llama.cpp does not read")
    count = cursor.u64()
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        raise cursor.refuse(f"an array of {count} elements; at most {MAX_ELEMENTS} are allowed in all arrays together")
    smallest = SIZE.get(element, 8)
    if count * smallest > cursor.size - cursor.at:
        raise cursor.refuse(
            f"an array of {count} elements, but only {cursor.size - cursor.at} bytes of the file are left"
        )
    data = take_strings(cursor, count) if element is ValueType.STRING else cursor.take(count * smallest)
    _check_bool(cursor, element, data)
    return Value(kind, PackedArray(element, count, data), element)


def _kind(cursor: Cursor, code: int) -> ValueType:
    if code > ValueType.FLOAT64:
        raise cursor.refuse(f"value type {code} does not exist; types are 0 to {int(ValueType.FLOAT64)}")
    return ValueType(code)


def _check_bool(cursor: Cursor, kind: ValueType, data: bytes) -> None:
    if kind is ValueType.BOOL and data.strip(b"\0\1"):
        raise cursor.refuse("a boolean is neither 0 nor 1")


def _check_metadata(cursor: Cursor, metadata: Metadata) -> int:
    """Check the keys that steer the reading; the alignment."""
    cursor.place = "metadata"
    for key, kind in _KEY_TYPES.items():
        if key in metadata and metadata[key].type is not kind:
            raise cursor.refuse(f"{key} is of type {metadata[key].type.name}, expected {kind.name}")
    alignment = int(metadata[ALIGNMENT_KEY].value) if ALIGNMENT_KEY in metadata else ALIGNMENT
    if bad_alignment(alignment):
        raise cursor.refuse(f"{ALIGNMENT_KEY} is {alignment}, expected a power of two from 8 to 1048576")
    if "split.count" in metadata:
        count, number = metadata["split.count"].value, metadata.get("split.no")
        if count > MAX_SPLITS:
            raise cursor.refuse(f"split.count is {count}, at most {MAX_SPLITS} allowed")
        if number is not None and number.value >= max(count, 1):
            raise cursor.refuse(f"split.no is {number.value} of split.count {count}")
    return alignment


def _tensor(cursor: Cursor, expected_offset: int) -> TensorEntry:
    name = _ascii(cursor, cursor.text(1 << 20, "the name"), "name", bad_name)
    cursor.place = f"tensor {name}"
    dims = cursor.u32()
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.refuse(f"has {dims} dimensions, expected 1 to {MAX_DIMS}")
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims))[::-1]
    if 0 in shape:
        raise cursor.refuse(f"has a zero dimension, shape {shape}")
    if math.prod(shape) > MAX_INT64:
        raise cursor.refuse(f"shape {shape} overflows")
    code = cursor.u32()
    if code in REMOVED_IDS:
        raise cursor.refuse(f"is of type {REMOVED_IDS[code]}, which llama.cpp no longer reads")
    if code not in TYPES_BY_ID:
        raise cursor.refuse(f"type {code} is not known to this version of edgepack")
    kind = TYPES_BY_ID[code]
    if shape[-1] % kind.block:
        raise cursor.refuse(
            f"width {shape[-1]} is not a multiple of the {kind.block} weights in a block of {kind.name}"
        )
    offset = cursor.u64()
    if offset != expected_offset:
        raise cursor.refuse(f"offset {offset}, expected {expected_offset}: overlap, gap or misalignment")
    return TensorEntry(name, shape, kind, offset, row_bytes(kind, shape[-1]) * math.prod(shape[:-1]))


def _check_end(cursor: Cursor, data_offset: int, entries: list[TensorEntry], alignment: int) -> None:
    """The data ends where the file does, give or take the padding of the last tensor."""
    cursor.place = "data"
    end = data_offset
    for entry in entries:
        end = data_offset + entry.offset + entry.nbytes
        if end > cursor.size:
            raise cursor.refuse(
                f"tensor {entry.name} ends at byte {end}, the file at {cursor.size} (truncated or corrupt)"
            )
    if cursor.size > pad(end, alignment):
        raise cursor.refuse(f"{cursor.size - pad(end, alignment)} unknown bytes follow the last tensor")
