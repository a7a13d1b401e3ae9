"""What stays makes up for what went, against least squares done naively and against the folder that is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import EXAMPLE, LAYERS, answers, cut, layers_of, load, make
from safetensors.torch import load_file

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import StepError, UsageError
from edgepack.prune import command, cost, steps
from edgepack.prune.anatomy import Anatomy, Sizes, find_anatomy, sizes_of
from edgepack.prune.cut import Cut
from edgepack.prune.refit import Refit, Target, arrives, fitted, gather, refit, targets
from edgepack.prune.request import make as asked
from edgepack.prune.running import Running
from edgepack.source import resolve
from edgepack.text import default_evaluation_text
from edgepack.worker import run_measured

Pruned = tuple[Path, dict[str, Any]]
NEURONS = dict.fromkeys(range(LAYERS), tuple(sorted({*range(0, 96, 3), 1, 4, 7})))
DECODERS = ("llama", "qwen3", "gpt2", "phi3", "starcoder2", "gemma2")


def prepared(family: str, folder: Path, **more: Any) -> tuple[Running, Anatomy, Sizes]:
    """A random model on random text: two batches, those of encoders padded."""
    source = make(family, folder, **more)
    checkpoint = open_checkpoint(source)
    anatomy, generates = find_anatomy(checkpoint), "LM" in checkpoint.config["architectures"][0]
    ids = torch.randint(8, 1000, (2, 3, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids[0])
    mask[1, 30:] = 0
    batches = [{"input_ids": rows} | ({} if generates else {"attention_mask": mask}) for rows in ids]
    pooling = None if generates else "mean"
    running = Running(load(source).requires_grad_(False), LAYERS, batches, first=0, stop=59, pooling=pooling)
    return running, anatomy, sizes_of(checkpoint, anatomy)


def watched(running: Running, anatomy: Anatomy, number: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By hooks, without padding: what a layer's last matrix is given, and what layers `number` + 1 to `after` add."""
    given: list[torch.Tensor] = []
    ends: dict[int, list[torch.Tensor]] = {number: [], after: []}
    handles = [
        running.layers[number].get_submodule(anatomy.ffn_out).register_forward_pre_hook(
            lambda module, args: given.append(args[0])
        ),
        *(
            running.layers[end].register_forward_hook(
                lambda module, args, output, end=end: ends[end].append(output if torch.is_tensor(output) else output[0])
            )
            for end in ends
        ),
    ]  # fmt: skip
    for batch in running.batches:
        running.outputs(batch)
    for handle in handles:
        handle.remove()
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in running.batches]
    added = [late - early for early, late in zip(ends[number], ends[after], strict=True)]

    def rows(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([one[mask] for one, mask in zip(values, masks, strict=True)]).double()

    return rows(given), rows(added)


def ridge(inputs: torch.Tensor, wanted: torch.Tensor, damping: float) -> torch.Tensor:
    """`[out, in]` by least squares on rows, with a row for each input that pulls its column to zero."""
    pulls = torch.diag((damping * inputs.square().sum(0)).sqrt())
    found = torch.linalg.lstsq(
        torch.cat([inputs, pulls]), torch.cat([wanted, wanted.new_zeros(len(pulls), wanted.shape[1])])
    )
    return found.solution.T


def damping_of(inputs: int, positions: int) -> float:
    return min(2.0, max(0.05, 2 * inputs / positions))


@pytest.mark.parametrize("family", [*DECODERS, "bert", "distilbert", "modernbert"])
def test_columns_that_stay_are_the_least_squares_solution_for_those_that_went(family: str, tmp_path: Path) -> None:
    running, anatomy, sizes = prepared(family, tmp_path / "source")
    kept = torch.tensor(NEURONS[0])
    gone = torch.tensor([number for number in range(96) if number not in NEURONS[0]])
    stays = Cut(neurons=dict.fromkeys(range(LAYERS), tuple(kept.tolist())))
    chosen = targets(anatomy, sizes, stays, additive=False)
    assert [target.layer for target in chosen] == list(range(LAYERS))
    for target, sums in gather(running, anatomy, chosen):
        weight = running.layers[target.layer].get_submodule(anatomy.ffn_out).weight
        weight = weight.T if family == "gpt2" else weight
        inputs, _ = watched(running, anatomy, target.layer, target.layer)
        assert sums.positions == len(inputs)
        expected = ridge(inputs[:, kept], inputs[:, gone] @ weight[:, gone].double().T, damping_of(35, len(inputs)))
        found = fitted(weight, target, sums, 1.0) - weight[:, kept]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "share"), [("llama", 1.0), ("gpt2", 1.0), ("modernbert", 1.0), ("granite", 0.25)])
