"""Blocks taken apart and put together, against ggml's own decoders and gguf-py's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.errors import InputRefused, UsageError
from edgepack.gguf import blocks, ggml
from edgepack.gguf.types import TYPES, row_bytes

SCALAR = sorted(blocks.SCALAR)
# Types that gguf-py 0.19 has no decoder for, or quantizes by another layout.
IN_GGUF_PY = [name for name in ggml.QUANTIZABLE if name not in ("NVFP4", "Q2_0", "Q1_0")]


def _quantized(name: str, shape: tuple[int, int] = (8, 512), seed: int = 0) -> np.ndarray:
    kind = TYPES[name]
    rows = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    out = np.zeros((shape[0], row_bytes(kind, shape[1])), dtype=np.uint8)
    ggml.quantize_rows(rows, kind, out.reshape(-1), np.ones(shape[1], dtype=np.float32))
    return out


@pytest.mark.parametrize("name", SCALAR)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_bytes_survive_unpack_and_pack_and_decode_as_ggml_does(name: str, data: st.DataObject) -> None:
    kind = TYPES[name]
    count, per_row = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    size = kind.block_bytes * count * per_row
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8).reshape(count, -1)
    grid = blocks.unpack(raw, kind, kind.block * per_row)
    assert blocks.pack(grid, kind).tobytes() == raw.tobytes()
    with np.errstate(invalid="ignore"):  # arbitrary scales: infinity times zero
        ours = grid.values(kind)
    theirs = blocks.dequantize(raw, kind, kind.block * per_row)
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert np.all(same | (np.isnan(ours) & np.isnan(theirs)))


@pytest.mark.parametrize("name", SCALAR)
def test_many_random_blocks_decode_as_ggml_does(name: str) -> None:
    kind = TYPES[name]
    raw = np.random.default_rng(1).integers(0, 256, (64, row_bytes(kind, 1024)), dtype=np.uint8)
    grid = blocks.unpack(raw, kind, 1024)
    assert blocks.pack(grid, kind).tobytes() == raw.tobytes()
    with np.errstate(invalid="ignore"):
        ours = grid.values(kind)
    np.testing.assert_array_equal(ours, blocks.dequantize(raw, kind, 1024))


@pytest.mark.parametrize("name", IN_GGUF_PY)
def test_ggml_and_gguf_py_decode_alike(name: str) -> None:
    data = _quantized(name)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(blocks.dequantize(data, TYPES[name], 512), theirs, rtol=2e-6, atol=1e-7)


def test_float_rows_are_their_own_values() -> None:
    rows = np.random.default_rng(2).standard_normal((3, 7), dtype=np.float32)
    np.testing.assert_array_equal(blocks.dequantize(rows.view(np.uint8), TYPES["F32"], 7), rows)


@pytest.mark.parametrize("name", SCALAR)
def test_a_changed_code_changes_its_weight_by_whole_levels_and_no_other(name: str) -> None:
    kind, form = TYPES[name], blocks.FORMS[name]
    data = _quantized(name)
    grid = blocks.unpack(data, kind, 512)
    before = blocks.dequantize(data, kind, 512)
    rng = np.random.default_rng(3)
    for row, column in zip(rng.integers(0, 8, 20), rng.integers(0, 512, 20), strict=True):
        codes = grid.codes.copy()
        codes[row, column] = rng.integers(0, len(form.levels))
        changed = blocks.pack(blocks.Grid(codes, grid.scales, grid.offsets, grid.frame), kind)
        after = blocks.dequantize(changed, kind, 512)
        scale = grid.scales[row, column // form.sub]
        expected = before.copy()
        expected[row, column] += scale * (form.levels[codes[row, column]] - form.levels[grid.codes[row, column]])
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCALAR)
def test_levels_ascend_and_every_code_is_in_range(name: str) -> None:
    form = blocks.FORMS[name]
    assert np.all(np.diff(form.levels) > 0)
    raw = np.random.default_rng(4).integers(0, 256, (16, row_bytes(TYPES[name], 256)), dtype=np.uint8)
    codes = blocks.unpack(raw, TYPES[name], 256).codes
    assert set(np.unique(codes)) == set(range(len(form.levels)))


def test_what_has_no_codes_of_single_weights_is_refused() -> None:
    data = _quantized("IQ2_S")
    with pytest.raises(UsageError, match="IQ2_S has no codes of single weights"):
        blocks.unpack(data, TYPES["IQ2_S"], 512)
    with pytest.raises(UsageError, match="ggml has no decoder for Q8_K"):
        blocks.dequantize(np.zeros(292, dtype=np.uint8), TYPES["Q8_K"], 256)


def test_rows_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(InputRefused, match="a row of 320 does not divide"):
        blocks.unpack(np.zeros(144, dtype=np.uint8), TYPES["Q4_K"], 320)
    with pytest.raises(ValueError, match="data must be uint8 rows of 288 bytes"):
        blocks.unpack(np.zeros(144, dtype=np.uint8), TYPES["Q4_K"], 512)
    with pytest.raises(ValueError, match="contiguous blocks of 144 bytes"):
        ggml.to_float(TYPES["Q4_K"], np.zeros(143, dtype=np.uint8), np.zeros(256, dtype=np.float32))
    with pytest.raises(ValueError, match="out must be 256 contiguous float32"):
        ggml.to_float(TYPES["Q4_K"], np.zeros(144, dtype=np.uint8), np.zeros(255, dtype=np.float32))
