"""The objective of encoders against its definition in numpy; the teacher's answers kept and not kept."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pico_teachers import load as load_plain
from pico_teachers import pruned, teacher

from edgepack.checkpoint import open_checkpoint
from edgepack.heal.encoder_model import Encoder, load
from edgepack.heal.encoder_objective import TowardsEncoder, answer_distance, hidden_distance
from edgepack.heal.encoder_rows import PADDING, pack
from edgepack.heal.encoder_teacher import Teacher, kept_bytes
from edgepack.onnx.tasks import TASKS


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products also where the machine has fast bfloat16 ones: values are compared digit by digit."""
    from contextlib import nullcontext

    from edgepack.heal import encoder_objective, encoder_teacher

    for module in (encoder_objective, encoder_teacher):
        monkeypatch.setattr(module, "mixed_precision", lambda device: nullcontext())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    guide = teacher(folder / "teacher", pooling="mean")
    return guide, pruned(guide, folder / "student")


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = random.Random(4)
    return pack([[2, *(generator.randrange(5, 400) for _ in range(length)), 3] for length in (3, 11, 7, 20, 5, 9)])


def objective(pair: tuple[Path, Path], rows: torch.Tensor, keep: bool = False, weight: float = 0.7) -> tuple[Any, Any]:
    guide, student = (load(open_checkpoint(folder)) for folder in pair)
    said = Teacher(guide, rows, (1, 2, 4), keep=keep)
    return TowardsEncoder(said, student, {1: 1, 2: 2, 3: 4}, weight), student


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def test_the_loss_is_that_of_the_definition_row_by_row(pair: tuple[Path, Path], rows: torch.Tensor) -> None:
    aim, student = objective(pair, rows)
    found = float(aim.loss(student.model, rows, list(range(len(rows)))))
    models, expected = [load_plain(folder) for folder in pair], []
    for row in rows:
        ids = row[row != PADDING][None]
        with torch.no_grad():
            outputs = [model(input_ids=ids, output_hidden_states=True).hidden_states for model in models]
        theirs, ours = ([state[0].double().numpy() for state in states] for states in outputs)
        answer = 1 - cosine(ours[3].mean(0), theirs[4].mean(0))
        hidden = [(1 - cosine(ours[own], theirs[other])).mean() for own, other in ((1, 1), (2, 2), (3, 4))]
        expected.append(answer + 0.7 * np.mean(hidden))
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_held_out_rows_are_scored_by_their_answers_alone_each_by_itself(
    pair: tuple[Path, Path], rows: torch.Tensor
) -> None:
    aim, student = objective(pair, rows)
    together = aim.score(student.model, rows)
    assert together.dtype == torch.float64
    assert together.tolist() == [float(aim.score(student.model, row[None])) for row in rows]
    plain, _ = objective(pair, rows, weight=0.0)
    loss = float(plain.loss(student.model, rows, list(range(len(rows)))))
    assert loss == pytest.approx(float(together.mean()), rel=1e-4)


def test_what_the_teacher_said_is_the_same_from_memory_in_any_order(
    pair: tuple[Path, Path], rows: torch.Tensor
) -> None:
    running, keeping = (objective(pair, rows, keep=keep)[0] for keep in (False, True))
    student = objective(pair, rows)[1]
    for places in ([4, 0], [1, 3, 2], [5, 4]):
        losses = [float(aim.loss(student.model, rows[places], places)) for aim in (running, keeping)]
        assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    again = objective(pair, rows, keep=True)[0]
    first = float(again.loss(student.model, rows[[5, 4]], [5, 4]))
    assert first == losses[1]  # asked for first or last


def test_the_teacher_reads_every_row_once_where_its_words_are_kept(pair: tuple[Path, Path], rows: torch.Tensor) -> None:
    aim, student = objective(pair, rows, keep=True)
    guide = aim._teacher.encoder
    seen: list[int] = []
    guide.model.register_forward_hook(lambda module, arguments, output: seen.append(1))
    for _ in range(3):
        aim.loss(student.model, rows[[0, 3]], [0, 3])
    assert len(seen) == 1
    assert kept_bytes(guide, rows, 3) == 2 * 3 * 32 * int((rows != PADDING).sum())


def encoder(task: str, labels: int = 4, kind: str | None = None) -> Encoder:
    config = SimpleNamespace(num_labels=labels, problem_type=kind)
    return Encoder(SimpleNamespace(config=config), TASKS[task], (), 1)


def kl(ours: Any, theirs: Any) -> Any:
    p, q = (np.exp(values) / np.exp(values).sum(-1, keepdims=True) for values in (theirs, ours))
    return (p * np.log(p / q)).sum(-1)


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def drawn(*shape: int) -> tuple[torch.Tensor, Any, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(sum(shape))
    ours, theirs = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    return ours, ours.double().numpy(), theirs, theirs.double().numpy()


def test_labels_of_texts_are_compared_as_one_distribution_or_each_by_itself(mask: torch.Tensor) -> None:
    a, ours, b, theirs = drawn(2, 4)
    assert answer_distance(encoder("text-classification"), [a], [b], mask).tolist() == pytest.approx(kl(ours, theirs))
    several = encoder("text-classification", kind="multi_label_classification")
    sides = [np.stack([values, np.zeros_like(values)], -1) for values in (ours, theirs)]
    assert answer_distance(several, [a], [b], mask).tolist() == pytest.approx(kl(*sides).mean(-1))


def test_labels_of_tokens_and_ends_of_answers_leave_padding_out(mask: torch.Tensor) -> None:
    a, ours, b, theirs = drawn(2, 4, 3)
    found = answer_distance(encoder("token-classification"), [a], [b], mask).tolist()
    assert found == pytest.approx([kl(ours[0], theirs[0]).mean(), kl(ours[1, :2], theirs[1, :2]).mean()], rel=1e-4)
    a, ours, b, theirs = drawn(2, 4)
    found = answer_distance(encoder("question-answering"), [a, b], [b, a], mask).tolist()
    rows = [(ours[0], theirs[0]), (ours[1, :2], theirs[1, :2])]
    assert found == pytest.approx([(kl(x, y) + kl(y, x)) / 2 for x, y in rows], rel=1e-4)


def test_one_score_is_compared_by_its_square_and_vectors_by_their_angle(mask: torch.Tensor) -> None:
    a, ours, b, theirs = drawn(2, 1)
    found = answer_distance(encoder("text-classification", labels=1), [a], [b], mask).tolist()
    assert found == pytest.approx(((ours - theirs) ** 2)[:, 0].tolist())
    a, ours, b, theirs = drawn(2, 5)
    found = answer_distance(encoder("sentence-similarity"), [a], [3 * b], mask).tolist()
    assert found == pytest.approx((1 - cosine(ours, theirs)).tolist(), rel=1e-4)


def test_padding_moves_no_gradient(mask: torch.Tensor) -> None:
    a, _, b, _ = drawn(2, 4)
    a.requires_grad_(True)
    answer_distance(encoder("question-answering"), [a, a], [b, b], mask).sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all() and (a.grad[1, 2:] == 0).all()
    states, wanted, _, _ = drawn(2, 4, 6)
    states.requires_grad_(True)
    hidden_distance(states, torch.as_tensor(wanted), {"attention_mask": mask}).sum().backward()
    assert states.grad is not None and (states.grad[1, 2:] == 0).all() and states.grad[1, :2].abs().sum() >= 0
