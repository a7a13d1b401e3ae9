"""The strict reader against the safetensors library: agrees on what is right, refuses at least what it refuses."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import hostile_safetensors as hostile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from edgepack.errors import InputRefused
from edgepack.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, read_header


def _library_refuses(data: bytes) -> bool:
    try:
        deserialize(data)
    except SafetensorError:
        return True
    return False


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_malformed_file_is_refused_in_one_line_that_says_why(name: str, tmp_path: Path) -> None:
    data, word, _ = hostile.CASES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(InputRefused) as caught:
        read_header(path)
    assert time.monotonic() - started < 2
    assert word in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("name", hostile.CASES)
def test_the_corpus_says_rightly_what_the_library_refuses(name: str) -> None:
    data, _, refused = hostile.CASES[name]
    assert _library_refuses(data) is refused


def test_a_file_of_the_library_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        "matrix": generator.standard_normal((3, 5), dtype=np.float32),
        "half": generator.standard_normal(7).astype(np.float16),
        "scalar": np.array(1.5),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(6, dtype=np.int64).reshape(1, 6),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    found, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {t.name: t.shape for t in found} == {name: t.shape for name, t in tensors.items()}
    with safe_open(path, "numpy") as opened:
        assert {t.name for t in found} == set(opened.keys())
    for info in found:
        raw = path.read_bytes()[info.offset : info.offset + info.nbytes]
        assert raw == tensors[info.name].tobytes()
        assert info.parameters == tensors[info.name].size


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_the_width_of_every_dtype_is_the_librarys(dtype: str, tmp_path: Path) -> None:
    data = hostile.file({"a": hostile.tensor(0, DTYPE_BITS[dtype], dtype=dtype, shape=[8])}, bytes(DTYPE_BITS[dtype]))
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert read_header(path)[0][0].dtype == dtype
    assert not _library_refuses(data)


def test_a_header_padded_with_spaces_is_normal(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile.file(json.dumps({"a": hostile.tensor()}).encode() + b"     ", hostile.DATA))
    assert [t.name for t in read_header(path)[0]] == ["a"]


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 120_000_000) + b"{")
        file.truncate(200_000_000)
    with pytest.raises(InputRefused, match=f"at most {MAX_HEADER_BYTES:,}"):
        read_header(path)


@st.composite
def _mutations(draw: st.DrawFn) -> bytes:
    good = bytearray(
        save({"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, metadata={"format": "pt"})
    )
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(good) - 1))
        match draw(st.sampled_from(["set", "delete", "insert", "digit"])):
            case "set":
                good[position] = draw(st.integers(0, 255))
            case "delete":
                del good[position]
            case "insert":
                good.insert(position, draw(st.integers(0, 255)))
            case _:
                digits = [i for i, byte in enumerate(good) if 48 <= byte <= 57]
                if digits:
                    good[digits[position % len(digits)]] = draw(st.integers(48, 57))
    return bytes(good)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=_mutations())
def test_what_the_library_refuses_is_refused_here(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    try:
        found, _ = read_header(path)
    except InputRefused as error:
        assert error.message.isprintable()
        return
    assert not _library_refuses(data)
    assert {(t.name, t.dtype, t.shape) for t in found} == {
        (name, view["dtype"], tuple(view["shape"])) for name, view in deserialize(data)
    }
