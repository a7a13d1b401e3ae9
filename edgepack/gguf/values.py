"""The metadata values of a GGUF file: thirteen types, their constructors, and arrays kept as the bytes of the file.

A vocabulary is an array of up to a few hundred thousand strings. It is read, checked and copied as one run of bytes
and decoded only when somebody asks for its elements. Knows nothing of files.

Source: llama.cpp `ggml/include/gguf.h` (enum gguf_type).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, overload

import numpy as np
import numpy.typing as npt


class ValueType(IntEnum):
    """Type ids of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct letters, little endian, no padding; strings and arrays have no fixed size
STRUCT = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
SIZE = {kind: struct.calcsize("<" + letter) for kind, letter in STRUCT.items()}


class PackedArray(Sequence[Any]):
    """An array as it stands in a file: equal to a tuple of the same values, decoded on first use.

    Args:
        element: Type of the elements; never ARRAY.
        count: Number of elements.
        data: Their bytes, checked by whoever made this: for strings a chain of (uint64 length, UTF-8 text).
    """

    __slots__ = ("_count", "_values", "data", "element")

    def __init__(self, element: ValueType, count: int, data: bytes) -> None:
        self.element = element
        self.data = data
        self._count = count
        self._values: tuple[Any, ...] | None = None

    def values(self) -> tuple[Any, ...]:
        """Every element as a plain Python value."""
        if self._values is None:
            if self.element is ValueType.STRING:
                self._values = tuple(self._strings())
            else:
                self._values = struct.unpack(f"<{self._count}{STRUCT[self.element]}", self.data)
        return self._values

    def _strings(self) -> Iterator[str]:
        data, position, length_at = self.data, 0, struct.Struct("<Q").unpack_from
        for _ in range(self._count):
            end = position + 8 + length_at(data, position)[0]
            yield data[position + 8 : end].decode()
            position = end

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.values()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedArray):
            return (self.element, len(self), self.data) == (other.element, len(other), other.data)
        return isinstance(other, tuple | list) and self.values() == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PackedArray({self.element.name}, {self._count} elements)"


@dataclass(frozen=True)
class Value:
    """A typed metadata value.

    Args:
        type: How it is stored.
        value: int, float, bool, str, or for arrays a sequence of those (a tuple, or a PackedArray from a file).
        element: For arrays, the type of their elements.
    """

    type: ValueType
    value: Any
    element: ValueType | None = None


Metadata = dict[str, Value]


def u8(value: int) -> Value:
    """An unsigned 8-bit integer."""
    return Value(ValueType.UINT8, int(value))


def u16(value: int) -> Value:
    """An unsigned 16-bit integer (`split.no`, `split.count`)."""
    return Value(ValueType.UINT16, int(value))


def u32(value: int) -> Value:
    """An unsigned 32-bit integer: counts, sizes, token ids."""
    return Value(ValueType.UINT32, int(value))


def i32(value: int) -> Value:
    """A signed 32-bit integer."""
    return Value(ValueType.INT32, int(value))


def u64(value: int) -> Value:
    """An unsigned 64-bit integer."""
    return Value(ValueType.UINT64, int(value))


def f32(value: float) -> Value:
    """A 32-bit float."""
    return Value(ValueType.FLOAT32, float(value))


def boolean(value: bool) -> Value:
    """A truth value, one byte in the file."""
    return Value(ValueType.BOOL, bool(value))


def string(value: str) -> Value:
    """A UTF-8 string."""
    return Value(ValueType.STRING, str(value))


def array(element: ValueType, values: Iterable[Any] | npt.NDArray[Any]) -> Value:
    """An array of one element type; strings, numbers or booleans, never arrays (llama.cpp reads no nested ones)."""
    if isinstance(values, PackedArray):
        return Value(ValueType.ARRAY, values, element)
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    return Value(ValueType.ARRAY, tuple(plain), element)
