"""Where an ONNX model's tensors lie, inside the file or in one beside it, and that they are what they claim to be.

onnxruntime opens what `external_data` names: it follows a hard link out of the folder, and knows a location that means
an address in its own memory (`*/_ORT_MEM_ADDR_/*`, onnxruntime core/framework/tensorprotoutils.h). So a location is a
plain file name, the file a regular one with a single link, opened without following links, and every tensor lies inside
it, overlaps no other, and has exactly the bytes its shape and type need.

Element types and their fields: onnx 1.23 `onnx/onnx.proto`, TensorProto. Knows nothing of graphs.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgepack.errors import InputRefused
from edgepack.onnx.wire import Message, Reader, Span

MAX_DIMS = 32  # onnxruntime's tensors take any number; no operator's schema means more than 8
MAX_ELEMENTS = 1 << 40  # of one tensor: 2^40 weights at half a byte each are 512 GiB
MAX_FILES = 16  # of external data; one is usual, exporters shard at 2 GB or more
EXTERNAL = 1  # TensorProto.DataLocation

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")
_RESERVED = re.compile(
    r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9]|conin\$|conout\$)(\..*)?"
)  # names of devices on Windows
_NUMBER = re.compile(r"[0-9]{1,18}")
_KEYS = {"location", "offset", "length", "checksum"}  # onnx.proto, TensorProto.external_data


@dataclass(frozen=True)
class ElementType:
    """One of TensorProto.DataType.

    Args:
        name: In lower case, as numpy and ONNX write it.
        bits: Bits per element; 0 for strings, which have no fixed size.
        fields: Fields of TensorProto that may hold it, beside `raw_data`.
        per_element: Numbers of that field for one element (2 for complex ones); packed small types use the byte count.
    """

    name: str
    bits: int
    fields: tuple[str, ...]
    per_element: int = 1


_INT32 = ("int32_data",)
TYPES: Mapping[int, ElementType] = {
    1: ElementType("float32", 32, ("float_data",)),
    2: ElementType("uint8", 8, _INT32),
    3: ElementType("int8", 8, _INT32),
    4: ElementType("uint16", 16, _INT32),
    5: ElementType("int16", 16, _INT32),
    6: ElementType("int32", 32, _INT32),
    7: ElementType("int64", 64, ("int64_data",)),
    8: ElementType("string", 0, ("string_data",)),
    9: ElementType("bool", 8, _INT32),
    10: ElementType("float16", 16, _INT32),
    11: ElementType("float64", 64, ("double_data",)),
    12: ElementType("uint32", 32, ("uint64_data",)),
    13: ElementType("uint64", 64, ("uint64_data",)),
    14: ElementType("complex64", 64, ("float_data",), 2),
    15: ElementType("complex128", 128, ("double_data",), 2),
    16: ElementType("bfloat16", 16, _INT32),
    17: ElementType("float8e4m3fn", 8, _INT32),
    18: ElementType("float8e4m3fnuz", 8, _INT32),
    19: ElementType("float8e5m2", 8, _INT32),
    20: ElementType("float8e5m2fnuz", 8, _INT32),
    21: ElementType("uint4", 4, _INT32),
    22: ElementType("int4", 4, _INT32),
    23: ElementType("float4e2m1", 4, _INT32),
    24: ElementType("float8e8m0", 8, _INT32),
    25: ElementType("uint2", 2, _INT32),
    26: ElementType("int2", 2, _INT32),
}
_DATA_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_WIDTHS = {"float_data": 4, "double_data": 8}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes were found where it says.

    Args:
        name: As in the graph; may be empty in attributes.
        type: Element type.
        shape: Dimensions; `()` for a scalar.
        nbytes: Bytes its elements take, packed types rounded up.
        location: Name of the external file; None for data inside the model file.
        span: Place of its raw bytes, in the model file or the external one; None when they are in a typed field.
    """

    name: str
    type: ElementType
    shape: tuple[int, ...]
    nbytes: int
    location: str | None
    span: Span | None


