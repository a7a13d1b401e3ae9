from __future__ import annotations

import pytest
import torch

from edgepack.heal.objective import LEAST_K, TowardsTeacher, forward_kl, kl_of_largest


class Table(torch.nn.Module):
    """Logits by token alone."""

    def __init__(self, vocabulary: int, seed: int, width: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.nn.Parameter(width * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.rows[windows]


def naive(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(taught.double(), -1), torch.log_softmax(logits.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits, taught = (4 * torch.randn(700, 900, generator=generator) for _ in range(2))  # more rows than are one block
    return logits.requires_grad_(True), taught


def test_the_loss_and_its_gradient_are_those_of_the_definition(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, taught = pair
    weight = torch.rand(len(logits))
    found = forward_kl(logits, taught)
    (ours,) = torch.autograd.grad((found * weight).sum(), logits)
    (theirs,) = torch.autograd.grad((naive(logits, taught) * weight).sum(), logits)
    assert torch.allclose(found.double(), naive(logits, taught), rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours, theirs.float(), atol=1e-6)


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    logits = torch.randn(5, 40, requires_grad=True)
    found = forward_kl(logits, logits.detach())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.detach().abs().max() == 0 and gradient.abs().max() < 1e-7


def test_the_largest_are_all_of_it_where_the_vocabulary_is_no_larger(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, taught = pair
    largest = torch.log_softmax(taught, -1).topk(taught.shape[1])
    found = kl_of_largest(logits, largest.indices, largest.values)
    assert torch.allclose(found.double(), naive(logits, taught), rtol=1e-4, atol=1e-5)


def test_the_largest_and_a_rest_never_exceed_the_divergence_and_come_near(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, taught = pair
    exact = naive(logits, taught).detach()
    gaps = []
    for count in (16, 128, 512):
        largest = torch.log_softmax(taught, -1).topk(count)
        found = kl_of_largest(logits, largest.indices, largest.values).detach().double()
        assert (found <= exact + 1e-4).all()
        gaps.append(float((exact - found).mean() / exact.mean()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01


def test_the_gradient_over_the_largest_is_that_of_the_formula(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, taught = pair
    largest = torch.log_softmax(taught, -1).topk(64)
    weight = torch.rand(len(logits))
    found = kl_of_largest(logits, largest.indices, largest.values)
    (ours,) = torch.autograd.grad((found * weight).sum(), logits)
    wide = logits.detach().double().requires_grad_(True)
    chosen = torch.log_softmax(wide, -1).gather(1, largest.indices)
    p = largest.values.double().exp()
    rest, left = 1 - p.sum(-1), 1 - chosen.exp().sum(-1)
    expected = (p * (largest.values - chosen)).sum(-1) + rest * (rest.log() - left.log())
    (theirs,) = torch.autograd.grad((expected * weight).sum(), wide)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours, theirs.float(), atol=1e-5)


def test_what_the_teacher_said_is_kept_and_asked_for_once() -> None:
    teacher, student = Table(700, 1), Table(700, 2)
    asked = []
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    windows = torch.randint(700, (3, 40), generator=torch.Generator().manual_seed(3))
    keeping, running = TowardsTeacher(teacher, keep=LEAST_K), TowardsTeacher(teacher)
    first = float(keeping.loss(student, windows, [7, 8, 9]).detach())
    assert asked == [1, 1, 1]
    assert float(keeping.loss(student, windows[[2, 0]], [9, 7]).detach()) != first and len(asked) == 3
    assert float(keeping.loss(student, windows, [7, 8, 9]).detach()) == first
    assert first == pytest.approx(float(running.loss(student, windows, [0, 1, 2]).detach()), rel=0.02)


def test_the_teacher_is_asked_once_about_held_out_windows() -> None:
    teacher, student = Table(60, 1), Table(60, 2)
    asked = []
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(1))
    windows = torch.randint(60, (4, 20), generator=torch.Generator().manual_seed(3))
    objective = TowardsTeacher(teacher)
    first = objective.score(student, windows)
    assert torch.equal(objective.score(student, windows.clone()), first) and len(asked) == 4
    assert objective.score(student, windows.flip(1)).tolist() != first.tolist() and len(asked) == 8


def test_a_score_does_not_depend_on_what_is_scored_beside_it() -> None:
    objective, student = TowardsTeacher(Table(60, 1)), Table(60, 2)
    windows = torch.randint(60, (4, 20), generator=torch.Generator().manual_seed(3))
    together = objective.score(student, windows)
    assert together.tolist() == [float(objective.score(student, window[None])) for window in windows]
    with torch.no_grad():
        exact = naive(student(windows)[1, 10:], Table(60, 1)(windows)[1, 10:]).mean()
    assert together[1] == pytest.approx(float(exact))
