"""Read the protobuf encoding of an ONNX file without a protobuf library and without its weights.

Only the structure is kept: numbers, names, and where byte strings lie. The file is read by pread in pieces (no mapping,
see `gguf/cursor.py`), so a model of 2 GB with its weights inside costs as little memory as its graph does. Stricter
than protobuf, which keeps unknown fields, lets the last of two equal fields win, and builds objects many times the
size of the bytes that ask for them: unknown fields, repeated singular fields, groups, invalid UTF-8, deep nesting and
more fields than any model has are refused.

Source: protobuf.dev/programming-guides/encoding; field numbers from onnx 1.23 `onnx/onnx.proto` (IR version 14).
Knows nothing of what the fields mean.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import InputRefused

MAX_FILE = (1 << 31) - 1  # bytes of one protobuf message (protobuf.dev, "Proto Limits")
MAX_FIELDS = 400_000  # a decoder of 80 layers has about 60,000; as many as two seconds allow
MAX_DEPTH = 64  # messages in messages; protobuf's own limit is 100, eight nested graphs take 32
MAX_TEXT = 1 << 20  # bytes of one name or metadata value

_PIECE = 1 << 16

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Span:
    """A byte string in the file that was not read."""

    offset: int
    length: int


@dataclass(frozen=True)
class Field:
    """How one field number is read.

    Args:
        name: As in onnx.proto.
        kind: `int`, `float`, `double`, `text`, `bytes`, `skip` (counted, not kept), or the name of a message.
        many: A repeated field; numbers may then also come packed, as one byte string.
    """

    name: str
    kind: str
    many: bool = False


def _message(text: str) -> dict[int, Field]:
    """Fields from lines `number name kind`, `*` after the kind for repeated ones."""
    rows = (line.split() for line in text.strip().splitlines())
    return {int(number): Field(name, kind.rstrip("*"), kind.endswith("*")) for number, name, kind in rows}


MESSAGES: Mapping[str, Mapping[int, Field]] = {
    "Model": _message("""
        1 ir_version int
        2 producer_name text
        3 producer_version text
        4 domain text
        5 model_version int
        6 doc_string skip
        7 graph Graph
        8 opset_import OperatorSet*
        14 metadata_props Entry*
        20 training_info skip*
        25 functions Function*
        26 configuration skip*"""),
    "OperatorSet": _message("""
        1 domain text
        2 version int"""),
    "Entry": _message("""
        1 key text
        2 value text"""),
    "Graph": _message("""
        1 node Node*
        2 name text
        5 initializer Tensor*
        10 doc_string skip
        11 input ValueInfo*
        12 output ValueInfo*
        13 value_info ValueInfo*
        14 quantization_annotation skip*
        15 sparse_initializer SparseTensor*
        16 metadata_props Entry*"""),
    "Node": _message("""
        1 input text*
        2 output text*
        3 name text
        4 op_type text
        5 attribute Attribute*
        6 doc_string skip
        7 domain text
        8 overload text
        9 metadata_props Entry*
        10 device_configurations skip*"""),
    "Attribute": _message("""
        1 name text
        2 f float
        3 i int
        4 s bytes
        5 t Tensor
        6 g Graph
        7 floats float*
        8 ints int*
        9 strings bytes*
        10 tensors Tensor*
        11 graphs Graph*
        13 doc_string skip
        14 tp Type
        15 type_protos Type*
        20 type int
        21 ref_attr_name text
        22 sparse_tensor SparseTensor
        23 sparse_tensors SparseTensor*"""),
    "Tensor": _message("""
        1 dims int*
        2 data_type int
        3 segment skip
        4 float_data float*
        5 int32_data int*
        6 string_data bytes*
        7 int64_data int*
        8 name text
        9 raw_data bytes
        10 double_data double*
        11 uint64_data int*
        12 doc_string skip
        13 external_data Entry*
        14 data_location int
        16 metadata_props Entry*"""),
    "SparseTensor": _message("""
        1 values Tensor
        2 indices Tensor
        3 dims int*"""),
    "ValueInfo": _message("""
        1 name text
        2 type Type
        3 doc_string skip
        4 metadata_props Entry*"""),
    "Type": _message("""
        1 tensor_type TensorType
        4 sequence_type Element
        5 map_type Map
        6 denotation text
        7 opaque_type skip
        8 sparse_tensor_type TensorType
        9 optional_type Element"""),
    "TensorType": _message("""
        1 elem_type int
        2 shape Shape"""),
    "Element": _message("""
        1 elem_type Type"""),
    "Map": _message("""
        1 key_type int
        2 value_type Type"""),
    "Shape": _message("""
        1 dim Dimension*"""),
    "Dimension": _message("""
        1 dim_value int
        2 dim_param text
        3 denotation text"""),
    "Function": _message("""
        1 name text
        4 input text*
        5 output text*
        6 attribute text*
        7 node Node*
        8 doc_string skip
        9 opset_import OperatorSet*
        10 domain text
        11 attribute_proto Attribute*
        12 value_info ValueInfo*
        13 overload text
        14 metadata_props Entry*"""),
}

_NUMBERS = {"int": _VARINT, "float": _FIXED32, "double": _FIXED64}
_WIDTH = {_FIXED32: 4, _FIXED64: 8}
Message = dict[str, Any]


class Reader:
    """The fields of one open file.

    Args:
        descriptor: Open for reading; stays open.
        path: For messages.
        size: Bytes of the file.
    """

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self.descriptor, self.path, self.size = descriptor, path, size
        self.fields = 0
        self._data, self._base = b"", 0

    def model(self) -> Message:
        """The whole file as a `Model` message: field name -> value, or list of values for repeated fields."""
        if self.size > MAX_FILE:
            raise self.refuse(0, f"{self.size:,} bytes, a protobuf file has at most {MAX_FILE:,}")
        return self._read("Model", 0, self.size, 0)

    def refuse(self, at: int, reason: str) -> InputRefused:
        """The error to raise: file, place, reason."""
        text = str(self.path)
        return InputRefused(f"{text if text.isprintable() else ascii(text)}: byte {at}: {reason}")

    def bytes_of(self, span: Span) -> bytes:
        """The bytes a span points to."""
        data = os.pread(self.descriptor, span.length, span.offset)
        if len(data) != span.length:
            raise self.refuse(span.offset, "the file shrank while it was read")
        return data

    def varints_of(self, span: Span) -> int:
        """How many numbers a packed field holds: every one ends with a byte below 128."""
        count, at = 0, span.offset
        while at < span.offset + span.length:
            piece = self.bytes_of(Span(at, min(1 << 20, span.offset + span.length - at)))
            count += len(piece.translate(None, _CONTINUED))
            at += len(piece)
        return count

    def _read(self, kind: str, at: int, end: int, depth: int) -> Message:
        if depth > MAX_DEPTH:
            raise self.refuse(at, f"more than {MAX_DEPTH} messages inside each other")
        known, found = MESSAGES[kind], Message()
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise self.refuse(at, f"more than {MAX_FIELDS:,} fields")
            start = at
            tag, at = self._varint(at, end)
            field, wire = known.get(tag >> 3), tag & 7
            if field is None:
                raise self.refuse(start, f"field {tag >> 3} is not one of ONNX's {kind}: not an ONNX file, or damaged")
            value: Any
            if wire == _VARINT:
                value, at = self._varint(at, end)
            elif wire == _BYTES:
                length, at = self._varint(at, end)
                if length > end - at:
                    raise self.refuse(start, f"{kind}.{field.name} reaches byte {at + length}, {kind} ends at {end}")
                value = Span(at, length)
                at += length
            elif wire in _WIDTH:
                at += _WIDTH[wire]
                if at > end:
                    raise self.refuse(start, f"{kind}.{field.name} reaches byte {at}, {kind} ends at {end}")
                value = Span(at - _WIDTH[wire], _WIDTH[wire])
            else:
                raise self.refuse(start, f"{kind}.{field.name} has wire type {wire}, which ONNX does not use")
            self._keep(kind, field, wire, value, found, start, depth)
        return found

    def _keep(self, kind: str, field: Field, wire: int, value: Any, found: Message, at: int, depth: int) -> None:
        """Turn one field's raw value into what it stands for and put it in its message."""
        expected = _NUMBERS.get(field.kind, _BYTES)
        if wire != expected and not (field.many and field.kind in _NUMBERS and wire == _BYTES):
            raise self.refuse(at, f"{kind}.{field.name} has wire type {wire}, expected {expected}")
        if field.kind == "int" and wire == _VARINT:
            value = value - (1 << 64) if value >> 63 else value
        elif field.kind in _NUMBERS and field.many:
            pass  # packed numbers, or the span of one: counted where they are looked at
        elif field.kind == "float":
            value = struct.unpack("<f", self.bytes_of(value))[0]
        elif field.kind == "double":
            value = struct.unpack("<d", self.bytes_of(value))[0]
        elif field.kind == "text":
            value = self._text(value, kind, field)
        elif field.kind in MESSAGES:
            value = self._read(field.kind, value.offset, value.offset + value.length, depth + 1)
        elif field.kind == "skip":
            value = None
        if field.many:
            found.setdefault(field.name, []).append(value)
        elif field.name in found:
            raise self.refuse(at, f"{kind}.{field.name} is there twice")
        else:
            found[field.name] = value

    def _text(self, span: Span, kind: str, field: Field) -> str:
        if span.length > MAX_TEXT:
            raise self.refuse(span.offset, f"{kind}.{field.name} has {span.length:,} bytes, at most {MAX_TEXT:,}")
        start = span.offset - self._base
        data = self._data[start : start + span.length] if start >= 0 else b""
        if len(data) != span.length:
            data = self.bytes_of(span)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.refuse(span.offset, f"{kind}.{field.name} is not UTF-8") from None

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at `at`, and the place after it."""
        index = at - self._base
        if 0 <= index < len(self._data) and at < end and self._data[index] < 128:  # nearly all of them
            return self._data[index], at + 1
        whole = self._base + len(self._data) == self.size  # nothing follows what is in memory
        if index < 0 or index >= len(self._data) or (index + 10 > len(self._data) and not whole):
            self._data, self._base, index = os.pread(self.descriptor, _PIECE, at), at, 0
        value = shift = 0
        for byte in self._data[index : index + min(10, end - at)]:
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64:
                    break
                return value, at
            shift += 7
        raise self.refuse(at, "a number that does not end: truncated, damaged, or not an ONNX file")


_CONTINUED = bytes(range(128, 256))
