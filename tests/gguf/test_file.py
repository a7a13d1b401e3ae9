"""The container: encoding against gguf-py, the checker against a hostile corpus and against ggml's own reader."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepack.errors import InputRefused
from edgepack.gguf.file import (
    ValueType,
    array,
    boolean,
    encode_header,
    f32,
    i32,
    read_gguf,
    read_gguf_shards,
    string,
    u8,
    u16,
    u32,
    u64,
)
from edgepack.gguf.types import TYPES

F32, Q4_K = TYPES["F32"], TYPES["Q4_K"]
TOKENS = ("a", "", "β", "日本語", "🙂", "x" * 300, "\0")
METADATA = {
    "general.architecture": string("llama"),
    "general.name": string("naïve ✓"),
    "a.u8": u8(255),
    "a.u16": u16(65535),
    "a.u32": u32(2**32 - 1),
    "a.i32": i32(-(2**31)),
    "a.u64": u64(2**64 - 1),
    "a.f32": f32(0.1),
    "a.yes": boolean(True),
    "a.no": boolean(False),
    "a.floats": array(ValueType.FLOAT32, np.array([0.5, -1e30], dtype=np.float32)),
    "a.ints": array(ValueType.INT32, [-1, 0, 7]),
    "a.bools": array(ValueType.BOOL, [True, False]),
    "tokenizer.ggml.tokens": array(ValueType.STRING, TOKENS),
}
TENSORS = [
    ("token_embd.weight", (5, 256), F32),
    ("blk.0.attn_q.weight", (3, 256), Q4_K),
    ("blk.0.norm.weight", (7,), TYPES["F16"]),
    ("blk.0.experts.weight", (2, 3, 4), TYPES["BF16"]),
]


def write(path: Path, header: bytes, entries, alignment=32) -> Path:
    """A whole file: header and zeros for weights."""
    size = sum(-(-entry.nbytes // alignment) * alignment for entry in entries)
    path.write_bytes(header + bytes(size))
    return path


def gguf_py_header(path: Path, metadata, tensors, alignment=32) -> bytes:
    """The same content written by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.data_alignment = alignment
    for key, value in metadata.items():
        sub_type = None if value.element is None else gguf.GGUFValueType(value.element)
        writer.add_key_value(key, value.value, gguf.GGUFValueType(value.type), sub_type=sub_type)
    for name, shape, kind in tensors:
        row = shape[-1] // kind.block * kind.block_bytes
        raw = gguf.GGMLQuantizationType(kind.id)
        writer.add_tensor(name, np.zeros((*shape[:-1], row), dtype=np.uint8), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_header_is_byte_for_byte_what_gguf_py_writes(tmp_path):
    header, entries = encode_header(METADATA, TENSORS)
    upstream = gguf_py_header(tmp_path / "peer.gguf", METADATA, TENSORS)
    ours = write(tmp_path / "ours.gguf", header, entries)
    assert ours.read_bytes() == upstream


def test_header_with_another_alignment_is_what_gguf_py_writes(tmp_path):
    header, entries = encode_header(METADATA, TENSORS, alignment=128)
    with_key = METADATA | {"general.alignment": u32(128)}
    upstream = gguf_py_header(tmp_path / "peer.gguf", with_key, TENSORS, alignment=128)
    ours = write(tmp_path / "ours.gguf", header, entries, alignment=128)
    assert ours.read_bytes() == upstream
    assert read_gguf(ours).alignment == 128
    assert all(entry.offset % 128 == 0 for entry in entries)


def test_gguf_py_reads_back_what_was_encoded(tmp_path):
    header, entries = encode_header(METADATA, TENSORS)
    reader = gguf.GGUFReader(write(tmp_path / "m.gguf", header, entries))
    for key, value in METADATA.items():
        read = reader.fields[key].contents()
        if value.type is ValueType.FLOAT32:
            assert read == pytest.approx(value.value, rel=1e-7)
        else:
            assert (tuple(read) if isinstance(read, list) else read) == value.value
    for tensor, entry in zip(reader.tensors, entries, strict=True):
        assert tensor.name == entry.name
        assert tuple(tensor.shape.tolist()) == entry.shape[::-1]
        assert (tensor.tensor_type, tensor.n_bytes) == (entry.type.id, entry.nbytes)
        assert tensor.data_offset == len(header) + entry.offset


def test_reading_gives_back_metadata_and_tensors(tmp_path):
    header, entries = encode_header(METADATA, TENSORS)
    read = read_gguf(write(tmp_path / "m.gguf", header, entries))
    assert list(read.metadata) == list(METADATA)
    for key, value in METADATA.items():
        if value.type is not ValueType.FLOAT32:
            assert read.metadata[key] == value
    assert read.get("a.f32") == np.float32(0.1)
    assert read.get("tokenizer.ggml.tokens") == TOKENS
    assert read.get("absent", 3) == 3
    assert list(read.tensors.values()) == entries
    assert (read.version, read.alignment, read.data_offset) == (3, 32, len(header))
    assert read.architecture == "llama"


def test_encoding_what_was_read_gives_the_same_bytes(tmp_path):
    header, entries = encode_header(METADATA, TENSORS)
    read = read_gguf(write(tmp_path / "m.gguf", header, entries))
    again, _ = encode_header(read.metadata, [(e.name, e.shape, e.type) for e in read.tensors.values()])
    assert again == header


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
SCALARS = {
    ValueType.UINT8: st.integers(0, 255),
    ValueType.INT8: st.integers(-128, 127),
    ValueType.UINT16: st.integers(0, 2**16 - 1),
    ValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    ValueType.UINT32: st.integers(0, 2**32 - 1),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: TEXT,
    ValueType.UINT64: st.integers(0, 2**64 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.FLOAT64: st.floats(allow_nan=False),
}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_array_survives_writing_and_reading(tmp_path, data):
    kind = data.draw(st.sampled_from(list(SCALARS)))
    values = data.draw(st.lists(SCALARS[kind], max_size=60))
    header, _ = encode_header({"k": array(kind, values)}, [])
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    assert read_gguf(path).get("k") == tuple(values)


def test_vocabulary_of_a_quarter_million_tokens_is_read_in_under_a_second(tmp_path):
    tokens = [f"token-{i:x}-é" for i in range(262_144)]
    metadata = {
        "tokenizer.ggml.tokens": array(ValueType.STRING, tokens),
        "tokenizer.ggml.merges": array(ValueType.STRING, [f"{a} x" for a in tokens] * 2),
        "tokenizer.ggml.scores": array(ValueType.FLOAT32, range(262_144)),
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(encode_header(metadata, [])[0])
    start = time.process_time()
    read = read_gguf(path)
    assert time.process_time() - start < 1.0
    assert len(read.metadata["tokenizer.ggml.tokens"].value) == 262_144
    assert read.get("tokenizer.ggml.tokens")[262_143] == tokens[-1]


@pytest.mark.parametrize(
    ("metadata", "tensors", "reason"),
    [
        ({"k": u32(2**32)}, [], "metadata k: .* is no UINT32 value"),
        ({"k": array(ValueType.INT32, [1.5])}, [], "metadata k: .* is no INT32 value"),
        ({"k": array(ValueType.STRING, ["\ud800"])}, [], "metadata k: .* is no STRING value"),
        ({"k": array(ValueType.STRING, [1])}, [], "metadata k: .* is no STRING value"),
        ({"k": array(ValueType.BOOL, [2])}, [], "metadata k: .* is no BOOL value"),
        ({"k": array(ValueType.ARRAY, [[1]])}, [], "not itself an array"),
        ({"k\n": u32(1)}, [], "not printable ASCII"),
        ({"general.alignment": u32(64)}, [], "general.alignment is 64"),
        ({}, [("a" * 64, (1,), F32)], "1 to 63 bytes"),
        ({}, [("../a", (1,), F32)], "looks like a path"),
        ({}, [("a", (1,), F32), ("a", (1,), F32)], "appears twice"),
        ({}, [("a", (0, 4), F32)], "none of them zero"),
        ({}, [("a", (1, 1, 1, 1, 4), F32)], "1 to 4 dimensions"),
        ({}, [("a", (4, 128), Q4_K)], "blocks of 256"),
    ],
)
def test_what_no_reader_takes_is_never_written(metadata, tensors, reason):
    with pytest.raises(InputRefused, match=reason):
        encode_header(metadata, tensors)


# --- llama.cpp as the other reader ------------------------------------------------------------------------------------


def ggml_library() -> str:
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None and package.origin is not None
    return str(next((Path(package.origin).parent / "lib").glob("libggml-base.*")))


# One line in (a path), one line out: what ggml's reader made of the file. A crash of the reader ends the child.
PEER = """
import ctypes, json, sys
ggml = ctypes.CDLL(sys.argv[1])
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]
ggml.gguf_init_from_file.restype = ctypes.c_void_p
ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
for name, result in [("gguf_get_n_kv", ctypes.c_int64), ("gguf_get_n_tensors", ctypes.c_int64),
                     ("gguf_get_data_offset", ctypes.c_size_t), ("gguf_get_alignment", ctypes.c_size_t)]:
    getattr(ggml, name).argtypes = [ctypes.c_void_p]
    getattr(ggml, name).restype = result
ggml.gguf_free.argtypes = ggml.ggml_free.argtypes = [ctypes.c_void_p]
for line in sys.stdin:
    tensors = ctypes.c_void_p()
    file = ggml.gguf_init_from_file(line.strip().encode(), Params(True, ctypes.pointer(tensors)))
    seen = None
    if file:
        seen = [ggml.gguf_get_n_kv(file), ggml.gguf_get_n_tensors(file), ggml.gguf_get_alignment(file),
                ggml.gguf_get_data_offset(file)]
        ggml.gguf_free(file)
        ggml.ggml_free(tensors)
    print(json.dumps(seen), flush=True)
"""


class Peer:
    """ggml's own GGUF reader in a child process."""

    def __init__(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", PEER, ggml_library()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def read(self, path: Path) -> list[int] | None:
        """(keys, tensors, alignment, data offset) as ggml sees them; None when it refuses."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(f"{path}\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        assert line, f"ggml's reader died on {path}"
        return json.loads(line)

    def close(self) -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.close()
        self.child.wait(timeout=10)
        self.child.stdout.close()


@pytest.fixture(scope="module")
def peer():
    peer = Peer()
    yield peer
    peer.close()


def test_ggml_reads_what_was_encoded(tmp_path, peer):
    for alignment in (8, 32, 4096):
        header, entries = encode_header(METADATA, TENSORS, alignment=alignment)
        path = write(tmp_path / "m.gguf", header, entries, alignment)
        keys = len(METADATA) + (alignment != 32)
        assert peer.read(path) == [keys, len(TENSORS), alignment, len(header)]


SMALL, SMALL_ENTRIES = encode_header(
    {
        "general.architecture": string("llama"),
        "general.alignment": u32(32),
        "a.u8": u8(1),
        "a.yes": boolean(True),
        "a.tokens": array(ValueType.STRING, ["ab", "é", ""]),
        "a.ints": array(ValueType.INT16, [1, 2]),
        "split.count": u16(1),
    },
    [("a", (2, 32), TYPES["Q4_0"]), ("b", (3, 2, 4), F32), ("c", (5,), TYPES["F16"])],
)
SMALL_FILE = SMALL + bytes(SMALL_ENTRIES[-1].offset + 32)
INTERESTING = [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 64, 255, 2**16, 2**31, 2**32 - 1, 2**33, 2**62, 2**63 - 1]
INTERESTING += [2**63, 2**64 - 32, 2**64 - 1]
MUTATION = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, len(SMALL) - 1), st.integers(0, 255)),
    st.tuples(st.just("flip"), st.integers(0, len(SMALL) - 1), st.integers(0, 7)),
    st.tuples(st.just("u32"), st.integers(0, len(SMALL) - 4), st.sampled_from(INTERESTING)),
    st.tuples(st.just("u64"), st.integers(0, len(SMALL) - 8), st.sampled_from(INTERESTING)),
    st.tuples(st.just("cut"), st.integers(0, len(SMALL) - 1), st.integers(1, 40)),
    st.tuples(st.just("repeat"), st.integers(0, len(SMALL) - 1), st.integers(1, 40)),
)


def mutate(data: bytes, mutations) -> bytes:
    out = bytearray(data)
    for kind, at, value in mutations:
        if kind == "byte":
            out[at : at + 1] = bytes([value])
        elif kind == "flip":
            out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ (1 << value)])
        elif kind in ("u32", "u64"):
            size = 4 if kind == "u32" else 8
            out[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == "cut":
            del out[at : at + value]
        else:
            out[at:at] = out[at : at + value]
    return bytes(out)


def test_whatever_is_accepted_ggml_accepts_too(tmp_path, peer):
    path = tmp_path / "mutant.gguf"
    outcomes = {"accepted": 0, "refused": 0}

    @settings(deadline=None, max_examples=2500, database=None)
    @given(st.lists(MUTATION, min_size=1, max_size=3))
    def check(mutations):
        path.write_bytes(mutate(SMALL_FILE, mutations))
        try:
            ours = read_gguf(path)
        except InputRefused as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)
            assert str(error).startswith(str(path))
            return
        outcomes["accepted"] += 1
        seen = [len(ours.metadata), len(ours.tensors), ours.alignment, ours.data_offset]
        assert peer.read(path) == seen

    check()
    assert outcomes["accepted"] > 100  # the comparison took place
    assert outcomes["refused"] > 500


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    whole = SMALL + bytes(SMALL_ENTRIES[-1].offset + SMALL_ENTRIES[-1].nbytes)
    path.write_bytes(whole)
    read_gguf(path)  # without the padding of the last tensor it is still whole
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputRefused):
            read_gguf(path)


# --- the hostile corpus -----------------------------------------------------------------------------------------------


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name: bytes = b"t", dims=(32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(keys=(), tensors=(), *, magic=b"GGUF", version=3, order="<", n_kv=None, n_tensors=None, data=4096) -> bytes:
    """A file with anything in it: written without the code under test."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_kv is None else n_kv)
    head = magic + struct.pack(f"{order}IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


ARCHITECTURE = key(b"general.architecture", 8, text(b"llama"))
SPLIT = key(b"split.no", 2, struct.pack("<H", 0)), key(b"split.count", 2, struct.pack("<H", 65535))
NESTED = key(b"k", 9, struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 0, 0))
ARRAY_OF_STRINGS = struct.pack("<IQ", 8, 2) + text(b"ok")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "bad magic": (raw(magic=b"GGML"), "starts with b'GGML'"),
    "empty": (b"", "0 bytes"),
    "truncated": (raw([ARCHITECTURE], data=0)[:40], "truncated"),
    "version 0": (raw(version=0), "version 0"),
    "version 1": (raw(version=1), "version 1"),
    "version 99": (raw(version=99), "version 99"),
    "big-endian": (raw(order=">"), "big-endian"),
    "duplicate key": (raw([ARCHITECTURE, ARCHITECTURE]), "general.architecture appears twice"),
    "duplicate tensor": (raw(tensors=[tensor(), tensor(offset=128)]), "tensor t: the name appears twice"),
    "alignment 0": (raw([key(b"general.alignment", 4, struct.pack("<I", 0))]), "alignment is 0"),
    "alignment 3": (raw([key(b"general.alignment", 4, struct.pack("<I", 3))]), "alignment is 3"),
    "alignment 1": (raw([key(b"general.alignment", 4, struct.pack("<I", 1))]), "alignment is 1,"),
    "alignment 2^31": (raw([key(b"general.alignment", 4, struct.pack("<I", 1 << 31))]), "alignment is 2147483648"),
    "alignment as u64": (raw([key(b"general.alignment", 10, struct.pack("<Q", 32))]), "UINT64, expected UINT32"),
    "unknown tensor type": (raw(tensors=[tensor(kind=43)]), "type 43 is not known"),
    "negative tensor type": (raw(tensors=[tensor(kind=2**32 - 1)]), "type 4294967295 is not known"),
    "removed tensor type": (raw(tensors=[tensor(kind=31)]), "Q4_0_4_4, which llama.cpp no longer reads"),
    "unknown value type": (raw([key(b"k", 13, bytes(8))]), "metadata k: value type 13"),
    "n_kv 2^63": (raw(n_kv=2**63), "announces 9223372036854775808 metadata entries"),
    "n_kv more than fits": (raw(n_kv=60000), "which a file of 4128 bytes can't hold"),
    "n_tensors 2^60": (raw(n_tensors=2**60), "announces 1152921504606846976 tensors"),
    "array 2^62": (raw([key(b"k", 9, struct.pack("<IQ", 0, 2**62))]), "array of 4611686018427387904 elements"),
    "array 2^33": (raw([key(b"k", 9, struct.pack("<IQ", 10, 2**33))]), "array of 8589934592 elements"),
    "array of strings that lies": (raw([key(b"k", 9, struct.pack("<IQ", 8, 2**20))]), "bytes of the file are left"),
    "n_dims 10^6": (raw(tensors=[text(b"t") + struct.pack("<I", 10**6)]), "1000000 dimensions"),
    "n_dims 0": (raw(tensors=[text(b"t") + struct.pack("<IIQ", 0, 0, 0) + bytes(8)]), "0 dimensions"),
    "dims overflow": (raw(tensors=[tensor(dims=(2**40, 2**40))]), "overflows"),
    "dims wrap to 4": (raw(tensors=[tensor(dims=(2**62 + 1, 4))]), "overflows"),
    "dim 2^64-1": (raw(tensors=[tensor(dims=(2**64 - 1,))]), "overflows"),
    "nested array": (raw([NESTED]), "array of arrays"),
    "string 2^63": (raw([text(b"k") + struct.pack("<IQ", 8, 2**63)]), "9223372036854775808 bytes long"),
    "string 2^63 in array": (raw([key(b"k", 9, struct.pack("<IQQ", 8, 1, 2**63))]), "element 0 is 92233720368"),
    "string past the end": (raw([text(b"k") + struct.pack("<IQ", 8, 2**20)]), "reaches byte"),
    "overlap": (raw(tensors=[tensor(b"a"), tensor(b"b", offset=0)]), "offset 0, expected 128"),
    "gap": (raw(tensors=[tensor(b"a"), tensor(b"b", offset=256)]), "offset 256, expected 128"),
    "misaligned": (raw(tensors=[tensor(b"a", (33,)), tensor(b"b", offset=132)]), "offset 132, expected 160"),
    "offset 2^64-32": (raw(tensors=[tensor(offset=2**64 - 32)]), "offset 18446744073709551584"),
    "zero dim": (raw(tensors=[tensor(dims=(32, 0))]), "zero dimension"),
    "width misses the block": (raw(tensors=[tensor(dims=(100,), kind=12)]), "256 weights in a block of Q4_K"),
    "path name": (raw(tensors=[tensor(b"../../etc/passwd")]), "looks like a path"),
    "absolute name": (raw(tensors=[tensor(b"/etc/passwd")]), "looks like a path"),
    "name of 64 bytes": (raw(tensors=[tensor(b"n" * 64)]), "1 to 63 bytes"),
    "empty name": (raw(tensors=[tensor(b"")]), "1 to 63 bytes"),
    "name with a newline": (raw(tensors=[tensor(b"a\nb")]), "characters other than"),
    "name not UTF-8": (raw(tensors=[tensor(b"\xff")]), "characters other than"),
    "split.count 65535": (raw(SPLIT), "split.count is 65535"),
    "split.no beyond": (raw([key(b"split.no", 2, b"\4\0"), key(b"split.count", 2, b"\4\0")]), "split.no is 4"),
    "64 GB tensor": (raw(tensors=[tensor(dims=(2**34,))]), "ends at byte 68719476800, the file at 4160"),
    "template of 1 MB": (raw([key(b"tokenizer.chat_template", 8, text(b"x" * 2**20))]), "at most 65536"),
    "second template": (raw([key(b"tokenizer.chat_template.rag", 8, text(b"x" * 65537))]), "at most 65536"),
    "key of 1 MB": (raw([key(b"k" * 2**20, 0, b"\0")]), "1 to 256 bytes"),
    "empty key": (raw([key(b"", 0, b"\0")]), "1 to 256 bytes"),
    "NUL in key": (raw([key(b"a\0b", 0, b"\0")]), "not printable ASCII"),
    "NUL in value": (raw([key(b"general.architecture", 8, text(b"llama\0x"))]), "zero byte"),
    "value not UTF-8": (raw([key(b"k", 8, text(b"ok\xff"))]), "metadata k: the text is not UTF-8 .byte 2"),
    "element not UTF-8": (raw([key(b"k", 9, ARRAY_OF_STRINGS + text(b"\xe2\x82"))]), "element 1 is not UTF-8"),
    "boolean 2": (raw([key(b"k", 7, b"\2")]), "neither 0 nor 1"),
    "boolean 2 in array": (raw([key(b"k", 9, struct.pack("<IQ", 7, 2) + b"\1\2")]), "neither 0 nor 1"),
    "trailing bytes": (raw(tensors=[tensor()], data=4096), "3968 unknown bytes follow"),
    "pickle": (b"\x80\x04\x95" + bytes(100), "starts with b'.x80.x04"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_with_file_place_and_reason(tmp_path, case):
    data, reason = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=reason) as refusal:
        read_gguf(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400
    assert refusal.value.exit_code == 5


def test_sound_file_of_the_same_builder_is_accepted(tmp_path):
    path = tmp_path / "sound.gguf"
    path.write_bytes(raw([ARCHITECTURE], [tensor(b"a"), tensor(b"b", offset=128)], data=256))
    assert list(read_gguf(path).tensors) == ["a", "b"]
    path.write_bytes(raw([ARCHITECTURE], [tensor(b"a"), tensor(b"b", offset=128)], data=256, version=2))
    assert read_gguf(path).version == 2
    path.write_bytes(raw([ARCHITECTURE], data=0))
    assert read_gguf(path).tensors == {}


def test_bad_text_is_found_wherever_it_stands_in_a_long_array(tmp_path):
    path = tmp_path / "m.gguf"
    good = [b"ab\xc3\xa9" * 40] * 20000
    for place in (0, 7777, 19999):
        strings = [*good]
        strings[place] = b"\xc3"  # starts a sequence that the next string would complete
        body = key(b"k", 9, struct.pack("<IQ", 8, len(strings)) + b"".join(text(s) for s in strings))
        path.write_bytes(raw([body], data=0))
        with pytest.raises(InputRefused, match=f"element {place} is not UTF-8"):
            read_gguf(path)


COST = """
import json, sys, time
from pathlib import Path
from edgepack.errors import InputRefused
from edgepack.gguf.file import read_gguf
slowest = 0.0
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        read_gguf(path)
    except InputRefused:
        slowest = max(slowest, time.process_time() - start)
    else:
        raise SystemExit(f"{path} was accepted")
# not ru_maxrss, which a process started by vfork inherits from its parent
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([slowest, int(peak.split()[1])]))
"""


def sparse(path: Path, head: bytes, size: int) -> None:
    path.write_bytes(head)
    os.truncate(path, size)


def test_no_hostile_file_costs_two_seconds_or_300_mb(tmp_path):
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.gguf").write_bytes(data)
    # zeros without end, announced as empty strings, as one long text, as keys, as numbers: all on a 1 TB file
    most = struct.pack("<IQ", 8, 2**22)
    sparse(tmp_path / "a.gguf", raw([text(b"k") + struct.pack("<I", 9) + most], data=0, n_kv=2), 2**40)
    sparse(tmp_path / "b.gguf", raw([text(b"k") + struct.pack("<IQ", 8, 2**24)], data=0), 2**40)
    sparse(tmp_path / "c.gguf", raw(n_kv=2**16, data=0), 2**40)
    sparse(tmp_path / "d.gguf", raw([text(b"k") + struct.pack("<IIQ", 9, 10, 2**22)], n_kv=2, data=0), 2**40)
    long = struct.pack("<IIQQ", 9, 8, 3 * 2**20, 2**24)
    sparse(tmp_path / "e.gguf", raw([text(b"k") + long], n_kv=2, data=0), 2**40)
    child = subprocess.run(
        [sys.executable, "-c", COST, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    slowest, peak_kb = json.loads(child.stdout)
    assert slowest < 2.0
    assert peak_kb < 300_000


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        previous = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is limited to 108 bytes
        try:
            listener.bind("socket.gguf")
        finally:
            os.chdir(previous)
        for name in ("fifo.gguf", "folder.gguf", "socket.gguf", "absent.gguf", "n\nn.gguf", "x" * 300):
            with pytest.raises(InputRefused) as refusal:
                read_gguf(tmp_path / name)
            assert str(refusal.value).isprintable()


# --- split files ------------------------------------------------------------------------------------------------------


def split(folder: Path, parts: int = 3, *, total: int | None = None) -> list[Path]:
    """A set of shards as gguf-py writes it."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    for number in range(2 * parts - (1 if total is None else 0)):
        writer.add_tensor(f"blk.{number}.weight", np.full((2, 32), number, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def test_split_set_is_read_from_any_of_its_files(tmp_path):
    paths = split(tmp_path)
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in paths:
        shards = read_gguf_shards(path)
        assert [shard.path for shard in shards] == paths
        assert [list(shard.tensors) for shard in shards] == [
            ["blk.0.weight", "blk.1.weight"], ["blk.2.weight", "blk.3.weight"], ["blk.4.weight"],
        ]  # fmt: skip


def test_single_file_is_a_set_of_one(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(SMALL_FILE)
    assert [shard.path for shard in read_gguf_shards(path)] == [path]


def test_missing_shard_is_named(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(InputRefused, match=r"m-00002-of-00003\.gguf: shard 2 of 3 is missing"):
        read_gguf_shards(paths[0])


def test_shards_in_the_wrong_place_are_refused(tmp_path):
    paths = split(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(InputRefused, match=r"split\.no 1 of split\.count 3, but its name says 2 of 3"):
        read_gguf_shards(paths[0])


def test_renamed_shard_is_refused(tmp_path):
    renamed = split(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(InputRefused, match="one of 3 shards, but its name"):
        read_gguf_shards(renamed)


def shard(number: int, names: list[str], total: int) -> bytes:
    metadata = {"split.no": u16(number), "split.count": u16(2), "split.tensors.count": i32(total)}
    header, entries = encode_header(metadata, [(name, (8,), F32) for name in names])
    return header + bytes(sum(entry.nbytes for entry in entries))


def test_tensor_in_two_shards_is_refused(tmp_path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(shard(0, ["a"], 2))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(shard(1, ["a"], 2))
    with pytest.raises(InputRefused, match="tensor a is also in m-00001"):
        read_gguf_shards(tmp_path / "m-00001-of-00002.gguf")


def test_shards_that_do_not_add_up_are_refused(tmp_path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(shard(0, ["a"], 5))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(shard(1, ["b"], 5))
    with pytest.raises(InputRefused, match=r"hold 2 tensors, split\.tensors\.count says 5"):
        read_gguf_shards(tmp_path / "m-00001-of-00002.gguf")
