"""What calibration gathers, against the equations in float64 and against noise put in by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from tiny_models import Case, make

from edgepack.calibrate.layers import Forward, load_model, matrices, mean_kld, replaced
from edgepack.calibrate.statistics import Collector, groups, width
from edgepack.errors import InputRefused, StepError
from edgepack.gguf.model import describe

WINDOWS = np.random.default_rng(5).integers(2, 300, (3, 40)).tolist()
CASES = {
    "llama": Case("Llama", {"num_hidden_layers": 2}),
    "llama-tied": Case("Llama", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "gpt2": Case("GPT2", {"num_hidden_layers": 2, "num_key_value_heads": 4}, model="LMHeadModel"),
    "gemma3": Case("Gemma3Text", {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 2}),
    "olmo2-tied": Case("Olmo2", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a random checkpoint, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            make(CASES[name], root / name, seed=3)
        return root / name

    return folder


def opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and the modules that calibration watches."""
    model = load_model(folder)
    found = matrices(model, describe(folder))
    return model, {name: matrix.module for name, matrix in found.items() if not matrix.looked_up}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_second_moments_are_those_of_the_equations_in_float64(made: Made, name: str) -> None:
    model, layers = opened(made(name))
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    if name == "llama-tied":
        del weights["lm_head.weight"]
    found = Collector(model, WINDOWS).moments(layers)
    sums: dict[str, Any] = {}
    for ids in WINDOWS:
        if name == "gpt2":
            inputs, logits = naive.gpt2(weights, ids, layers=2, heads=4)
        else:
            inputs, logits = naive.llama(weights, ids, layers=2, heads=4, kv_heads=2)
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].double().numpy()
        np.testing.assert_allclose(logits, theirs, atol=1e-4)  # the equations are those of this model
        for key, x in inputs.items():
            sums[key] = sums.get(key, 0) + x.T @ x
    assert sums.keys() == found.keys()
    for key, total in sums.items():
        expected = total / sum(map(len, WINDOWS))
        np.testing.assert_allclose(found[key].numpy(), expected, atol=1e-5 * np.abs(expected).max(), err_msg=key)


def test_matrices_that_are_given_one_input_share_one_matrix(made: Made) -> None:
    model, layers = opened(made("llama"))
    found = Collector(model, WINDOWS).moments(layers)
    q, k, gate, up = (found[f"blk.1.{name}.weight"].data_ptr() for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up"))
    assert q == k and gate == up and q != gate


@contextmanager
def noisy(layer: Any, sigma: float, generator: torch.Generator) -> Iterator[None]:
    """Add noise to every output of a layer."""
    handle = layer.register_forward_hook(
        lambda module, inputs, output: output + sigma * torch.randn(output.shape, generator=generator)
    )
    try:
        yield
    finally:
        handle.remove()


def divergence(model: Any, reference: torch.Tensor) -> float:
    """Mean KL divergence over all positions, from logits in float64."""
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor(WINDOWS)).logits.double(), -1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_foretell_the_divergence_that_noise_causes(made: Made, name: str) -> None:
    model, layers = opened(made(name))
    many = [ids[k:] + ids[:k] for ids in WINDOWS for k in range(0, 40, 4)]  # labels are drawn: more windows, less noise
    gradients, _ = Collector(model, many).gradients(layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        reference = torch.log_softmax(model(torch.tensor(WINDOWS)).logits.double(), -1)
    ratios = []
    for key, layer in layers.items():
        sigma = float((2e-3 / (0.5 * gradients[key].sum())) ** 0.5)  # for a divergence of 0.002 nats
        measured = []
        for _ in range(6):
            with noisy(layer, sigma, generator):
                measured.append(divergence(model, reference))
        ratios.append(2e-3 / np.mean(measured))
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, rel=0.1)
    assert min(ratios) > 0.7 and max(ratios) < 1.4


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2-tied"])
def test_lookup_gradients_foretell_the_divergence_that_noise_in_the_table_causes(made: Made, name: str) -> None:
    model, layers = opened(made(name))
    many = [ids[k:] + ids[:k] for ids in WINDOWS for k in range(0, 40, 4)]
    _, lookups = Collector(model, many).gradients(layers)
    with torch.no_grad():
        reference = torch.log_softmax(model(torch.tensor(WINDOWS)).logits.double(), -1)
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    kept = table.data.clone()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())  # untied: the looked-up side alone is spoiled
    sigma = float((2e-3 / (0.5 * lookups.sum())) ** 0.5)
    generator = torch.Generator().manual_seed(2)
    measured = []
    for _ in range(6):
        table.data = kept + sigma * torch.randn(kept.shape, generator=generator)
        measured.append(divergence(model, reference))
    assert 2e-3 / np.mean(measured) == pytest.approx(1, rel=0.25)


