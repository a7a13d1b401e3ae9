"""Safetensors files that are wrong in one way each: the bytes, and a word the refusal must contain."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any


def file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Bytes of a safetensors file with any header (an object, or the raw bytes of one)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int = 0, end: int = 16, *, dtype: Any = "F32", shape: Any = (4,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DATA = bytes(16)
ONE = json.dumps(tensor())
GOOD = file({"a": tensor()}, DATA)

# name: (bytes, word of the message, does the safetensors library refuse it too)
CASES: dict[str, tuple[bytes, str, bool]] = {
    "empty": (b"", "too short", True),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too short", True),
    "header length 2^63": (file(b"{}", length=1 << 63), "header length 9,223,372,036,854,775,808", True),
    "header length 2^64-1": (file(b"{}", length=(1 << 64) - 1), "header length", True),
    "header longer than the file": (file(b"{}", length=4096), "truncated", True),
    "header not UTF-8": (file(b'{"\xff":1}'), "not UTF-8", True),
    "header not JSON": (file(b'{"a":'), "not valid JSON", True),
    "header an array": (file(b"[1,2,3]"), "must start with", True),
    "header starts with a space": (file(b" {}"), "must start with", False),
    "NaN in the header": (file(b'{"a":NaN}'), "NaN", True),
    "deep JSON": (file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deep", True),
    "duplicate name": (file(b'{"a":%b,"a":%b}' % ((ONE.encode(),) * 2), DATA), "duplicate key 'a'", False),
    "duplicate key inside": (
        file(b'{"a":{"dtype":"F16","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', DATA),
        "duplicate key 'dtype'",
        True,
    ),
    "overlap": (file({"a": tensor(), "b": tensor(8, 24)}, bytes(24)), "tensor b overlaps", True),
    "the same bytes twice": (file({"a": tensor(), "b": tensor()}, DATA), "overlaps", True),
    "hole": (file({"a": tensor(), "b": tensor(20, 36)}, bytes(36)), "tensor b leaves a hole", True),
    "hole at the start": (file({"a": tensor(4, 20)}, bytes(20)), "tensor a leaves a hole", True),
    "past the end of the file": (file({"a": tensor()}, bytes(12)), "truncated", True),
    "bytes after the last tensor": (file({"a": tensor()}, bytes(20)), "4 bytes after the last tensor", True),
    "no tensors but data": (file({}, bytes(4)), "4 bytes after", True),
    "negative offset": (file({"a": tensor(-16, 0)}, DATA), "data_offsets", True),
    "end before begin": (file({"a": tensor(16, 0)}, DATA), "data_offsets", True),
    "offset 2^64-16": (file({"a": tensor((1 << 64) - 16, 1 << 64)}, DATA), "data_offsets", True),
    "offset a float": (file({"a": tensor(0.0, 16.0)}, DATA), "data_offsets", True),  # type: ignore[arg-type]
    "offset a boolean": (file({"a": tensor(False, 16)}, DATA), "data_offsets", True),
    "three offsets": (
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, DATA),
        "data_offsets",
        True,
    ),
    "shape that wraps around to 4": (file({"a": tensor(shape=[1 << 62, 1 << 62, 4])}, DATA), "needs", True),
    "shape too large for the length": (file({"a": tensor(shape=[5])}, DATA), "needs 20 bytes", True),
    "negative dimension": (file({"a": tensor(shape=[-4])}, DATA), "shape", True),
    "nine dimensions": (file({"a": tensor(shape=[1] * 8 + [4])}, DATA), "shape", False),
    "shape no array": (
        file({"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, DATA),
        "shape",
        True,
    ),
    "unknown dtype": (file({"a": tensor(dtype="F99")}, DATA), "'F99'", True),
    "dtype a number": (file({"a": tensor(dtype=32)}, DATA), "'32'", True),
    "entry a string": (file({"a": "F32"}, DATA), "expected exactly", True),
    "entry without a shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, DATA), "expected exactly", True),
    "metadata not strings": (file({"__metadata__": {"n": 1}, "a": tensor()}, DATA), "__metadata__", True),
    "metadata an array": (file({"__metadata__": [], "a": tensor()}, DATA), "__metadata__", True),
    "name with ../": (file({"../a": tensor()}, DATA), "not allowed", False),
    "name an absolute path": (file({"/etc/passwd": tensor()}, DATA), "not allowed", False),
    "name with a newline": (file({"a\nb": tensor()}, DATA), "not allowed", False),
    "name with NUL": (file({"a\0": tensor()}, DATA), "not allowed", False),
    "name that reads right to left": (file({"a\u202eb": tensor()}, DATA), "not allowed", False),
    "empty name": (file({"": tensor()}, DATA), "not allowed", False),
    "name of 300 characters": (file({"a" * 300: tensor()}, DATA), "not allowed", False),
    "two empty tensors in one place": (
        file({"a": tensor(0, 0, shape=[0]), "b": tensor(0, 0, shape=[0]), "c": tensor()}, DATA),
        "both empty",
        False,
    ),
    "a pickle": (pickle.dumps({"a": [1.0] * 100}, protocol=4), "a Python pickle", True),
    "an old pickle": (pickle.dumps({"a": [1.0] * 100}, protocol=2), "a Python pickle", True),
    "a zip": (b"PK\x03\x04" + bytes(100), "a zip archive", True),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "Git LFS pointer",
        True,
    ),
    "an HTML page": (b"<!DOCTYPE html><html><body>Not Found</body></html>", "an HTML page", True),
    "a GGUF": (b"GGUF" + bytes(100), "a GGUF file", True),
}