@dataclass
class Tensors:
    """All tensors of one model, checked one by one as the graph is walked.

    Args:
        reader: The model file.
        folder: Descriptor of its folder.
    """

    reader: Reader
    folder: int
    files: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)

    def check(self, tensor: Message, place: str) -> StoredTensor:
        """Find a tensor's bytes.

        Args:
            tensor: The TensorProto.
            place: What it is in the graph, for messages.

        Raises:
            InputRefused: Its type, shape, location or size is not sound.
        """
        name = str(tensor.get("name", ""))
        where = f"{place} {shown(name)}".rstrip()
        kind = TYPES.get(tensor.get("data_type", 0))
        if kind is None:
            raise self.refuse(f"{where}: element type {tensor.get('data_type', 0)} is not known")
        if "segment" in tensor:
            raise self.refuse(f"{where}: is stored in segments, which no runtime reads")
        shape = self._shape(tensor.get("dims", ()), where)
        count = math.prod(shape)
        nbytes = (count * kind.bits + 7) // 8
        location = tensor.get("data_location", 0)
        filled = [key for key in (*_DATA_FIELDS, "raw_data") if key in tensor]
        if location == EXTERNAL:
            if filled:
                raise self.refuse(f"{where}: is stored outside, but has {filled[0]} as well")
            if not kind.bits:
                raise self.refuse(f"{where}: strings can't be stored outside")
            file, span = self._external(tensor.get("external_data", ()), nbytes, where)
            return StoredTensor(name, kind, shape, nbytes, file, span)
        if location != 0 or "external_data" in tensor:
            raise self.refuse(f"{where}: data_location is {location}, external_data is {'external_data' in tensor}")
        return StoredTensor(name, kind, shape, nbytes, None, self._inside(tensor, kind, count, filled, where))

    def finish(self) -> None:
        """After the last tensor: no two of them share bytes of an external file.

        Raises:
            InputRefused: Two do.
        """
        for file, ranges in self.ranges.items():
            end, before = 0, ""
            for start, stop, name in sorted(ranges):
                if start < end:
                    raise self.refuse(f"{name} overlaps {before} in {file} (bytes {start} to {min(stop, end)})")
                end, before = stop, name

    def refuse(self, reason: str) -> InputRefused:
        """The error to raise: file and reason."""
        return InputRefused(f"{shown(str(self.reader.path))}: {reason}")

    def _shape(self, dims: Sequence[int | Span], where: str) -> tuple[int, ...]:
        values = tuple(numbers(self.reader, dims))
        if len(values) > MAX_DIMS:
            raise self.refuse(f"{where}: {len(values)} dimensions, at most {MAX_DIMS} allowed")
        count = 1
        for value in values:
            count *= value
            if value < 0 or count > MAX_ELEMENTS:
                raise self.refuse(f"{where}: shape {list(values[:8])}; expected 0 to 2^40 elements")
        return values

    def _inside(self, tensor: Message, kind: ElementType, count: int, filled: list[str], where: str) -> Span | None:
        """Compare the elements stored in the model file with the shape; the raw bytes' place."""
        if len(filled) > 1:
            raise self.refuse(f"{where}: has both {filled[0]} and {filled[1]}")
        if not filled:
            if count:
                raise self.refuse(f"{where}: has no data, its shape needs {count:,} elements")
            return None
        (key,) = filled
        if key == "raw_data":
            span: Span = tensor[key]
            needed = (count * kind.bits + 7) // 8
            if not kind.bits or span.length != needed:
                raise self.refuse(f"{where}: raw_data has {span.length:,} bytes, its shape and type need {needed:,}")
            return span
        if key not in kind.fields:
            raise self.refuse(f"{where}: {kind.name} is stored in {key}, expected raw_data or {kind.fields[0]}")
        found = self._stored(tensor[key], key)
        # onnx.proto: types of less than a byte are packed first, then stored one byte to an int32.
        needed = count * kind.per_element if kind.bits == 0 or kind.bits >= 8 else (count * kind.bits + 7) // 8
        if found != needed:
            raise self.refuse(f"{where}: {key} has {found:,} values, its shape needs {needed:,}")
        return None

    def _stored(self, values: Sequence[Any], key: str) -> int:
        """Numbers in a typed field, packed or not."""
        if key == "string_data":
            return len(values)
        if key in _WIDTHS:
            total = sum(span.length for span in values)
            return total // _WIDTHS[key] if total % _WIDTHS[key] == 0 else -1
        return sum(self.reader.varints_of(value) if isinstance(value, Span) else 1 for value in values)

    def _external(self, entries: Sequence[Message], nbytes: int, where: str) -> tuple[str, Span]:
        told: dict[str, str] = {}
        for entry in entries:
            key = entry.get("key", "")
            if key not in _KEYS or key in told:
                raise self.refuse(f"{where}: external_data has {'two' if key in told else 'an unknown'} {shown(key)}")
            told[key] = entry.get("value", "")
        if "location" not in told:
            raise self.refuse(f"{where}: external_data names no location")
        file = told["location"]
        size = self._file(file, where)
        offset, length = (self._number(told, key, default, where) for key, default in (("offset", 0), ("length", None)))
        if length is not None and length != nbytes:
            raise self.refuse(f"{where}: length {length:,} in {file}, its shape and type need {nbytes:,}")
        if offset + nbytes > size:
            raise self.refuse(f"{where}: reaches byte {offset + nbytes:,} of {file}, which has {size:,}")
        if nbytes:
            self.ranges.setdefault(file, []).append((offset, offset + nbytes, where))
        return file, Span(offset, nbytes)

    def _number(self, told: Mapping[str, str], key: str, default: Any, where: str) -> Any:
        text = told.get(key)
        if text is None:
            return default
        if not _NUMBER.fullmatch(text):
            raise self.refuse(f"{where}: external_data {key} is {shown(text)}, expected a number of bytes")
        return int(text)

    def _file(self, name: str, where: str) -> int:
        """Size of an external file, opened once to see what it is."""
        if name in self.files:
            return self.files[name]
        if not _NAME.fullmatch(name) or name.endswith(".") or _RESERVED.fullmatch(name):
            raise self.refuse(f"{where}: external data in {shown(name)}; expected the plain name of a file beside it")
        if len(self.files) == MAX_FILES:
            raise self.refuse(f"{where}: external data in more than {MAX_FILES} files")
        status = open_regular(name, self.folder, f"{shown(str(self.reader.path))}: {where}: external data {name}")[1]
        if (status.st_dev, status.st_ino) == _identity(self.reader.descriptor):
            raise self.refuse(f"{where}: external data in the model file itself")
        self.files[name] = status.st_size
        return status.st_size


