"""Which neurons and heads stay, against scores computed naively."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import answers, layers_of, load, make

from edgepack.checkpoint import open_checkpoint
from edgepack.prune.anatomy import find_anatomy, sizes_of
from edgepack.prune.heads import choose_groups
from edgepack.prune.running import Running
from edgepack.prune.statistics import collect
from edgepack.prune.width import choose_neurons, silenced

Pruned = tuple[Path, dict[str, Any]]


def prepared(family: str, folder: Path) -> tuple[Running, Any, Any]:
    source = make(family, folder)
    checkpoint = open_checkpoint(source)
    anatomy = find_anatomy(checkpoint)
    ids = torch.randint(8, 1000, (2, 1, 40), generator=torch.Generator().manual_seed(2))
    running = Running(load(source), 4, [{"input_ids": row} for row in ids], first=0, stop=39, pooling=None)
    return running, anatomy, sizes_of(checkpoint, anatomy)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_neurons_stay_by_activation_times_norm_of_the_column_that_reads_them(family: str, tmp_path: Path) -> None:
    running, anatomy, sizes = prepared(family, tmp_path / "source")
    seen: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(running.layers):
        layer.get_submodule(anatomy.ffn_out).register_forward_pre_hook(
            lambda module, args, n=number: seen.setdefault(n, []).append(args[0])
        )
    kept, lost = choose_neurons(running, anatomy, collect(running, anatomy, sizes), 32)
    for number, layer in enumerate(running.layers):
        activations = torch.cat(seen[number], 1)[0].double()
        weight = layer.get_submodule(anatomy.ffn_out).weight.double()
        reading = weight if family == "gpt2" else weight.T  # [neurons, hidden]
        scores = activations.square().mean(0).sqrt() * reading.norm(dim=1)
        best = scores.argsort(descending=True)[:32]
        assert set(kept[number]) == set(best.tolist())
        assert lost[str(number)] == pytest.approx(1 - ((scores[best] ** 2).sum() / (scores**2).sum()).item(), rel=1e-3)


def test_heads_stay_by_what_they_add_to_the_hidden_state(tmp_path: Path) -> None:
    running, anatomy, sizes = prepared("llama", tmp_path / "source")
    seen: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(running.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, n=number: seen.setdefault(n, []).append(args[0])
        )
    kept, scores = choose_groups(collect(running, anatomy, sizes), 1)
    for number, layer in enumerate(running.layers):
        values = torch.cat(seen[number], 1)[0]
        adds = []
        for group in range(2):
            alone = torch.zeros_like(values)
            alone[:, 32 * group : 32 * (group + 1)] = values[:, 32 * group : 32 * (group + 1)]
            adds.append((alone @ layer.self_attn.o_proj.weight.T).square().sum(-1).mean().sqrt().item())
        assert scores[str(number)] == pytest.approx(adds, rel=1e-4)
        assert kept[number] == (adds.index(max(adds)),)


def test_silence_is_lifted_again(tmp_path: Path) -> None:
    running, anatomy, _ = prepared("llama", tmp_path / "source")
    before = answers(running.model)
    with silenced(running, anatomy, {0: (1, 2)}):
        assert not torch.equal(answers(running.model), before)
    assert torch.equal(answers(running.model), before)


def test_each_step_is_measured_and_the_last_on_the_folder_that_was_written(
    run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    both, report = run_prune(source, layers="1", ffn=64)
    _, alone = run_prune(source, layers="1")
    first, last = report["steps"]
    assert (first["step"], last["step"]) == ("depth", "ffn")
    # the first was measured in memory here, on a folder there
    expected = alone["steps"][0]
    assert first.pop("ci95") == pytest.approx(expected.pop("ci95"), rel=1e-4)
    assert first.pop("step") == expected.pop("step")
    assert first == pytest.approx(expected, rel=1e-4)
    model = load(both)
    assert last["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert last["bytes"] < first["bytes"] < report["before"]["bytes"]
    written = json.loads((both / "edgepack-prune.json").read_text())
    assert written["steps"][1] == last and written["kept_layers"] == [0, 2, 3]
    assert len(layers_of(model, 3)) == 3


def test_operations_per_token_are_twice_the_weights_a_token_is_multiplied_by(
    run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    folder, report = run_prune(make("untied", tmp_path / "source"), ffn=64)
    model = load(folder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[5]]))
    attention = 4 * 4 * 2 * 2 * 16  # layers x heads x (scores and values) x 2 x width, one position
    assert report["steps"][-1]["flops_per_token"] == pytest.approx(counter.get_total_flops() - attention, abs=attention)