def test_a_table_that_the_file_holds_twice_is_only_looked_up(made: Made) -> None:
    folder = made("olmo2-tied")
    found = matrices(load_model(folder), describe(folder))
    assert found["token_embd.weight"].looked_up and not found["output.weight"].looked_up


def test_gradients_are_the_same_again(made: Made) -> None:
    model, layers = opened(made("llama"))
    first, second = (Collector(model, WINDOWS).gradients(layers) for _ in range(2))
    assert all(torch.equal(first[0][key], second[0][key]) for key in layers)
    assert torch.equal(first[1], second[1])


def test_the_model_is_left_as_it_was(made: Made) -> None:
    model, layers = opened(made("llama"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Collector(model, WINDOWS).gradients(layers)
    Collector(model, WINDOWS).moments(layers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_portions_hold_every_layer_once_and_fit(made: Made) -> None:
    _, layers = opened(made("gpt2"))
    limit = 3 * 4 * 64**2
    parts = list(groups(layers, limit))
    assert [name for part in parts for name in part] == list(layers)
    for part in parts:
        assert len(part) == 1 or sum(4 * width(layer) ** 2 for layer in part.values()) <= limit


def test_a_model_that_gives_nan_is_refused(made: Made) -> None:
    model, layers = opened(made("llama"))
    model.get_output_embeddings().weight.data[5, 0] = float("nan")
    with pytest.raises(InputRefused, match=r"lm_head\.weight: 1 of 20480 weights are NaN or infinite"):
        Collector(model, WINDOWS).gradients(layers)
    with pytest.raises(StepError, match="NaN or infinite logits"):
        Forward(model, [ids * 2 for ids in WINDOWS]).logits()
    model.get_output_embeddings().weight.data[5] = 3e38  # finite, and its product is not
    with pytest.raises(StepError, match="NaN or infinite"):
        Collector(model, WINDOWS).gradients(layers)


def test_replaced_values_are_used_and_taken_back(made: Made) -> None:
    folder = made("gpt2")
    model, spec = load_model(folder), describe(folder)
    forward = Forward(model, [ids + ids for ids in WINDOWS])
    whole = forward.logits()
    for matrix in matrices(model, spec).values():
        before = matrix.rows.clone()
        with replaced(matrix, matrix.rows * 1.01):
            assert not torch.equal(whole, forward.logits())
        assert torch.equal(matrix.rows, before)
    assert torch.equal(forward.logits(), whole)


def test_mean_kld_is_that_of_float64() -> None:
    generator = torch.Generator().manual_seed(4)
    p, q = (torch.randn(700, 50, generator=generator) for _ in range(2))
    logs = [torch.log_softmax(part.double(), -1) for part in (p, q)]
    expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert mean_kld(torch.log_softmax(p, -1), q) == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_whose_matrices_are_others_is_refused(made: Made) -> None:
    model = load_model(made("gpt2"))
    with pytest.raises(InputRefused, match=r"calibration expects a matrix \[320, 64\] in transformers, and finds none"):
        matrices(model, describe(made("llama")))
