"""What healing is said to take, against what it takes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepack.checkpoint import open_checkpoint
from edgepack.heal.cost import Cost, Facts, Means, facts_of, memory_bytes, training_seconds
from edgepack.heal.distill import Outcome
from edgepack.heal.journal import Journal
from edgepack.heal.means import Machine, predict
from edgepack.heal.probe import Pace, timed
from edgepack.heal.watch import Watcher
from edgepack.heal.weights import FullWeights
from edgepack.worker import run_measured

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
FULL = Means("full", 0, checkpointing=False, micro_batch=4)
LORA = Means("lora", 32, checkpointing=False, micro_batch=4)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return facts_of(open_checkpoint(EXAMPLE))


def memory(facts: Facts, means: Means = FULL, window: int = 512, **options: bool) -> int:
    return memory_bytes(facts, facts, means, window, **({"mixed": True} | options))


def test_facts_are_those_of_the_loaded_model(facts: Facts) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE)
    inside = [module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.inside == sum(module.weight.numel() for module in inside)
    assert facts.flow == sum(module.in_features + module.out_features for module in inside)
    config = model.config
    assert (facts.layers, facts.hidden, facts.vocabulary, facts.context) == (
        config.num_hidden_layers, config.hidden_size, config.vocab_size, config.max_position_embeddings,
    )  # fmt: skip
    assert facts.stored_half


def test_memory_grows_with_everything_that_is_held(facts: Facts) -> None:
    base = memory(facts)
    wider = replace(facts, parameters=2 * facts.parameters, inside=2 * facts.inside, flow=2 * facts.flow)
    larger = {
        "model": memory(wider),
        "vocabulary": memory(replace(facts, vocabulary=4 * facts.vocabulary)),
        "window": memory(facts, window=1024),
        "micro-batch": memory(facts, replace(FULL, micro_batch=8)),
        "float32": memory(facts, mixed=False),
    }
    smaller = {
        "checkpointing": memory(facts, replace(FULL, checkpointing=True)),
        "half": memory(facts, replace(FULL, half=True)),
        "fewer windows": memory(facts, replace(FULL, micro_batch=1)),
    }
    assert all(value > base for value in larger.values()), larger
    assert all(value < base for value in smaller.values()), smaller
    assert memory(facts, replace(LORA, rank=16)) < memory(facts, replace(LORA, rank=64))
    # Where weights outweigh activations, adapters are what saves.
    assert memory(wider, replace(LORA, micro_batch=1), window=32) < memory(
        wider, replace(FULL, micro_batch=1), window=32
    )


def test_time_grows_with_tokens_models_and_repeated_passes(facts: Facts) -> None:
    def seconds(tokens: int = 10**6, student: Facts = facts, means: Means = FULL, **options: Any) -> float:
        return training_seconds(student, facts, means, tokens, 512, **({"mixed": True, "cores": 2} | options))

    assert seconds(2 * 10**6) == pytest.approx(2 * seconds())
    assert seconds(student=replace(facts, inside=2 * facts.inside)) > 1.2 * seconds()
    assert seconds(means=replace(FULL, checkpointing=True)) > seconds() > seconds(means=LORA)
    assert seconds(cores=1) == pytest.approx(2 * seconds())
    assert seconds(mixed=False) > seconds() > seconds(gpu=True)


def test_a_cost_reads_as_a_sentence() -> None:
    assert Cost(FULL, 2_340_000_000, 5400).sentence() == "all weights; about 90 min; 2.3 GB of memory"
    long = Cost(FULL, 2_340_000_000, 5400, sampling_seconds=600, kept_bytes=1_520_000_000).sentence()
    assert long == (
        "all weights; about 90 min, 10 min of it until the teacher has written more text; 2.3 GB of memory, "
        "up to 1.5 GB more if free, for what the teacher said"
    )
    assert "LoRA of rank 32, frozen weights in bfloat16; about 45 s" in Cost(replace(LORA, half=True), 1, 45).sentence()


def test_what_the_text_lacks_costs_time_and_room_for_what_is_said_of_it() -> None:
    checkpoint = open_checkpoint(EXAMPLE)
    machine = Machine(8 << 30, 2, mixed=False)

    def cost(tokens: int, text_bytes: int | None) -> Cost:
        return predict(checkpoint, checkpoint, tokens, cores=2, text_bytes=text_bytes, machine=machine)

    enough, short = cost(8_000_000, 10**8), cost(8_000_000, 700_000)
    assert enough.sampling_seconds == cost(8_000_000, None).sampling_seconds == enough.kept_bytes == 0
    assert short.seconds - short.sampling_seconds == pytest.approx(enough.seconds)
    # 300,000 tokens of the example at 0.66 ms of one core each (docs/healing.md), on two.
    assert short.sampling_seconds == pytest.approx(300_000 * 0.66e-3 / 2, rel=0.3)
    assert short.kept_bytes == pytest.approx(500_000 * 512 * 6, rel=0.01)  # of what is passed 16 times
    assert cost(500_000, 700_000).kept_bytes == pytest.approx(200_000 * 512 * 6, rel=0.01)  # of the text
    assert cost(100_000, 700_000).kept_bytes == 0  # nothing is passed twice
    assert cost(10**9, 700_000).kept_bytes == 0  # more than a quarter of what is free


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int, Path]:
    """The example healed by itself in a process of its own: report, peak memory, journal."""
    from edgepack.text import default_evaluation_text

    folders = [tmp_path_factory.mktemp(name) for name in ("healed", "journal")]
    arguments = {
        "model": str(EXAMPLE), "teacher": str(EXAMPLE), "folder": str(folders[0]), "journal": str(folders[1]),
        "tokens": 36 * 512, "text": None, "evaluation": str(default_evaluation_text()), "threads": 1,
    }  # fmt: skip
    report, usage = run_measured("edgepack.heal.worker:heal", arguments, what="healing")
    return report, usage.peak_rss_bytes, folders[1]


def test_memory_is_predicted_within_a_fifth(healed: tuple[dict[str, Any], int, Path]) -> None:
    report, peak, _ = healed
    checkpoint = open_checkpoint(EXAMPLE)
    expected = predict(checkpoint, checkpoint, 36 * 512, cores=1)
    assert expected.memory_bytes == pytest.approx(peak, rel=0.2)
    assert report["cost"]["predicted_memory_bytes"] == expected.memory_bytes
    assert report["cost"]["peak_memory_bytes"] == pytest.approx(peak, rel=0.02)
    assert report["means"]["method"] == expected.means.method == "full"


def test_time_is_predicted_from_real_passes(healed: tuple[dict[str, Any], int, Path]) -> None:
    cost = healed[0]["cost"]
    # Whatever else the machine does: a half of it or twice as much would be a mistake in the sum.
    assert 0.4 < cost["predicted_seconds"] / cost["seconds"] < 2.5
    assert cost["tokens_per_s"] == pytest.approx(healed[0]["tokens"] / cost["seconds"])


def test_what_a_run_notes_down_is_told_once_and_in_words(healed: tuple[dict[str, Any], int, Path]) -> None:
    report, _, journal = healed
    lines: list[str] = []
    seen: list[tuple[int, int]] = []
    watcher = Watcher(journal, lines.append, lambda done, total: seen.append((done, total)))
    watcher(1, 2)
    watcher(2, 2)
    assert seen == [(1, 2), (2, 2)]
    assert lines[0].startswith("training takes about ")
    scored = [f"step {row['step']} of {report['steps']}" for row in report["held_out"]]
    assert [line.split(":")[0] for line in lines[1:]] == scored
    assert "loss" not in lines[1] and all("held-out KLD" in line for line in lines[1:])


def test_a_score_is_told_as_the_digits_of_the_reported_one(tmp_path: Path) -> None:
    score = 0.0231250004  # 0.02313 in four digits; 0.02312 by way of the report's six
    history = [{"step": 0.0, "held_out": score}, {"step": 1.0, "loss": 1.0, "learning_rate": 0.1, "held_out": score}]
    Journal(tmp_path, "a run").note(history, 1, None, "kld")
    outcome = Outcome(steps=1, tokens=8, best_step=0, before=(score,), after=(score,), history=tuple(history))
    lines: list[str] = []
    Watcher(tmp_path, lines.append, lambda done, total: None).look()
    reported = outcome.as_json()["held_out"]
    assert [row["kld"] for row in reported] == [0.023125, 0.023125]
    assert [line.rpartition("held-out ")[2] for line in lines] == [f"KLD {row['kld']:.4g}" for row in reported]


def test_a_journal_that_is_not_there_yet_is_no_news(tmp_path: Path) -> None:
    lines: list[str] = []
    Watcher(tmp_path, lines.append, lambda done, total: None)(1, 2)
    (tmp_path / "progress.json").write_text("{")
    Watcher(tmp_path, lines.append, lambda done, total: None)(1, 2)
    assert lines == []


def test_a_pace_adds_up() -> None:
    pace = Pace(new=3.0, seen=2.0, optimizer=0.5, scored=1.0)
    assert pace.seconds(new=7, seen=40, steps=10, scored=6) == 7 * 3 + 40 * 2 + 5 + 6


def test_windows_the_teacher_has_answered_are_timed_apart() -> None:
    student, asked = torch.nn.Linear(3, 3), set()

    class Aim:
        def loss(self, model: Any, windows: Any, places: Any) -> torch.Tensor:
            if not asked.issuperset(places):
                time.sleep(0.1 * len(windows))
            asked.update(places)
            found: torch.Tensor = model(windows).square().mean()
            return found

        def score(self, model: Any, windows: Any) -> torch.Tensor:
            return torch.zeros(len(windows))

    for windows in (4, 3):  # two micro-batches, or less
        asked.clear()
        training = torch.ones(windows, 3)
        pace = timed(student, Aim(), FullWeights(student), training, training[:1], micro_batch=2)
        assert 0.1 <= pace.new < 0.2 and pace.seen < 0.05


def test_timing_changes_neither_weights_nor_gradients_nor_random_numbers() -> None:
    torch.manual_seed(0)
    student = torch.nn.Linear(3, 3)

    class Aim:
        def loss(self, model: Any, windows: Any, places: Any) -> torch.Tensor:
            found: torch.Tensor = model(windows).square().mean()
            return found

        def score(self, model: Any, windows: Any) -> torch.Tensor:
            return torch.zeros(len(windows))

    before, state = student.weight.clone(), torch.get_rng_state()
    pace = timed(student, Aim(), FullWeights(student), torch.ones(2, 3), torch.ones(1, 3), micro_batch=1)
    assert pace.new > 0 and pace.seen > 0 and pace.optimizer > 0 and pace.scored >= 0
    assert torch.equal(student.weight, before) and student.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
