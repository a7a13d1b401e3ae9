"""Adapters: the student at first, a change of low rank in the end, and nothing held for what is frozen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgepack.heal.distill import Settings, _prepare, distill
from edgepack.heal.lora import LoraWeights, adapted
from edgepack.heal.objective import TowardsTeacher

RANK = 4
SETTINGS = Settings(tokens=8 * 6 * 32, learning_rate=2e-2, batch_windows=6, warmup=2, evaluations=4, save_seconds=0)
SIZES = {"vocab_size": 64, "initializer_range": 0.3}
LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, tie_word_embeddings=True, **SIZES,
)  # fmt: skip
GPT2 = transformers.GPT2Config(
    n_embd=32, n_inner=48, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[LLAMA, GPT2], ids=["linear", "conv1d"])
def teacher(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(request.param).eval()
    return found.requires_grad_(False)


@pytest.fixture
def student(teacher: Any) -> Any:
    damaged = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in adapted(damaged):
            module.weight += 0.08 * torch.randn(module.weight.shape, generator=generator)
    return damaged


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(64, (40, 32), generator=torch.Generator().manual_seed(2))
    return ids[:28], ids[28:]


def logits(model: Any, text: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(text[1]).logits
    return found


def trained(student: Any, teacher: Any, text: Any, journal: Path, **options: Any) -> tuple[Any, Any, LoraWeights]:
    journal.mkdir(exist_ok=True)
    healed = copy.deepcopy(student)
    weights = LoraWeights(healed, rank=RANK)
    settings = options.pop("settings", SETTINGS)
    outcome = distill(healed, TowardsTeacher(teacher), *text, settings, journal=journal, weights=weights, **options)
    return outcome, healed, weights


def test_a_student_with_new_adapters_is_the_student(student: Any, text: Any) -> None:
    before = logits(student, text)
    LoraWeights(student, rank=RANK)
    assert torch.equal(logits(student, text), before)


def test_the_merged_model_computes_what_the_adapters_did(student: Any, teacher: Any, text: Any, tmp_path: Path) -> None:
    outcome, healed, weights = trained(student, teacher, text, tmp_path)
    adapted_logits = logits(healed, text)
    weights.merge()
    assert outcome.best_step > 0 and not torch.allclose(adapted_logits, logits(student, text), atol=0.01)
    assert torch.allclose(logits(healed, text), adapted_logits, atol=1e-4)
    healed_score = TowardsTeacher(teacher).score(healed, text[1]).mean()
    assert float(healed_score) == pytest.approx(sum(outcome.after) / len(outcome.after), rel=1e-3)
    assert float(healed_score) < 0.95 * sum(outcome.before) / len(outcome.before)


def test_only_matrices_of_layers_change_and_by_no_more_than_the_rank(
    student: Any, teacher: Any, text: Any, tmp_path: Path
) -> None:
    _, healed, weights = trained(student, teacher, text, tmp_path)
    weights.merge()
    matrices = {f"{name}.weight" for name, _ in adapted(student)}
    before, after = student.state_dict(), healed.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == matrices and len(matrices) in (2 * 7, 2 * 4)
    for name in matrices:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[RANK - 1] > 1e-4 and values[RANK] < 1e-5 * values[0]


def test_frozen_weights_get_neither_gradients_nor_moments(student: Any, teacher: Any, text: Any) -> None:
    weights = LoraWeights(student, rank=RANK)
    TowardsTeacher(teacher).loss(student, text[0][:2], [0, 1]).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in student.parameters())
    flow = sum(sum(adapter.weight.shape) for _, adapter in adapted(student))
    assert sum(values.numel() for values in weights.masters.values()) == RANK * flow
    assert all(values.requires_grad for values in weights.masters.values())


class Killed(BaseException):
    pass


def test_adapters_that_are_killed_go_on_to_the_same_weights(
    student: Any, teacher: Any, text: Any, tmp_path: Path
) -> None:
    whole, expected, _ = trained(student, teacher, text, tmp_path / "whole")

    def die(done: int, total: int) -> None:
        if done >= total / 2:
            raise Killed

    with pytest.raises(Killed):
        trained(student, teacher, text, tmp_path / "killed", progress=die)
    resumed, healed, _ = trained(student, teacher, text, tmp_path / "killed")
    assert resumed == whole and torch.equal(logits(healed, text), logits(expected, text))


def test_a_state_of_another_student_is_not_taken_up(student: Any, teacher: Any, text: Any, tmp_path: Path) -> None:
    """Adapters of all students start alike: what they stand beside has to be told apart."""
    trained(student, teacher, text, tmp_path)
    other = copy.deepcopy(student)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    found, _, _ = trained(other, teacher, text, tmp_path)
    fresh, _, _ = trained(other, teacher, text, tmp_path / "fresh")
    assert found == fresh


def test_adapters_that_make_it_worse_are_left_at_zero(student: Any, teacher: Any, text: Any, tmp_path: Path) -> None:
    outcome, healed, weights = trained(student, teacher, text, tmp_path, settings=replace(SETTINGS, learning_rate=50.0))
    weights.merge()
    assert outcome.best_step == 0 and torch.equal(logits(healed, text), logits(student, text))


def test_checkpointing_gives_adapters_the_same_gradients(student: Any, teacher: Any, text: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        healed = copy.deepcopy(student)
        weights = LoraWeights(healed, rank=RANK)
        with torch.no_grad():
            for name, values in weights.masters.items():
                values.copy_(values if name.endswith("lora_A") else 0.01 * torch.ones_like(values))
        _prepare(healed, checkpointing)
        TowardsTeacher(teacher).loss(healed, text[0][:2], [0, 1]).backward()
        gradients.append({name: values.grad for name, values in weights.masters.items()})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0 and torch.allclose(gradients[1][name], plain, rtol=1e-3, atol=1e-6)
