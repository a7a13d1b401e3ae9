"""GGUF files: everything about the container under one name.

The parts are values.py (metadata values), header.py (encoding) and reader.py (the strict checker).
"""

from __future__ import annotations

from edgepack.gguf.header import TensorEntry, encode_header, pad
from edgepack.gguf.reader import GgufFile, read_gguf, read_gguf_shards
from edgepack.gguf.values import (
    Metadata,
    PackedArray,
    Value,
    ValueType,
    array,
    boolean,
    f32,
    i32,
    string,
    u8,
    u16,
    u32,
    u64,
)

__all__ = [
    "GgufFile",
    "Metadata",
    "PackedArray",
    "TensorEntry",
    "Value",
    "ValueType",
    "array",
    "boolean",
    "encode_header",
    "f32",
    "i32",
    "pad",
    "read_gguf",
    "read_gguf_shards",
    "string",
    "u8",
    "u16",
    "u32",
    "u64",
]
