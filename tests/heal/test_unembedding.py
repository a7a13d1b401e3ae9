"""Logits a block at a time: the same loss and gradients as of all at once, for models that allow it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from edgepack.heal import objective, unembedding
from edgepack.heal.objective import TowardsTeacher, forward_kl
from edgepack.heal.unembedding import take_apart

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
WINDOWS = torch.randint(96, (3, 24), generator=torch.Generator().manual_seed(1))


def model(seed: int = 0, *, kind: Any = transformers.LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(kind(**SIZES, **options)).eval()


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products, whatever this machine is fast at."""
    monkeypatch.setattr(objective, "fast_bfloat16", lambda: False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unembedding, "_LEAST_ROWS", 7)
    monkeypatch.setattr(unembedding, "_BLOCK_VALUES", 7 * 96)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("single", "small_blocks")
def test_blocks_give_the_loss_and_the_gradients_of_all_logits_at_once(tied: bool) -> None:
    student, teacher = (model(seed, tie_word_embeddings=tied) for seed in (0, 1))
    plain = copy.deepcopy(student)
    found = TowardsTeacher(teacher).loss(student, WINDOWS, range(3))
    (2 * found).backward()
    ours, theirs = (torch.log_softmax(each(WINDOWS).logits.double(), -1) for each in (plain, teacher))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    (2 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, ours_), theirs_ in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours_.grad, theirs_.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.usefixtures("small_blocks")
def test_a_bias_of_the_output_gets_its_gradient(single: None) -> None:
    student, teacher = model(0, tie_word_embeddings=False), model(1)
    student.lm_head = torch.nn.Linear(32, 96)
    plain = copy.deepcopy(student)
    assert take_apart(student, WINDOWS) is not None
    TowardsTeacher(teacher).loss(student, WINDOWS, range(3)).backward()
    forward_kl(plain(WINDOWS).logits.flatten(0, 1), teacher(WINDOWS).logits.flatten(0, 1).detach()).mean().backward()
    assert torch.allclose(student.lm_head.bias.grad, plain.lm_head.bias.grad, atol=1e-6)


def test_models_that_do_something_to_their_logits_are_not_taken_apart(single: None) -> None:
    capped = model(0, kind=transformers.Gemma2Config, head_dim=16, final_logit_softcapping=2.0)
    assert take_apart(capped, WINDOWS) is None and take_apart(model(), WINDOWS) is not None
    assert take_apart(torch.nn.Embedding(96, 96), WINDOWS) is None
    teacher = model(1)
    found = TowardsTeacher(teacher).loss(capped, WINDOWS, range(3))
    expected = forward_kl(capped(WINDOWS).logits.flatten(0, 1), teacher(WINDOWS).logits.flatten(0, 1)).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_products_in_bfloat16_are_near_those_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, gradients = [], []
    for fast in (False, True):
        monkeypatch.setattr(objective, "fast_bfloat16", lambda fast=fast: fast)
        student = model(0)
        loss = TowardsTeacher(model(1)).loss(student, WINDOWS, range(3))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(student.model.layers[0].mlp.up_proj.weight.grad)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.999
    assert gradients[1].dtype == torch.float32


def test_a_frozen_output_matrix_gets_no_gradient(single: None) -> None:
    student = model(0, tie_word_embeddings=False)
    student.lm_head.requires_grad_(False)
    TowardsTeacher(model(1)).loss(student, WINDOWS, range(3)).backward()
    assert student.lm_head.weight.grad is None and student.model.norm.weight.grad.abs().max() > 0
