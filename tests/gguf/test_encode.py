"""Our encoder against ggml's: never more of the error that ggml minimises, decoded by ggml."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepack.checkpoint import open_checkpoint, read_rows
from edgepack.errors import InputRefused, UsageError
from edgepack.gguf import blocks, encode, ggml
from edgepack.gguf.types import TYPES, row_bytes

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
ENCODABLE = sorted(encode.ENCODABLE)


def _encode(rows: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    out = np.zeros((len(rows), row_bytes(TYPES[name], rows.shape[1])), dtype=np.uint8)
    encode.quantize_rows(rows, TYPES[name], out.reshape(-1), importance)
    return out


def _ggml(rows: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    out = np.zeros((len(rows), row_bytes(TYPES[name], rows.shape[1])), dtype=np.uint8)
    ggml.quantize_rows(rows, TYPES[name], out.reshape(-1), importance)
    return out


def _error(rows: np.ndarray, data: np.ndarray, name: str, importance: np.ndarray | None) -> float:
    weights = encode.error_weights(rows, TYPES[name], importance).astype(np.float64)
    return float(np.sum(weights * (blocks.dequantize(data, TYPES[name], rows.shape[1]) - rows) ** 2))


def _heavy_tails(count: int, width: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, (count, width)) * 0.03).astype(np.float32)


def _trained() -> np.ndarray:
    """Rows of the example model, as wide as a superblock needs."""
    tensors = open_checkpoint(MODEL).tensors
    name = next(name for name, info in tensors.items() if info.shape[-1] % 256 == 0 and len(info.shape) == 2)
    raw = read_rows(tensors[name], 0, 256)
    return (raw.astype(np.uint32) << 16).view(np.float32) if raw.dtype == np.uint16 else raw.astype(np.float32)


def _importance(width: int) -> np.ndarray:
    return np.random.default_rng(9).gamma(0.5, 3.0, width).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ENCODABLE)
def test_the_error_is_no_larger_than_ggmls(name: str, weighted: bool) -> None:
    for rows in (_heavy_tails(128, 768), _trained()):
        importance = _importance(rows.shape[1]) if weighted else None
        data = _encode(rows, name, importance)
        assert _error(rows, data, name, importance) <= _error(rows, _ggml(rows, name, importance), name, importance)
        assert ggml.valid_rows(TYPES[name], data)


def test_the_weights_are_ggmls() -> None:
    """As quantize_row_q4_K_impl, quantize_row_q2_K_ref and so on write them, in plain loops."""
    rows, importance = _heavy_tails(2, 512), _importance(512)
    x = rows.astype(np.float64)
    for name, row, column, expected in (
        ("Q4_K", 1, 300, importance[300] * np.sqrt(2 * np.sum(x[1, 256:] ** 2) / 256 + x[1, 300] ** 2)),
        ("Q2_K", 0, 9, importance[9] * np.sqrt(np.sum(x[0, :256] ** 2) / 256 + x[0, 9] ** 2)),
        ("Q4_0", 0, 9, importance[9] * np.sqrt(np.sum(x[0] ** 2) / 512 + x[0, 9] ** 2)),
        ("IQ4_NL", 0, 40, importance[40] * np.sqrt(2 * np.sum(x[0, 32:64] ** 2) / 32 + x[0, 40] ** 2)),
        ("Q6_K", 1, 77, importance[77]),
    ):
        np.testing.assert_allclose(
            encode.error_weights(rows, TYPES[name], importance)[row, column], expected, rtol=1e-5
        )
    for name, expected in (
        ("Q5_K", np.sqrt(np.mean(x[1, 288:320] ** 2)) + abs(x[1, 300])),
        ("Q2_K", abs(x[1, 300])),
        ("Q3_K", x[1, 300] ** 2),
    ):
        np.testing.assert_allclose(encode.error_weights(rows, TYPES[name], None)[1, 300], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODABLE)
def test_rows_do_not_depend_on_one_another(name: str) -> None:
    rows, importance = _heavy_tails(11, 512, 3), _importance(512)
    for values in (None, importance):
        one_by_one = b"".join(_encode(rows[i : i + 1], name, values).tobytes() for i in range(11))
        assert _encode(rows, name, values).tobytes() == one_by_one


@pytest.mark.parametrize("name", ENCODABLE)
def test_odd_rows_come_back_as_near_as_ggml_brings_them(name: str) -> None:
    ramp = np.linspace(-1, 1, 512, dtype=np.float32)
    spike = np.zeros(512, dtype=np.float32)
    spike[37] = -3
    rows = np.stack([np.zeros(512, np.float32), np.full(512, 0.7, np.float32), np.full(512, -0.7, np.float32)])
    rows = np.concatenate([rows, [ramp, spike, ramp**2 + 1, -1 - ramp**2, ramp * 1e4, ramp * 1e-4]]).astype(np.float32)
    ours = blocks.dequantize(_encode(rows, name), TYPES[name], 512)
    theirs = blocks.dequantize(_ggml(rows, name), TYPES[name], 512)
    assert np.all(ours[0] == 0)
    for row, ours_row, theirs_row in zip(rows, ours, theirs, strict=True):
        worst = 1.5 * np.linalg.norm(theirs_row - row) + 1e-3 * np.linalg.norm(row)
        assert np.linalg.norm(ours_row - row) <= worst


@pytest.mark.parametrize("name", ENCODABLE)
def test_importance_that_is_zero_in_places_or_everywhere(name: str) -> None:
    rows, importance = _heavy_tails(16, 512, 5), _importance(512)
    importance[64:128] = 0
    values = blocks.dequantize(_encode(rows, name, importance), TYPES[name], 512)
    assert np.linalg.norm(values[:, 64:128] - rows[:, 64:128]) < 0.8 * np.linalg.norm(rows[:, 64:128])
    nothing = np.zeros(512, dtype=np.float32)
    assert _encode(rows, name, nothing).tobytes() == _encode(rows, name).tobytes()
    for factor in (1e-12, 1e12):  # only ratios count
        scaled = _encode(rows, name, importance * np.float32(factor))
        same = _encode(rows, name, importance)
        assert np.mean(scaled == same) > 0.99


@pytest.mark.parametrize("name", ENCODABLE)
def test_weights_beyond_the_type_give_a_row_that_validation_refuses(name: str) -> None:
    for size in (1e12, 1e30):
        rows = _heavy_tails(2, 512)
        rows[1] *= np.float32(size)
        assert not ggml.valid_rows(TYPES[name], _encode(rows, name))


def test_what_does_not_fit_is_refused() -> None:
    rows, out = np.zeros((2, 256), dtype=np.float32), np.zeros(288, dtype=np.uint8)
    with pytest.raises(UsageError, match="no encoder for IQ2_S"):
        encode.quantize_rows(rows, TYPES["IQ2_S"], out)
    with pytest.raises(InputRefused, match="does not divide"):
        encode.quantize_rows(np.zeros((2, 320), dtype=np.float32), TYPES["Q4_K"], out)
    for bad_rows, bad_out, importance in (
        (rows.astype(np.float64), out, None),
        (rows[:, ::2], out, None),
        (rows, out[:-1], None),
        (rows, out, np.ones(255, dtype=np.float32)),
    ):
        with pytest.raises(ValueError, match="must be"):
            encode.quantize_rows(bad_rows, TYPES["Q4_K"], bad_out, importance)
