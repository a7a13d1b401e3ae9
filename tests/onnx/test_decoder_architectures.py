"""Every architecture against transformers: a random checkpoint, exported, run by onnxruntime-genai itself.

One worker process makes and exports all of them: starting one takes longer than the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from decoder_models import ARCHITECTURES, VARIANTS

from edgepack import worker
from edgepack.onnx import decoder


@pytest.fixture(scope="module")
def in_float(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Differences of all models in float32, where the graph alone can be wrong."""
    return differences(tmp_path_factory.mktemp("float"), "fp32", [*ARCHITECTURES, *VARIANTS])


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Differences of a few models in 8 bits: tied, untied, with joined and split matrices, with convolutions."""
    names = ["LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM", "Lfm2ForCausalLM"]
    return differences(tmp_path_factory.mktemp("int8"), "int8", names)


def differences(folder: Path, recipe: str, names: list[str]) -> dict[str, Any]:
    arguments = {"folder": str(folder), "recipe": recipe, "architectures": names}
    found: dict[str, Any] = worker.run("decoder_models:differences", arguments, what="comparison")
    return found


@pytest.mark.parametrize("name", [*ARCHITECTURES, *VARIANTS])
def test_logits_are_those_of_transformers(name: str, in_float: dict[str, Any]) -> None:
    assert in_float[name]["largest"] > 1
    assert in_float[name]["difference"] < 1e-4
    assert in_float[name]["streamed"]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM"])
def test_8_bits_keep_the_logits(name: str, in_8_bits: dict[str, Any]) -> None:
    assert 0 < in_8_bits[name]["difference"] < 0.05 * in_8_bits[name]["largest"]


def test_every_architecture_offered_is_proved() -> None:
    assert set(decoder.ARCHITECTURES) == set(ARCHITECTURES)
