"""A GGUF with one thing wrong is told from a right one, by transformers and llama.cpp themselves."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepack.checkpoint import open_checkpoint
from edgepack.conform.logits import MAX_MEAN_KLD, MIN_COSINE, memory_bytes
from edgepack.errors import ConformanceError, StepError
from edgepack.gguf.convert import plan_layout, write
from edgepack.gguf.file import u32
from edgepack.gguf.model import ModelSpec, TensorSpec, describe
from edgepack.worker import run

sys.path.append(str(Path(__file__).parents[1] / "gguf"))
from tiny_models import Case, make

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return describe(EXAMPLE)


def compare(spec: ModelSpec, folder: Path, source: Path = EXAMPLE, *, allow_nonfinite: bool = False) -> dict:
    layout = plan_layout(spec, "F32")
    (gguf,) = write(spec, layout, folder, stem="reference", threads=2, allow_nonfinite=allow_nonfinite)
    seen: list[tuple[int, int]] = []
    found = run(
        "edgepack.conform.logits:logits",
        {"reference_gguf": str(gguf), "source": str(source), "threads": 2},
        what="comparison with transformers",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (6, 6)
    return found


def changed(spec: ModelSpec, name: str, change: Callable[[np.ndarray], np.ndarray]) -> ModelSpec:
    """The model with one tensor changed."""

    def wrap(tensor: TensorSpec) -> TensorSpec:
        if tensor.name != name:
            return tensor
        return replace(tensor, read=lambda start, stop: change(tensor.read(0, tensor.rows))[start:stop])

    return replace(spec, tensors=tuple(map(wrap, spec.tensors)))


def test_the_example_agrees_with_transformers(model: ModelSpec, tmp_path: Path) -> None:
    found = compare(model, tmp_path)
    assert found["mean_kld"] < 1e-9
    assert found["max_abs_dlogp"] < 1e-3
    assert found["texts"] == 3
    assert found["positions"] > 100


def test_a_norm_that_is_off_shows_at_the_first_position(model: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ConformanceError, match=r"text 1 .*, position 0 of .*KL divergence") as caught:
        compare(changed(model, "blk.1.ffn_norm.weight", lambda weight: weight + 1), tmp_path)
    assert "weights, norms or activations" in str(caught.value.hint)


def test_a_forgotten_rope_permutation_shows_at_the_second_position(model: ModelSpec, tmp_path: Path) -> None:
    heads = model.heads

    def undo(weight: np.ndarray) -> np.ndarray:
        halves = weight.reshape(heads, -1, 2, weight.shape[-1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)

    # alone in a sequence a token attends to itself whatever the scores: the first position can't tell
    with pytest.raises(ConformanceError, match=r"position [1-9]\d* of") as caught:
        compare(changed(model, "blk.0.attn_q.weight", undo), tmp_path)
    assert "rotary embedding" in str(caught.value.hint)


def test_another_models_source_is_a_difference(model: ModelSpec, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make(Case("Llama"), other, 3)
    with pytest.raises(ConformanceError, match=r"has 320 rows: they are not of one model"):
        compare(model, tmp_path, source=other)


def test_a_source_whose_own_logits_are_nan_leaves_nothing_to_compare(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source)
    info = open_checkpoint(source).tensors["model.layers.0.mlp.down_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\xc0\x7f")  # the bfloat16 NaN
    found = compare(describe(source), tmp_path, source=source, allow_nonfinite=True)
    assert found["compared"] is False
    assert "the source's own logits are NaN or infinite" in found["note"]


def test_a_nan_that_the_source_does_not_have_is_a_difference(model: ModelSpec, tmp_path: Path) -> None:
    def poison(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[0, 0] = np.nan
        return weight

    with pytest.raises(ConformanceError, match="KL divergence nan"):
        compare(changed(model, "blk.0.ffn_down.weight", poison), tmp_path, allow_nonfinite=True)


def test_a_file_llama_cpp_cannot_load_is_a_failed_step(model: ModelSpec, tmp_path: Path) -> None:
    short = replace(model, tensors=model.tensors[:-1])
    with pytest.raises(StepError, match=r"llama.cpp can't load it"):
        compare(short, tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"num_key_value_heads": 4, "type_vocab_size": 2, "max_position_embeddings": 130}
    make(Case("Bert", sizes, "Model", tokenizer="wordpiece", pooling="cls"), folder, 5)
    return folder


def test_an_encoder_agrees_by_its_vectors(encoder: Path, tmp_path: Path) -> None:
    found = compare(describe(encoder), tmp_path, source=encoder)
    assert found["min_cosine"] > 1 - 1e-6
    assert found["texts"] == 3


def test_another_pooling_is_found(encoder: Path, tmp_path: Path) -> None:
    spec = describe(encoder)
    mean = replace(spec, metadata=spec.metadata | {"bert.pooling_type": u32(1)})
    with pytest.raises(ConformanceError, match=rf"cosine -?0\.\d+ .* expected at least {MIN_COSINE}"):
        compare(mean, tmp_path, source=encoder)


def test_memory_grows_with_the_model_by_more_than_its_float32_weights() -> None:
    assert memory_bytes(1_000_000_000) - memory_bytes(0) > 4_000_000_000
    assert memory_bytes(0) > 0
    assert MAX_MEAN_KLD <= 1e-4
