"""Windows drawn anew between passes: from the teacher's predictions, the same ones in every run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgepack.heal.cost import LEAST_K
from edgepack.heal.distill import Outcome, Settings, distill
from edgepack.heal.objective import TowardsTeacher
from edgepack.heal.renewal import SHARE, drawn_anew, noise

WINDOWS, TOKENS, VOCABULARY = 12, 32, 64


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=TOKENS, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(2))


def test_tokens_are_drawn_as_often_as_the_teacher_expects_them() -> None:
    tokens = 20_000
    window = torch.full((tokens,), 9)
    indices = torch.tensor([[4, 5, 6]]).repeat(tokens, 1)
    logs = torch.tensor([[0.5, 0.3, 0.1]]).log().repeat(tokens, 1).half()
    found = drawn_anew(window, indices, logs, noise(1))
    shares = [float((found == token).float().mean()) for token in (4, 5, 6, 9)]
    # A tenth of the teacher's mass lies on tokens that are not among the likeliest: there the old one stays.
    expected = [SHARE * 0.5, SHARE * 0.3, SHARE * 0.1, 1 - SHARE * 0.9]
    assert shares == pytest.approx(expected, abs=0.015)
    assert found[0] == 9 and torch.equal(found, drawn_anew(window, indices, logs, noise(1)))
    assert not torch.equal(found, drawn_anew(window, indices, logs, noise(2)))


def test_each_place_is_drawn_from_what_is_predicted_for_it_and_not_for_the_next(teacher: Any, text: Any) -> None:
    with torch.no_grad():
        likely = torch.softmax(teacher(text).logits[:, :-1], dim=-1)
    versions = [TowardsTeacher(teacher).renewed(text, version) for version in range(300)]
    changed = torch.stack([version[:, 1:] for version in versions])
    assert all(torch.equal(version[:, 0], text[:, 0]) for version in versions)
    for window, place in ((0, 0), (3, 7), (11, 30)):
        counts = torch.bincount(changed[:, window, place], minlength=VOCABULARY) / len(versions)
        wanted = SHARE * likely[window, place]
        wanted[text[window, place + 1]] += 1 - SHARE
        assert float((counts - wanted).abs().sum() / 2) < 0.2  # total variation; of the next place's: above 0.4
        other = SHARE * likely[window, place - 1 if place else 1]
        other[text[window, place + 1]] += 1 - SHARE
        assert float((counts - wanted).abs().sum()) < 0.7 * float((counts - other).abs().sum())


def test_a_version_is_the_same_whether_answers_were_kept_or_not(teacher: Any, text: Any) -> None:
    asked: list[int] = []
    hook = teacher.register_forward_hook(lambda module, inputs, output: asked.append(1))
    keeping = TowardsTeacher(teacher, keep=LEAST_K)
    student = copy.deepcopy(teacher)
    for first in (0, 4):  # the last four are not asked about before
        keeping.loss(student, text[first : first + 4], range(first, first + 4))
    asked.clear()
    first = keeping.renewed(text, 1)
    hook.remove()
    assert torch.equal(first, TowardsTeacher(teacher).renewed(text, 1))
    once = TowardsTeacher(teacher, keep=LEAST_K).loss(student, first[:4], range(4))
    assert float(keeping.loss(student, first[:4], range(4))) == float(once)  # what was kept of the old ones is gone


class Killed(BaseException):
    pass


def test_a_run_killed_in_a_later_pass_goes_on_to_the_same_weights(teacher: Any, text: Any, tmp_path: Path) -> None:
    settings = Settings(tokens=5 * WINDOWS * TOKENS, learning_rate=3e-3, batch_windows=5, warmup=2, save_seconds=0)

    def run(name: str, keep: int | None = None, die_after: int = 10**9) -> tuple[Outcome, Any]:
        student = copy.deepcopy(teacher).requires_grad_(True)
        with torch.no_grad():
            student.lm_head.weight += 0.05 * torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1))
        (tmp_path / name).mkdir(exist_ok=True)
        aim = TowardsTeacher(teacher, keep=keep)

        def progress(done: int, total: int) -> None:
            if done >= die_after:
                raise Killed

        found = distill(
            student, aim, text[:10], text[10:], settings, journal=tmp_path / name, renewed=aim.renewed,
            progress=progress,
        )  # fmt: skip
        return found, student.state_dict()

    for keep in (None, LEAST_K):
        whole, expected = run(f"whole-{keep}", keep)
        for steps in (3, 7):
            name = f"killed-{keep}-{steps}"
            with pytest.raises(Killed):
                run(name, keep, die_after=steps * 5 * TOKENS)
            again, weights = run(name, keep)
            assert again == whole and all(torch.equal(weights[key], expected[key]) for key in expected)


def test_every_pass_but_the_first_reads_a_version_of_its_own(teacher: Any, text: Any, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Watched(TowardsTeacher):
        def loss(self, student: Any, windows: torch.Tensor, places: Any) -> torch.Tensor:
            seen.extend(windows[torch.tensor(list(places)).argsort()])
            return super().loss(student, windows, places)

    settings = Settings(tokens=3 * 10 * TOKENS, learning_rate=1e-4, batch_windows=10, micro_batch=10)
    aim = Watched(teacher)
    student = copy.deepcopy(teacher).requires_grad_(True)
    distill(student, aim, text[:10], text[10:], settings, journal=tmp_path, renewed=aim.renewed)
    first, second, third = (torch.stack(seen[start : start + 10]) for start in (0, 10, 20))
    assert torch.equal(first, text[:10])
    assert torch.equal(second, aim.renewed(first, 1)) and torch.equal(third, aim.renewed(second, 2))
    assert 0.2 < float((first != second).float().mean()) < 0.6