def test_the_matrix_before_a_run_of_layers_takes_over_what_they_added(
    family: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    granite = {"granite": ("GraniteForCausalLM", {"residual_multiplier": 0.25})}
    monkeypatch.setattr("pruning_models.DECODERS", {**sys.modules["pruning_models"].DECODERS, **granite})
    running, anatomy, sizes = prepared(family, tmp_path / "source")
    arriving = arrives(running, anatomy)
    assert arriving == pytest.approx(share, rel=1e-3)
    (target,) = targets(anatomy, sizes, Cut(layers=(0, 3)), additive=True)
    assert (target.layer, target.run, target.kept) == (0, (1, 3), None)
    ((_, sums),) = gather(running, anatomy, [target])
    weight = running.layers[0].get_submodule(anatomy.ffn_out).weight
    weight = weight.T if family == "gpt2" else weight
    inputs, added = watched(running, anatomy, 0, 2)
    expected = ridge(inputs, added / share, damping_of(96, len(inputs)))
    found = fitted(weight, target, sums, arriving or 0) - weight
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo3", "bert", "distilbert", "mpnet"])
def test_a_norm_between_a_matrix_and_the_hidden_state_is_seen(family: str, tmp_path: Path) -> None:
    running, anatomy, sizes = prepared(family, tmp_path / "source")
    assert arrives(running, anatomy) is None
    assert targets(anatomy, sizes, Cut(layers=(0, 3)), additive=False) == []


def test_layers_and_neurons_are_made_up_for_by_the_same_matrix(tmp_path: Path) -> None:
    running, anatomy, sizes = prepared("llama", tmp_path / "source")
    kept = NEURONS[0]
    chosen = targets(
        anatomy, sizes, Cut(layers=(1, 3), neurons={1: kept, 3: kept}, groups={1: (0,), 3: (1,)}), additive=True
    )
    assert [(target.layer, target.module, target.run) for target in chosen] == [
        (1, "self_attn.o_proj", None), (1, "mlp.down_proj", (2, 3)), (3, "self_attn.o_proj", None),
        (3, "mlp.down_proj", None),
    ]  # fmt: skip
    found = dict(gather(running, anatomy, chosen))
    weight = running.layers[1].mlp.down_proj.weight
    inputs, added = watched(running, anatomy, 1, 2)
    gone = [number for number in range(96) if number not in kept]
    wanted = added + inputs[:, gone] @ weight[:, gone].double().T
    expected = ridge(inputs[:, list(kept)], wanted, damping_of(len(kept), len(inputs)))
    fit = fitted(weight, chosen[1], found[chosen[1]], 1.0) - weight[:, list(kept)]
    torch.testing.assert_close(fit.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_layers_gathered_in_turns_give_the_sums_of_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, anatomy, sizes = prepared("llama", tmp_path / "source")
    chosen = targets(anatomy, sizes, Cut(layers=(0, 2, 3), neurons={n: NEURONS[n] for n in (0, 2, 3)}), additive=True)
    at_once = [sums for _, sums in gather(running, anatomy, chosen)]
    monkeypatch.setattr("edgepack.prune.refit.SUMS_BYTES", 1)
    calls: list[tuple[int, int]] = []
    in_turns = [sums for _, sums in gather(running, anatomy, chosen, progress=lambda *done: calls.append(done))]
    assert calls == [(number, 6) for number in range(1, 7)]
    for one, other in zip(at_once, in_turns, strict=True):
        assert torch.equal(one.moments, other.moments) and one.positions == other.positions
        assert (one.cross is None) == (other.cross is None)
        assert one.cross is None or other.cross is None or torch.equal(one.cross, other.cross)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3"])
def test_a_span_of_layers_gives_what_the_next_one_is_given(family: str, tmp_path: Path) -> None:
    running, _, _ = prepared(family, tmp_path / "source")
    batch = running.batches[0]
    _, given = running.remember(batch)
    assert torch.equal(running.span(batch, 0, 2, None), given[2])
    assert torch.equal(running.span(batch, 2, LAYERS, given[2]), given[LAYERS])


def test_a_neuron_that_never_fires_is_no_obstacle() -> None:
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    inputs[:, 2] = 0
    running = _Alone(inputs)
    ((target, sums),) = gather(running, _PLAIN, [Target(0, "out", kept=(0, 1, 2))])
    found = fitted(running.layers[0].out.weight, target, sums, 1.0)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 2], running.layers[0].out.weight[:, 2])


