"""Importance matrices written here, read by gguf-py and by our reader; bytes as llama-imatrix writes them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from edgepack.calibrate.imatrix_file import refuse_other_model, write_imatrix
from edgepack.errors import InputRefused, StepError, StorageError
from edgepack.gguf.imatrix import Imatrix, read_imatrix

DENSE = np.arange(1, 65, dtype=np.float32) * np.float32(12.5)
EXPERTS = np.arange(132, dtype=np.float64).reshape(4, 33) + 0.25
SUMS = {
    "blk.2.ffn_down.weight": (DENSE[:45], 51200),
    "blk.10.ffn_up_exps.weight": (EXPERTS, [100, 0, 5, 51200]),
    "blk.0.attn_q.weight": (DENSE, 51200),
}
# Of what `llama-imatrix -m none --in-file OURS -o THEIRS` wrote back; llama.cpp as in llama-cpp-python 0.3.36.
FROM_LLAMA_IMATRIX = "dd353900e0ce6d0e71d92b9a738c70bcddc14b57743a060f50894d3e8399b7c4"


def write(path: Path, sums: dict = SUMS, **options: object) -> Path:
    write_imatrix(path, sums, **({"datasets": ["cal.txt", "b.txt"], "chunks": 100} | options))
    return path


def test_the_bytes_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    data = write(tmp_path / "i.gguf").read_bytes()
    assert hashlib.sha256(data).hexdigest() == FROM_LLAMA_IMATRIX
    backwards = dict(reversed(SUMS.items()))
    assert write(tmp_path / "again.gguf", backwards).read_bytes() == data


def test_gguf_py_reads_keys_names_and_values(tmp_path: Path) -> None:
    reader = GGUFReader(write(tmp_path / "i.gguf"))
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    assert reader.fields["imatrix.datasets"].contents() == ["cal.txt", "b.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 100
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = ["blk.0.attn_q.weight", "blk.10.ffn_up_exps.weight", "blk.2.ffn_down.weight"]
    assert list(tensors) == [name + suffix for name in names for suffix in (".in_sum2", ".counts")]
    assert tensors["blk.10.ffn_up_exps.weight.in_sum2"].shape.tolist() == [33, 4]
    assert tensors["blk.10.ffn_up_exps.weight.counts"].shape.tolist() == [1, 4]
    assert tensors["blk.10.ffn_up_exps.weight.counts"].data.ravel().tolist() == [100, 0, 5, 51200]
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape.tolist() == [64]
    assert tensors["blk.0.attn_q.weight.in_sum2"].data.tolist() == DENSE.tolist()


def test_our_reader_gives_means(tmp_path: Path) -> None:
    matrix = read_imatrix(write(tmp_path / "i.gguf"))
    assert matrix.datasets == ("cal.txt", "b.txt") and matrix.chunks == 100
    assert matrix.values["blk.0.attn_q.weight"].tolist() == (DENSE / np.float32(51200)).tolist()
    experts = matrix.of("blk.10.ffn_up_exps.weight", (4, 8, 33))
    assert experts is not None
    assert experts[2].tolist() == (EXPERTS[2].astype(np.float32) / np.float32(5)).tolist()
    assert (experts[1] == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_sum_that_is_not_finite_names_the_matrix(tmp_path: Path, value: float) -> None:
    sums = np.full(8, 1.0)
    sums[3] = value
    with pytest.raises(StepError, match=r"blk\.0\.attn_q\.weight.*not finite"):
        write(tmp_path / "i.gguf", {"blk.0.attn_q.weight": (sums, 5)})
    assert list(tmp_path.iterdir()) == []


def test_negative_sums_counts_that_do_not_fit_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="negative"):
        write(tmp_path / "i.gguf", {"a": (np.array([1.0, -1.0]), 5)})
    with pytest.raises(StepError, match="negative"):
        write(tmp_path / "i.gguf", {"a": (np.ones(2), -5)})
    with pytest.raises(StepError, match="3 counts for sums of shape"):
        write(tmp_path / "i.gguf", {"a": (np.ones((4, 2)), [1, 2, 3])})
    with pytest.raises(StepError, match="empty"):
        write(tmp_path / "i.gguf", {})


def test_a_disk_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "i.gguf")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        write(path, {"a": (np.ones(4), 1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


SHAPES = {
    "token_embd.weight": (100, 64),
    "output_norm.weight": (64,),
    **{
        f"blk.{block}.{name}.weight": shape
        for block in range(12)
        for name, shape in {"attn_norm": (64,), "attn_q": (64, 64), "ffn_down": (64, 128)}.items()
    },
}


def matrix_of(shapes: dict[str, tuple[int, ...]]) -> Imatrix:
    values = {
        name: np.ones(shape[-1] * (shape[0] if len(shape) == 3 else 1), np.float32)
        for name, shape in shapes.items()
        if len(shape) > 1 and name != "token_embd.weight"
    }
    return Imatrix(values, "0" * 64)


def test_the_matrix_of_the_model_itself_passes() -> None:
    whole = {**SHAPES, "output.weight": (100, 64), "blk.3.ffn_up_exps.weight": (4, 128, 64)}
    refuse_other_model(matrix_of(whole), whole, "i.gguf")
    refuse_other_model(matrix_of(whole), {k: v for k, v in whole.items() if k != "output.weight"}, "i.gguf")
    without = {name: shape for name, shape in whole.items() if "ffn_up_exps" not in name}
    refuse_other_model(matrix_of(without), whole, "i.gguf")


def test_a_wider_model_is_named_by_its_widths() -> None:
    other = {name: (*shape[:-1], shape[-1] * 2) for name, shape in SHAPES.items()}
    with pytest.raises(InputRefused) as caught:
        refuse_other_model(matrix_of(other), SHAPES, "i.gguf")
    assert "i.gguf: an importance matrix of another model" in caught.value.message
    assert "blk.0.attn_q.weight has 128 values, expected 64" in caught.value.message
    assert "and 21 more" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_deeper_and_a_shallower_model_of_the_same_width_are_named_by_their_blocks() -> None:
    deeper = SHAPES | {"blk.12.attn_q.weight": (64, 64)}
    with pytest.raises(InputRefused, match=r"the model has no blk\.12\.attn_q\.weight$"):
        refuse_other_model(matrix_of(deeper), SHAPES, "i.gguf")
    with pytest.raises(InputRefused, match=r"it has no values for blk\.12$"):
        refuse_other_model(matrix_of(SHAPES), deeper, "i.gguf")


def test_another_number_of_experts_is_another_model() -> None:
    with pytest.raises(InputRefused, match="has 512 values, expected 256"):
        refuse_other_model(
            matrix_of({"blk.0.ffn_up_exps.weight": (8, 128, 64)}), {"blk.0.ffn_up_exps.weight": (4, 128, 64)}, "i.gguf"
        )
