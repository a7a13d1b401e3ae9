"""Smaller models on paper, against smaller models that were really cut."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "prune"))
from pruning_models import cut, make

from edgepack.auto.variants import MOST_SHARE, WHOLE, Variant, shrunk, variants, widths
from edgepack.checkpoint import open_checkpoint
from edgepack.gguf.model import describe
from edgepack.prune.anatomy import ANATOMIES, Sizes, find_anatomy, sizes_of
from edgepack.prune.request import check

GONE, STAY = 1, 64


@pytest.mark.parametrize("family", ["llama", "untied", "qwen3", "gemma2", "gpt2", "phi3", "starcoder2"])
def test_a_variant_on_paper_has_the_tensors_of_the_model_that_is_cut(family: str, tmp_path: Path) -> None:
    grouped = {"num_key_value_heads": 4} if family == "gpt2" else {}  # which has no grouped heads
    source = make(family, tmp_path / "source", **grouped)
    checkpoint = open_checkpoint(source)
    sizes = sizes_of(checkpoint, find_anatomy(checkpoint))
    kept = tuple(range(sizes.layers - GONE))
    neurons = {number: tuple(range(STAY)) for number in kept}
    real = describe(cut(source, tmp_path / "cut", layers=kept, neurons=neurons))
    paper = shrunk(describe(source), Variant(GONE, STAY), sizes)
    assert {t.name: t.shape for t in paper.tensors} == {t.name: t.shape for t in real.tensors}
    assert paper.parameters == real.parameters and paper.layers == real.layers
    assert paper.kv_bytes(256) == real.kv_bytes(256)


def sized(layers: int, ffn: int) -> Sizes:
    return Sizes(layers, ffn, 8, 4, 64, 8192)


def test_every_variant_can_be_asked_of_prune() -> None:
    anatomy = ANATOMIES["llama"]
    sizes = sized(12, 1280)
    found = variants(anatomy, sizes)
    for variant in found:
        check(variant.request, anatomy, sizes, "model")
    assert {variant.depth for variant in found} == {0, 1, 2, 3, 4}
    assert widths(sizes) == [1024]  # 768 would be less than two thirds
    assert WHOLE not in found and len(found) == len(set(found)) == 9


def test_layers_that_only_go_in_runs_go_in_runs() -> None:
    assert {variant.depth for variant in variants(ANATOMIES["smollm3"], sized(36, 11008))} == {0, 4, 8, 12}


@given(st.integers(1, 80), st.integers(32, 30_000))
def test_no_variant_takes_more_than_a_third(layers: int, ffn: int) -> None:
    for variant in variants(ANATOMIES["llama"], sized(layers, ffn)):
        assert variant.depth <= layers * MOST_SHARE
        if variant.ffn is not None:
            assert variant.ffn < ffn and variant.ffn % (256 if ffn > 256 else 32) == 0
            assert variant.ffn >= ffn * (1 - MOST_SHARE) - 64


def test_a_model_of_two_layers_and_few_neurons_has_no_variant() -> None:
    assert variants(ANATOMIES["llama"], sized(2, 32)) == []