def open_regular(name: str, folder: int, where: str, *, keep: bool = False) -> tuple[int, os.stat_result]:
    """Open a file of a folder without following links, and see that it is a regular one with one link.

    Args:
        name: A plain name.
        folder: Descriptor of the folder.
        where: Start of the message.
        keep: Leave it open; the caller closes the descriptor.

    Returns:
        The descriptor (closed unless `keep`) and the file's status.

    Raises:
        InputRefused: It is missing, a link, a folder, a device, or has a second link.
    """
    try:
        # O_NONBLOCK: a FIFO must not hang the open.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else (error.strerror or str(error)).lower()
        raise InputRefused(f"{where}: {reason}; expected a regular file") from None
    status = os.fstat(descriptor)
    sound = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if not (sound and keep):
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InputRefused(f"{where}: not a regular file")
    if status.st_nlink != 1:
        raise InputRefused(
            f"{where}: has {status.st_nlink} hard links, expected one: its bytes have another name elsewhere",
            hint="Copy the file, or remove its other name.",
        )
    return descriptor, status


def numbers(reader: Reader, values: Sequence[int | Span]) -> list[int]:
    """The numbers of a repeated integer field, packed or not (at most 65,536 bytes of packed ones)."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        if value.length > 1 << 16:
            raise reader.refuse(value.offset, f"{value.length:,} bytes of packed numbers, at most 65,536 expected")
        found += _unpack(reader, value)
    return found


def _unpack(reader: Reader, span: Span) -> list[int]:
    found, value, shift = [], 0, 0
    for byte in reader.bytes_of(span):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value - (1 << 64) if value >> 63 else value)
            value = shift = 0
        elif shift > 63:
            raise reader.refuse(span.offset, "a packed number of more than ten bytes")
    if shift:
        raise reader.refuse(span.offset, "a packed number that does not end")
    return found


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def shown(text: str) -> str:
    """A name fit for one line: odd characters escaped, long ones cut."""
    text = text if len(text) <= 120 else text[:117] + "..."
    return text if text.isprintable() else ascii(text)
