"""Files of llama-imatrix, written here with gguf-py's writer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from llama_quantize import write_imatrix

from edgepack.errors import InputRefused, UsageError
from edgepack.gguf.imatrix import read_imatrix


def _entry(experts: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5000, (experts, 1)).astype(np.float32)
    return rng.gamma(2.0, 100.0, (experts, width)).astype(np.float32), counts


def test_values_are_mean_squares_per_column(tmp_path: Path) -> None:
    dense, experts = _entry(1, 64, 1), _entry(4, 32, 2)
    names = {"blk.0.attn_q.weight": dense, "blk.0.ffn_up_exps.weight": experts}
    path = write_imatrix(tmp_path / "i.gguf", names, datasets=["a.txt", "b.txt"])
    matrix = read_imatrix(path)
    assert set(matrix.values) == set(names)
    for name, (sums, counts) in names.items():
        expected = [np.float32(s) / np.float32(c) for row, c in zip(sums, counts[:, 0], strict=True) for s in row]
        assert matrix.values[name].dtype == np.float32
        assert matrix.values[name].tolist() == expected
    assert matrix.datasets == ("a.txt", "b.txt") and matrix.chunks == 100
    assert matrix.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_expert_that_saw_no_token_weighs_every_column_the_same(tmp_path: Path) -> None:
    sums, counts = _entry(3, 32, 3)
    counts[1], sums[1] = 0, 0
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_up_exps.weight": (sums, counts)}))
    columns = matrix.of("blk.0.ffn_up_exps.weight", (3, 8, 32))
    assert columns is not None and columns.shape == (3, 32)
    assert (columns[1] == 1).all() and columns[0].tolist() == (sums[0] / counts[0]).tolist()


def test_values_of_another_size_are_none(tmp_path: Path) -> None:
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": _entry(1, 64, 4)}))
    assert matrix.of("blk.0.attn_q.weight", (8, 32)) is None
    assert matrix.of("blk.0.attn_k.weight", (8, 64)) is None


def test_files_that_are_no_importance_matrix_are_refused(tmp_path: Path) -> None:
    entry = {"blk.0.attn_q.weight": _entry(1, 64, 5)}
    with pytest.raises(InputRefused, match=r"not an importance matrix \(no imatrix\.datasets\)"):
        read_imatrix(write_imatrix(tmp_path / "a.gguf", entry, metadata=False))
    with pytest.raises(InputRefused, match=r"general\.type is 'model'"):
        read_imatrix(write_imatrix(tmp_path / "b.gguf", entry, type="model"))
    with pytest.raises(InputRefused, match="no importance values"):
        read_imatrix(write_imatrix(tmp_path / "c.gguf", {"x": (None, None)}))
    legacy = tmp_path / "old.dat"
    legacy.write_bytes((1).to_bytes(4, "little") + b"\x03\0\0\0abc" + bytes(64))
    with pytest.raises(InputRefused):
        read_imatrix(legacy)


def test_a_matrix_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.gguf: no such importance matrix"):
        read_imatrix(tmp_path / "nowhere.gguf")


def test_half_a_pair_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    sums, counts = _entry(1, 64, 6)
    with pytest.raises(InputRefused, match="expected both"):
        read_imatrix(write_imatrix(tmp_path / "a.gguf", {name: (sums, None)}))
    with pytest.raises(InputRefused, match="expected F32"):
        read_imatrix(write_imatrix(tmp_path / "b.gguf", {name: (sums.astype(np.float16), counts)}))
    with pytest.raises(InputRefused, match="expected a multiple"):
        read_imatrix(write_imatrix(tmp_path / "c.gguf", {name: (sums, np.ones((3, 1), np.float32))}))
    for title, value in (("d", np.nan), ("e", np.inf), ("f", -1.0)):
        broken = sums.copy()
        broken[0, 3] = value
        with pytest.raises(InputRefused, match="negative or not finite"):
            read_imatrix(write_imatrix(tmp_path / f"{title}.gguf", {name: (broken, counts)}))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": _entry(1, 64, 7)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputRefused):
        read_imatrix(path)