class _Alone:
    """One matrix as a model."""

    pooling = None

    def __init__(self, inputs: torch.Tensor) -> None:
        layer = torch.nn.Module()
        layer.out = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
        self.layers, self.batches, self._inputs = [layer], [{}], inputs

    def span(self, batch: Any, start: int, stop: int, hidden: Any) -> torch.Tensor:
        found: torch.Tensor = self.layers[0].out(self._inputs[None])
        return found


_PLAIN = Anatomy("layers", ("in",), "out")


def changed(one: Path, other: Path) -> set[str]:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in first.items()} == {n: (t.dtype, t.shape) for n, t in second.items()}
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_folder_is_the_cut_one_but_for_the_matrices_that_were_tried(
    dtype: torch.dtype, run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    model = load(source).to(dtype)
    model.save_pretrained(source)
    plain, before = run_prune(source, layers="2", ffn=64)
    folder, report = run_prune(source, layers="2", ffn=64, refit=True)
    scores = report["scores"]["refit"]
    assert scores["kept"] and scores["held_out"]["after"] < scores["held_out"]["before"] and scores["matrices"] == 3
    assert changed(plain, folder) == {f"model.layers.{number}.mlp.down_proj.weight" for number in range(3)}
    assert [row["step"] for row in report["steps"]] == ["depth", "ffn", "refit"]
    cut_row, last = report["steps"][1:]
    assert cut_row["mean_kld"] == pytest.approx(before["steps"][-1]["mean_kld"], rel=1e-3)
    assert last["mean_kld"] < cut_row["mean_kld"]
    assert {key: last[key] for key in ("bytes", "parameters", "layers")} == {
        key: cut_row[key] for key in ("bytes", "parameters", "layers")
    }
    assert json.loads((folder / "edgepack-prune.json").read_text())["request"]["refit"] is True
    assert len(layers_of(load(folder), 3)) == 3


def test_what_is_tried_in_memory_is_what_the_folder_computes(tmp_path: Path) -> None:
    running, anatomy, sizes = prepared("llama", tmp_path / "source")
    kept = {number: NEURONS[number] for number in (0, 3)}
    stays = Cut(layers=(0, 3), neurons=kept, groups={0: (1,), 3: (0,)})
    checkpoint = open_checkpoint(tmp_path / "source")
    dtypes = {place[1:]: info.dtype for name, info in checkpoint.tensors.items() if (place := anatomy.place(name))}
    found = refit(running, anatomy, targets(anatomy, sizes, stays, additive=True), 1.0, dtypes)
    before = answers(running.model)
    work = steps._Work(checkpoint, anatomy, sizes, asked(layers="1,2"), cut=stays)
    with steps._state(work, running, stays)(), found.applied(running):
        tried = answers(running.model)
    assert torch.equal(answers(running.model), before)
    (tmp_path / "pruned").mkdir()
    steps.write_folder(checkpoint, stays, tmp_path / "pruned", change=found.change)
    torch.testing.assert_close(answers(load(tmp_path / "pruned")), tried, rtol=0, atol=1e-4)
    assert not torch.allclose(
        answers(load(cut(tmp_path / "source", tmp_path / "cut", layers=(0, 3)))), tried, atol=1e-2
    )


def test_matrices_that_are_stored_column_by_column_are_written_so(
    run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    source = make("gpt2", tmp_path / "source")
    plain, _ = run_prune(source, layers="1")
    folder, report = run_prune(source, layers="1", refit=True)
    assert report["scores"]["refit"]["kept"]
    assert changed(plain, folder) == {"transformer.h.0.mlp.c_proj.weight"}
    assert report["steps"][-1]["mean_kld"] < report["steps"][0]["mean_kld"]


def test_an_encoder_without_neurons_comes_nearer_to_its_vectors(
    run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    _, report = run_prune(make("bert", tmp_path / "source"), ffn=32, refit=True)
    first, last = report["steps"]
    assert (first["step"], last["step"]) == ("ffn", "refit")
    assert last["cosine_mean"] > first["cosine_mean"]


def test_what_is_no_better_on_held_out_text_is_not_written(
    run_prune: Callable[..., Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("llama", tmp_path / "source")
    plain, _ = run_prune(source, layers="1")

    def spoiled(*args: Any, **more: Any) -> Refit:
        found = refit(*args, **more)
        for matrix in found._matrices.values():
            matrix.mul_(-3)
        return found

    monkeypatch.setattr(steps, "refit", spoiled)
    folder, report = run_prune(source, layers="1", refit=True)
    scores = report["scores"]["refit"]
    assert not scores["kept"] and scores["held_out"]["after"] >= scores["held_out"]["before"]
    assert [row["step"] for row in report["steps"]] == ["depth"]
    assert changed(plain, folder) == set()
    assert "not refit, which would be worse" in command.in_words(report)


@pytest.mark.parametrize(
    ("family", "words", "reason"),
    [
        ("llama", {"layers": "0"}, "layers 0: no layer is before them"),
        ("gemma2", {"depth": 1}, "the layers of source normalise what they add"),
        ("bert", {"layers": "2,3"}, "the layers of source normalise"),
    ],
)
def test_where_nothing_can_make_up_for_it_that_is_said(
    family: str, words: dict[str, Any], reason: str, run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        run_prune(make(family, tmp_path / "source"), refit=True, **words)
    assert caught.value.hint == "Leave refit out."


def test_what_normalises_is_refit_for_its_neurons_alone(run_prune: Callable[..., Pruned], tmp_path: Path) -> None:
    _, report = run_prune(make("gemma2", tmp_path / "source"), layers="1", ffn=64, refit=True)
    assert (report["scores"]["refit"]["matrices"], report["scores"]["refit"]["runs_of_layers"]) == (LAYERS - 1, 0)


def test_a_model_that_gives_nan_stops_it(run_prune: Callable[..., Pruned], tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    model = load(source)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(source)
    with pytest.raises(StepError, match="NaN or infinite"):
        run_prune(source, layers="2", refit=True)
    running, anatomy, sizes = prepared("llama", tmp_path / "other")
    running.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(StepError, match="hidden states are NaN"):
        list(gather(running, anatomy, targets(anatomy, sizes, Cut(neurons=NEURONS), additive=True)))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory counts otherwise elsewhere")
def test_memory_is_predicted_within_a_fifth(tmp_path: Path) -> None:
    request = asked(layers="2", ffn=512, refit=True)
    arguments = command._arguments(resolve(str(EXAMPLE)), request, None, default_evaluation_text(), 16, 1)
    folder = tmp_path / "out"
    folder.mkdir()
    report, usage = run_measured("edgepack.prune.steps:prune", arguments | {"folder": str(folder)}, what="pruning")
    assert command.predicted(arguments).memory_bytes == pytest.approx(usage.peak_rss_bytes, rel=0.2)
    scores = report["scores"]["refit"]
    assert scores["batches"] + scores["held_out"]["batches"] == cost.REFIT_WINDOWS
    _, first, last = report["steps"]
    assert last["ci95"][1] < first["ci95"][0], "the example model gains far more than chance"
