"""Column feedback against naive maths in float64 and against ggml's own bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgepack.errors import UsageError
from edgepack.gguf import blocks, feedback, ggml
from edgepack.gguf.types import TYPES, row_bytes

TYPES_TRIED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def _moments(width: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that depend on one another, as those of a layer do."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((4 * width, width // 4)) @ rng.standard_normal((width // 4, width))
    inputs = (inputs + 4 * rng.standard_normal(inputs.shape)) * rng.gamma(2, 0.5, width)
    moments = inputs.T @ inputs / len(inputs)
    return moments + 0.01 * np.mean(np.diag(moments)) * np.eye(width)


def _factor(moments: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(moments)).T, dtype=np.float32)


def _rows(count: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32) * np.float32(0.05)


def _plain(rows: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
    out = np.zeros((len(rows), row_bytes(TYPES[name], rows.shape[1])), dtype=np.uint8)
    ggml.quantize_rows(rows, TYPES[name], out.reshape(-1), importance)
    return out


def _fed_back(
    rows: np.ndarray, name: str, importance: np.ndarray | None, factor: np.ndarray, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros((len(rows), row_bytes(TYPES[name], rows.shape[1])), dtype=np.uint8)
    costs = feedback.quantize_rows_with_feedback(rows, TYPES[name], out.reshape(-1), importance, factor, order)
    return out, costs


def _cost(rows: np.ndarray, data: np.ndarray, name: str, moments: np.ndarray) -> np.ndarray:
    """The cost d H d^T of every row, from what ggml decodes."""
    error = blocks.dequantize(data, TYPES[name], rows.shape[1]).astype(np.float64) - rows
    return np.einsum("ni,ij,nj->n", error, moments, error)


@pytest.mark.parametrize("name", TYPES_TRIED)
def test_no_row_is_worse_than_ggmls_and_the_costs_are_true(name: str) -> None:
    moments, rows = _moments(256), _rows(80, 256)
    importance = np.diag(moments).astype(np.float32)
    plain = _plain(rows, name, importance)
    data, costs = _fed_back(rows, name, importance, _factor(moments))
    before, after = _cost(rows, plain, name, moments), _cost(rows, data, name, moments)
    np.testing.assert_allclose(costs, np.stack([before, after], axis=1), rtol=2e-3)
    assert np.all(costs[:, 1] <= costs[:, 0])
    assert after.sum() < 0.85 * before.sum()
    assert ggml.valid_rows(TYPES[name], data)


def test_codes_are_those_of_the_textbook() -> None:
    """One row in float64, column by column, with the inverse of what is left of H (GPTQ, equations 2 and 3)."""
    width, name = 256, "Q4_K"
    moments, rows = _moments(width, 3), _rows(4, width, 4)
    data, _ = _fed_back(rows, name, None, _factor(moments))
    found = blocks.unpack(data, TYPES[name], width)
    for row in range(len(rows)):
        left, inverse = rows[row].astype(np.float64), np.linalg.inv(moments)
        codes = np.zeros(width, dtype=np.uint8)
        for c in range(width):
            scale, offset = float(found.scales[row, c // 32]), float(found.offsets[row, c // 32])
            codes[c] = np.abs(scale * np.arange(16) - offset - left[c]).argmin()
            error = (left[c] - (scale * codes[c] - offset)) / inverse[c, c]
            left -= error * inverse[c]
            inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        assert np.mean(codes == found.codes[row]) > 0.97  # float32 decides a tie here and there otherwise


@pytest.mark.parametrize("name", ["Q3_K", "IQ4_XS", "Q8_0"])
def test_bytes_do_not_depend_on_chunks_or_threads(name: str) -> None:
    moments, rows = _moments(512), _rows(150, 512)
    order = np.argsort(-np.diag(moments), kind="stable")
    factor, importance = _factor(moments[order][:, order]), np.diag(moments).astype(np.float32)
    whole, _ = _fed_back(rows, name, importance, factor, order)
    for size in (1, 7, 64):
        parts = [rows[start : start + size] for start in range(0, 150, size)]
        with ThreadPoolExecutor(3) as pool:
            made = pool.map(lambda part: _fed_back(part, name, importance, factor, order)[0], parts)
            assert np.concatenate(list(made)).tobytes() == whole.tobytes()


def test_an_order_of_columns_keeps_the_cost_true_and_helps() -> None:
    moments, rows = _moments(256, 5), _rows(64, 256)
    scale = np.exp(np.random.default_rng(6).standard_normal(256))  # inputs of very different size
    moments = moments * scale * scale[:, None]
    importance = np.diag(moments).astype(np.float32)
    order = np.argsort(-np.diag(moments), kind="stable")
    data, costs = _fed_back(rows, "Q3_K", importance, _factor(moments[order][:, order]), order)
    np.testing.assert_allclose(costs[:, 1], _cost(rows, data, "Q3_K", moments), rtol=2e-3)
    _, natural = _fed_back(rows, "Q3_K", importance, _factor(moments))
    assert costs[:, 1].sum() < natural[:, 1].sum()


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    rows = _rows(20, 512)
    for name in ("Q8_0", "Q5_1"):  # ggml rounds these to the nearest level of its scales
        data, costs = _fed_back(rows, name, None, np.eye(512, dtype=np.float32))
        error = blocks.dequantize(data, TYPES[name], 512) - rows
        np.testing.assert_allclose(costs[:, 1], np.square(error).sum(axis=1), rtol=1e-3)
        np.testing.assert_allclose(costs[:, 1], costs[:, 0], rtol=1e-2)


@pytest.mark.parametrize("name", TYPES_TRIED)
def test_polishing_lowers_the_true_cost_further(name: str) -> None:
    moments, rows = _moments(256), _rows(80, 256)
    order = np.argsort(-np.diag(moments), kind="stable")
    importance, damping = np.diag(moments).astype(np.float32), 0.1 * float(np.mean(np.diag(moments)))
    damped = moments + damping * np.eye(256)
    factor, kind = _factor(damped[order][:, order]), TYPES[name]
    once, before = _fed_back(rows, name, importance, factor, order)
    data = np.empty_like(once)
    given = {"moments": moments.astype(np.float32), "damping": damping}
    costs = feedback.quantize_rows_with_feedback(rows, kind, data.reshape(-1), importance, factor, order, **given)
    np.testing.assert_allclose(costs[:, 1], _cost(rows, data, name, damped), rtol=2e-3)
    assert np.all(costs[:, 1] <= before[:, 1] * 1.0001)
    assert costs[:, 1].sum() < 0.995 * before[:, 1].sum()
    parts = np.empty_like(data)
    for start in range(0, 80, 7):
        part = parts[start : start + 7].reshape(-1)
        feedback.quantize_rows_with_feedback(rows[start : start + 7], kind, part, importance, factor, order, **given)
    assert parts.tobytes() == data.tobytes()


def test_inputs_that_are_always_zero_and_rows_of_zeros() -> None:
    moments = _moments(256)
    dead = [0, 17, 255]
    moments[dead], moments[:, dead] = 0, 0
    moments += 0.01 * np.mean(np.diag(moments)) * np.eye(256)  # the damping every factor has
    rows = _rows(10, 256)
    rows[3] = 0
    for name in TYPES_TRIED:
        data, costs = _fed_back(rows, name, np.diag(moments).astype(np.float32), _factor(moments))
        assert np.all(np.isfinite(costs)) and np.all(costs[:, 1] <= costs[:, 0])
        values = blocks.dequantize(data, TYPES[name], 256)
        assert np.all(values[3] == 0)
        assert np.all(np.isfinite(values))


def test_a_row_beyond_the_range_of_the_type_keeps_ggmls_bytes() -> None:
    rows = _rows(3, 256)
    rows[1] *= np.float32(1e30)
    data, _ = _fed_back(rows, "Q4_K", None, _factor(_moments(256)))
    assert data[1].tobytes() == _plain(rows, "Q4_K", None)[1].tobytes()
    assert not ggml.valid_rows(TYPES["Q4_K"], data)
    alone, _ = _fed_back(rows[[0, 2]], "Q4_K", None, _factor(_moments(256)))
    assert data[[0, 2]].tobytes() == alone.tobytes()


def test_what_does_not_fit_is_refused() -> None:
    rows, factor = _rows(2, 256), np.eye(256, dtype=np.float32)
    out = np.zeros(4096, dtype=np.uint8)
    with pytest.raises(UsageError, match="IQ3_S has no codes of single weights"):
        feedback.quantize_rows_with_feedback(rows, TYPES["IQ3_S"], out, None, factor)
    with pytest.raises(ValueError, match=r"factor must be contiguous float32 \[256, 256\]"):
        feedback.quantize_rows_with_feedback(rows, TYPES["Q4_K"], out, None, factor[:, :128])
    with pytest.raises(ValueError, match=r"factor must be contiguous float32 \[256, 256\]"):
        feedback.quantize_rows_with_feedback(rows, TYPES["Q4_K"], out, None, factor.astype(np.float64))
    with pytest.raises(ValueError, match="permutation"):
        feedback.quantize_rows_with_feedback(rows, TYPES["Q4_K"], out, None, factor, np.zeros(256, dtype=np.int64))
    with pytest.raises(ValueError, match="contiguous bytes"):
        feedback.quantize_rows_with_feedback(rows, TYPES["Q4_K"], out[:100], None, factor)
