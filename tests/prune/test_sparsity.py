"""Zeros where Wanda and magnitude put them, and the report that nothing else got smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import load, make

Pruned = tuple[Path, dict[str, Any]]


def inputs_of(model: Any, batches: list[torch.Tensor], name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for ids in batches:
        with torch.no_grad():
            model(ids)
    return torch.cat(seen).square().mean(0).sqrt()


def test_wanda_zeroes_the_smallest_products_of_each_row(
    run_prune: Callable[..., Pruned], small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    source = make("llama", tmp_path / "source")
    folder, report = run_prune(source, sparsity="wanda:0.5")
    ids = AutoTokenizer.from_pretrained(source)(small_texts[0].read_text("utf-8")).input_ids[:192]
    whole = load(source)
    name = "model.layers.1.mlp.down_proj"
    scale = inputs_of(whole, [torch.tensor([ids[:96]]), torch.tensor([ids[96:]])], name)
    weight, found = whole.get_submodule(name).weight, load(folder).get_submodule(name).weight
    scores = (weight.abs() * scale).detach()
    expected = weight.detach().clone()
    for row, values in enumerate(scores):
        expected[row, values.argsort()[:48]] = 0
    assert torch.equal(found, expected)
    assert report["sparsity"]["zero_share"] == 0.5


def test_magnitude_zeroes_the_smallest_of_each_matrix(run_prune: Callable[..., Pruned], tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    folder, report = run_prune(source, sparsity="magnitude:0.3")
    whole, thin = load(source), load(folder)
    for name, weight in whole.named_parameters():
        found = thin.get_parameter(name)
        if weight.ndim < 2 or "layers" not in name:
            assert torch.equal(found, weight)
            continue
        gone = found == 0
        assert gone.float().mean().item() == pytest.approx(0.3, abs=0.02)
        assert weight[gone].abs().max() <= weight[~gone].abs().min()
        assert torch.equal(found[~gone], weight[~gone])
    assert report["sparsity"]["zero_share"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("pattern", ["2:4", "magnitude:1:4"])
def test_of_every_four_neighbours_so_many_stay(pattern: str, run_prune: Callable[..., Pruned], tmp_path: Path) -> None:
    folder, _ = run_prune(make("llama", tmp_path / "source"), sparsity=pattern)
    weight = load(folder).model.layers[2].self_attn.q_proj.weight
    stays = (weight.reshape(64, 16, 4) != 0).sum(-1)
    assert (stays == (2 if pattern == "2:4" else 1)).all()


def test_the_report_says_that_only_a_compressed_download_gets_smaller(
    run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    import gzip

    source = make("llama", tmp_path / "source")
    folder, report = run_prune(source, sparsity="wanda:0.5")
    thin = report["sparsity"]
    assert thin["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert abs(thin["file_bytes"] - thin["source_file_bytes"]) < 100  # headers
    assert report["steps"][-1]["bytes"] == report["before"]["bytes"]
    assert thin["gzip_bytes"] < 0.8 * thin["source_gzip_bytes"]
    compressed = len(gzip.compress((folder / "model.safetensors").read_bytes(), 6))
    assert thin["gzip_bytes"] == pytest.approx(compressed, abs=100)
    assert report["steps"][-1]["mean_kld"] > 0
    assert "stay the same" in thin["note"]
