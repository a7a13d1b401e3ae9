"""A student that lost something learns it again from its teacher; the models are toys with words of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgepack.errors import StepError
from edgepack.heal import distill as module
from edgepack.heal.distill import Outcome, Settings, distill, paced
from edgepack.heal.memory import activation_bytes
from edgepack.heal.objective import TowardsTeacher

SETTINGS = Settings(tokens=16 * 6 * 32, learning_rate=3e-3, batch_windows=6, warmup=2, evaluations=4, save_seconds=0)
Distil = Callable[..., tuple[Outcome, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toys are computed on one thread: on a busy machine two wait for each other at every product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def damaged(teacher: Any) -> Any:
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student.requires_grad_(True)


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(64, (40, 32), generator=torch.Generator().manual_seed(2))
    return ids[:28], ids[28:]


@pytest.fixture
def distil(teacher: Any, damaged: Any, text: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> Distil:
    """Train a fresh copy of the damaged student; gives the outcome and the student."""

    def run(folder: str = "journal", objective: Any = None, **options: Any) -> tuple[Outcome, Any]:
        student = copy.deepcopy(damaged)
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = options.pop("settings", SETTINGS)
        aim = objective or TowardsTeacher(teacher)
        return distill(student, aim, *text, settings, journal=tmp_path / folder, **options), student

    return run


def same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_the_student_comes_nearer_on_text_it_was_not_trained_on(distil: Distil, teacher: Any, text: Any) -> None:
    outcome, student = distil()
    report = outcome.as_json()
    assert report["difference"]["ci95"][1] < 0
    assert report["after"]["kld"] < 0.75 * report["before"]["kld"]
    assert TowardsTeacher(teacher).score(student, text[1]).tolist() == list(outcome.after)
    assert [row["step"] for row in report["held_out"]] == [0, 4, 8, 12, 16]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("save_seconds", [0, 1e9])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(distil: Distil, save_seconds: float) -> None:
    settings = replace(SETTINGS, save_seconds=save_seconds)
    whole, expected = distil("whole", settings=settings)

    def die(done: int, total: int) -> None:
        if done >= total / 2:
            raise Killed

    with pytest.raises(Killed):
        distil("killed", settings=settings, progress=die)
    seen: list[int] = []
    resumed, student = distil("killed", settings=settings, progress=lambda done, total: seen.append(done))
    assert resumed == whole and same(student, expected)
    assert len(seen) == (8 if save_seconds == 0 else 16)  # from the last state, or from the first


@pytest.mark.parametrize("steps", [1, 3, 4, 15])
def test_whatever_step_it_is_killed_after_the_result_is_the_same(distil: Distil, steps: int, tmp_path: Path) -> None:
    whole, expected = distil("whole")

    def die(done: int, total: int) -> None:
        if done == steps * 6 * 32:
            (tmp_path / "killed" / "state.pt.tmp").write_bytes(b"half a state")
            raise Killed

    with pytest.raises(Killed):
        distil("killed", progress=die)
    resumed, student = distil("killed")
    assert resumed == whole and same(student, expected)


def test_scoring_takes_a_share_of_the_time_and_is_done_twice_at_least() -> None:
    assert [paced(tokens, 512, 1e-4, held_out=24).evaluations for tokens in (20_000, 300_000, 5_000_000)] == [2, 8, 8]
    assert paced(100_000, 512, 1e-4, held_out=24).evaluations < paced(100_000, 512, 1e-4, held_out=12).evaluations


def test_a_run_that_was_timed_before_the_start_comes_to_the_same_weights(distil: Distil) -> None:
    plain, expected = distil("plain", settings=replace(SETTINGS, micro_batch=2))
    timed, student = distil("timed", settings=replace(SETTINGS, micro_batch=2, probe=True))
    assert timed == plain and same(student, expected)
    assert plain.predicted_seconds is None and timed.predicted_seconds is not None and timed.predicted_seconds > 0


def test_a_state_of_another_run_is_not_taken_up(distil: Distil) -> None:
    distil("shared")
    other = replace(SETTINGS, learning_rate=1e-3)
    found, student = distil("shared", settings=other)
    expected, fresh = distil("fresh", settings=other)
    assert found == expected and same(student, fresh)


def test_a_state_that_is_cut_short_is_not_taken_up(distil: Distil, tmp_path: Path) -> None:
    whole, expected = distil("cut")
    state = tmp_path / "cut" / "state.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    again, student = distil("cut")
    assert again == whole and same(student, expected)


def test_training_that_makes_it_worse_leaves_the_student_as_it_was(distil: Distil, damaged: Any) -> None:
    outcome, student = distil(settings=replace(SETTINGS, learning_rate=3.0))
    assert outcome.best_step == 0 and outcome.after == outcome.before
    assert same(student, damaged)


def test_a_loss_that_is_nan_ends_in_an_error_and_keeps_the_best_on_disk(
    distil: Distil, teacher: Any, text: Any, tmp_path: Path
) -> None:
    class Breaking(TowardsTeacher):
        steps = 0

        def loss(self, *arguments: Any) -> torch.Tensor:
            self.steps += 1
            return super().loss(*arguments) * (float("nan") if self.steps > 2 * 6 else 1.0)

    with pytest.raises(StepError, match=r"loss is nan at step 7 of 16; the best so far, .* after step 4, is kept") as e:
        distil(objective=Breaking(teacher), settings=replace(SETTINGS, micro_batch=3))
    assert e.value.exit_code == 1 and "lower learning rate" in (e.value.hint or "")
    expected, student = distil("short", settings=replace(SETTINGS, tokens=16 * 6 * 32))
    kept = dict(module.Journal(tmp_path / "journal", "").best())
    student.load_state_dict(kept, strict=False)
    score = TowardsTeacher(teacher).score(student, text[1]).mean()
    assert float(score) < sum(expected.before) / len(expected.before)


def test_a_student_that_is_nan_from_the_start_is_not_trained(distil: Distil, damaged: Any) -> None:
    with torch.no_grad():
        damaged.model.norm.weight[0] = float("nan")
    with pytest.raises(StepError, match="nan before the first step"):
        distil()


def test_micro_batches_add_up_to_the_batch(distil: Distil) -> None:
    once = replace(SETTINGS, tokens=6 * 32, micro_batch=6)
    (whole, _), (parts, _) = distil("a", settings=once), distil("b", settings=replace(once, micro_batch=4))
    assert whole.history[1]["loss"] == pytest.approx(parts.history[1]["loss"], rel=1e-5)
    assert whole.after == pytest.approx(parts.after, rel=1e-3)


def test_checkpointing_changes_memory_not_the_result(distil: Distil) -> None:
    plain, saving = distil("a")[0], distil("b", settings=replace(SETTINGS, checkpointing=True))[0]
    assert saving.after == pytest.approx(plain.after, rel=1e-4)


def test_hidden_states_are_pulled_towards_those_of_the_teacher(distil: Distil, teacher: Any, text: Any) -> None:
    def cosine(student: Any) -> float:
        ours, theirs = (model(text[1], output_hidden_states=True).hidden_states[1] for model in (student, teacher))
        return float(torch.cosine_similarity(ours, theirs, dim=-1).mean())

    with torch.no_grad():
        _, plain = distil("a")
        _, guided = distil("b", objective=TowardsTeacher(teacher, hidden={1: 1, 2: 2}, hidden_weight=2.0))
        assert cosine(guided) > cosine(plain)


def test_every_window_is_seen_once_before_any_is_seen_again(
    teacher: Any, damaged: Any, text: Any, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Watching(TowardsTeacher):
        def loss(self, student: Any, windows: torch.Tensor, places: Any) -> torch.Tensor:
            seen.extend(places)
            assert torch.equal(windows, text[0][places])
            return super().loss(student, windows, places)

    distill(damaged, Watching(teacher), *text, SETTINGS, journal=tmp_path)
    passes = [seen[start : start + 28] for start in range(0, len(seen) - 27, 28)]
    assert len(passes) == 3 and all(sorted(order) == list(range(28)) for order in passes)
    assert passes[0] != passes[1]


def test_small_budgets_get_smaller_batches_and_never_no_step() -> None:
    assert [paced(tokens, 512, 1e-4).batch_windows for tokens in (2_000, 700_000, 5_000_000)] == [4, 5, 8]
    assert paced(1024, 512, 1e-4).warmup == 1


def test_memory_grows_with_windows_layers_and_vocabulary(teacher: Any, text: Any) -> None:
    window = text[0][:1]
    one = activation_bytes(teacher, window)
    assert activation_bytes(teacher, window[:, :16]) < 0.6 * one
    assert one > 4 * 32 * (64 + 2 * (2 * 48 + 4 * 32))
