"""Which layers are chosen, against naive computations on whole models with hooks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import EXAMPLE, bypass, layers_of, load, make

from edgepack.prune import depth
from edgepack.prune.likeness import Reference
from edgepack.prune.running import Running, pooled

Pruned = tuple[Path, dict[str, Any]]
Ids = list[torch.Tensor]


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(8, 1000, (1, 40), generator=generator)} for _ in range(3)]


def running_on(model: Any, batches: list[dict[str, torch.Tensor]]) -> Running:
    return Running(model, 4, batches, first=8, stop=39, pooling=None)


def naive_distance(source: Path, batches: list[dict[str, torch.Tensor]], gone: tuple[int, ...]) -> float:
    """Mean KL divergence in nats from the definition, with freshly loaded models."""
    whole, bypassed = load(source), bypass(load(source), gone)
    values = []
    for batch in batches:
        with torch.no_grad():
            p = whole(**batch).logits[0, 8:39].double().softmax(-1)
            q = bypassed(**batch).logits[0, 8:39].double().softmax(-1)
        values.append((p * (p / q).log()).sum(-1).mean().item())
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_drops_what_moves_the_predictions_least_and_again_without_it(
    family: str, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source = make(family, tmp_path / "source")
    running = running_on(load(source), batches)
    references = [Reference(running.outputs(batch), vectors=False) for batch in batches]
    chosen = depth.choose(running, references, 2, "greedy")
    first = {number: naive_distance(source, batches, (number,)) for number in range(4)}
    best = min(first, key=lambda number: first[number])
    rounds = chosen.evidence["rounds"]
    assert rounds[0]["candidates"] == {str(n): pytest.approx(value, rel=1e-3) for n, value in first.items()}
    assert rounds[0]["dropped"] == [best]
    second = {n: naive_distance(source, batches, (best, n)) for n in range(4) if n != best}
    assert rounds[1]["candidates"] == {str(n): pytest.approx(value, rel=1e-3) for n, value in second.items()}
    assert chosen.layers == tuple(sorted((best, min(second, key=lambda number: second[number]))))


def hidden_states(source: Path, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What goes in and out of the layers, all positions: by hooks on a fresh model."""
    model, states = load(source), [[] for _ in range(5)]
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=number: states[n].append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    layers_of(model)[3].register_forward_hook(lambda module, args, output: states[4].append(output))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    return [torch.cat([state[0] for state in found]).double() for found in states]


def test_block_influence_is_one_minus_the_mean_cosine(batches: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    states = hidden_states(source, batches)
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(states)]
    running = running_on(load(source), batches)
    assert depth.block_influence(running) == pytest.approx(expected, rel=1e-4)
    chosen = depth.choose(running, [], 2, "influence")
    assert chosen.layers == tuple(sorted(sorted(range(4), key=lambda n: expected[n])[:2]))


def test_angular_takes_the_run_that_turns_hidden_states_least(
    batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    states = hidden_states(source, batches)
    angles = [
        (torch.arccos(torch.cosine_similarity(states[at], states[at + 2], dim=-1)) / math.pi).mean().item()
        for at in range(3)
    ]
    chosen = depth.choose(running_on(load(source), batches), [], 2, "angular")
    assert list(chosen.evidence["angular_distance"].values()) == pytest.approx(angles, rel=1e-4)
    start = angles.index(min(angles))
    assert chosen.layers == (start, start + 1)


def test_runs_of_a_pattern_go_together_and_what_stays_is_left_alone(
    batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    running = running_on(load(make("llama", tmp_path / "source")), batches)
    references = [Reference(running.outputs(batch), vectors=False) for batch in batches]
    chosen = depth.choose(running, references, 2, "greedy", run=2)
    assert chosen.layers[1] == chosen.layers[0] + 1
    for method in ("greedy", "influence", "angular"):
        assert 0 not in depth.choose(running, references, 3, method, stays=(0,)).layers


def test_scoring_leaves_the_model_as_it_was(batches: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    running = running_on(load(make("mpnet", tmp_path / "source", seed=3)), [])
    batch = batches[0] | {"attention_mask": torch.ones(1, 40, dtype=torch.long)}
    running = Running(running.model, 4, [batch], first=0, stop=1, pooling="mean")
    before = running.outputs(batch)
    depth.choose(running, [Reference(before, vectors=True)], 3, "greedy")
    assert torch.equal(running.outputs(batch), before)


def test_greedy_on_a_trained_model_is_at_least_as_good_as_influence_here(
    run_prune: Callable[..., Pruned],
) -> None:
    _, greedy = run_prune(EXAMPLE, windows=4, depth=1)
    scores = greedy["scores"]["depth"]["rounds"][0]["candidates"]
    _, influence = run_prune(EXAMPLE, windows=4, depth=1, method="influence")
    assert (
        scores[str(greedy["removed"]["depth"]["layers"][0])] <= scores[str(influence["removed"]["depth"]["layers"][0])]
    )
    assert max(scores, key=lambda number: scores[number]) == "0"  # by measurement: nothing protects it


def test_an_encoder_is_judged_by_its_vectors(run_prune: Callable[..., Pruned], tmp_path: Path) -> None:
    source = make("bert", tmp_path / "source")
    folder, report = run_prune(source, depth=1)
    step = report["steps"][-1]
    assert -1 <= step["cosine_p01"] <= step["cosine_mean"] <= 1
    assert "perplexity" not in step
    assert len(load(folder, "BertModel").encoder.layer) == 3


@pytest.mark.parametrize(("how", "expected"), [("mean", [1.5, 3.0]), ("cls", [1.0, 3.0]), ("lasttoken", [2.0, 3.0])])
def test_padding_is_no_part_of_a_vector(how: str, expected: list[float]) -> None:
    hidden = torch.tensor([[[1.0], [2.0], [9.0]], [[3.0], [9.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pooled(hidden, mask, how)[:, 0].tolist() == expected
