"""Repair a pruned model by distillation: the worker behind `edgepack heal`.

The student (a pruned folder, or any smaller model of the same vocabulary) learns the teacher's next-token predictions
on text (`distill.py`): all its weights in float32, or adapters where memory asks for them (`means.py`). It is kept as
it scored best on held-out text, the start included, and written in the number format it had, shard by shard under the
same names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgepack.calibrate.layers import load_model
from edgepack.calibrate.overlap import refuse_overlap
from edgepack.calibrate.texts import CalibrationText, calibration_text, calibration_windows, evaluation_text
from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused, UsageError
from edgepack.heal.cost import Facts, Means, facts_of, kept_bytes, memory_bytes
from edgepack.heal.data import TrainingText, training_text, windows_wanted
from edgepack.heal.device import best_device
from edgepack.heal.distill import Outcome, distill, paced
from edgepack.heal.evaluation import WINDOWS, Evaluation, recovered
from edgepack.heal.hidden import kept_layers, pairs
from edgepack.heal.means import DEFAULT_RANK, Machine, Method, choose, peak_rate, window_tokens
from edgepack.heal.memory import worth_keeping
from edgepack.heal.objective import TowardsTeacher
from edgepack.heal.session import decided, here, peak_memory_bytes, trained
from edgepack.heal.written import write_model
from edgepack.text import read_text, text_sha256
from edgepack.worker import Progress, no_progress

_COMPARED = 8  # windows that both tokenizers have to cut alike


def heal(
    *,
    model: str,
    teacher: str,
    folder: str,
    tokens: int,
    text: Mapping[str, Any] | str | None,
    evaluation: str,
    threads: int,
    journal: str,
    learning_rate: float | None = None,
    method: Method = "auto",
    rank: int = DEFAULT_RANK,
    hidden_weight: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train a student towards its teacher and write it (worker function).

    Args:
        model: The student: a checkpoint folder of a causal language model.
        teacher: Folder of the model it was made from.
        folder: Empty; gets the healed model.
        tokens: To train on, with repetitions.
        text: What `texts.calibration_text` takes; None for the packaged text.
        evaluation: Path of the text that nothing may be tuned on.
        threads: For torch.
        journal: Folder that outlives a killed process.
        learning_rate: Peak; None takes `means.peak_rate`.
        method: `full`, `lora`, or `auto` for the best that fits in memory.
        rank: Of adapters.
        hidden_weight: Of a loss that pulls hidden states towards those of the teacher's layers that the student's were;
            None takes none.
        progress: In tokens.

    Returns:
        `tokens`, `steps`, `best_step`, held-out `before`, `after` and `difference` (KLD with ci95), `learning_rate`,
        `text`, `text_sha256`, `windows`, `sampled_windows`, `passes` over both; `evaluation`: rows of teacher, student
        `before` and `after` on the evaluation text, and the shares that were `recovered`; `means`: how it was trained;
        `cost`: what was predicted and what it took.

    Raises:
        InputRefused: The tokenizers differ; the text is too short, or overlaps the evaluation text.
        UsageError: A method or rank that is not offered; a loss on hidden states where nothing says which layers
            stayed.
        StepError: Not enough memory; a model can't be loaded; the loss is NaN (the best so far stays in `journal`).
    """
    torch.set_num_threads(threads)
    pair = _read(Path(model), Path(teacher), text, evaluation)
    layers = _layers(pair) if hidden_weight else {}
    device, notes = best_device(), Path(journal)
    machine = here(device)
    means = _means(pair, machine, notes, method, rank)
    pieces = _pieces(pair, tokens)
    student, guide = (load_model(folder).to(device) for folder in (pair.student, pair.teacher))
    measured = Evaluation(guide, _evaluation_windows(pair, evaluation))
    own, before = measured.rows(student)
    started = time.monotonic()
    found = training_text(
        guide, pieces, tokens, journal=notes, progress=lambda done, total: progress(done, total + tokens)
    )
    sampling_seconds = time.monotonic() - started
    if not layers:
        means = replace(means, keep=decided(notes, "keep", lambda: worth_keeping(tokens, found.training, guide)))
    settings = replace(
        paced(tokens, pair.window, learning_rate or peak_rate(means, pair.made), held_out=len(found.held_out)),
        micro_batch=means.micro_batch,
        checkpointing=means.checkpointing,
        probe=True,
    )
    objective = TowardsTeacher(guide, hidden=layers, hidden_weight=hidden_weight or 0.0, keep=means.keep)
    with trained(student, guide, means) as weights:
        outcome = distill(
            student,
            objective,
            found.training,
            found.held_out,
            settings,
            journal=notes,
            weights=weights,
            renewed=objective.renewed,
            progress=_later(progress, found.sampled * pair.window),
        )
    _, after = measured.rows(student)
    write_model(open_checkpoint(pair.student), student, Path(folder))
    return outcome.as_json() | {
        "learning_rate": settings.learning_rate,
        "batch_tokens": settings.batch_windows * pair.window,
        **_of_text(pair, found, outcome),
        "device": device.type,
        "means": asdict(means) | {"hidden_weight": hidden_weight or 0.0},
        "cost": {
            "predicted_seconds": outcome.predicted_seconds,
            "seconds": outcome.seconds,
            "sampling_seconds": sampling_seconds,
            "tokens_per_s": outcome.tokens / outcome.seconds,
            "predicted_memory_bytes": _predicted_bytes(pair, means, machine, len(found.training)),
            "peak_memory_bytes": peak_memory_bytes(device),
        },
        "evaluation": {
            "teacher": own,
            "before": before,
            "after": after,
            "recovered": recovered(own, before, after),
            "text": Path(evaluation).name,
            "text_sha256": text_sha256(read_text(evaluation)),
        },
    }


@dataclass(frozen=True)
class _Pair:
    """A student, its teacher, and the text it is to learn from.

    Args:
        student: Folder.
        teacher: Folder.
        made: Facts of the student.
        original: Facts of the teacher.
        content: The text.
    """

    student: Path
    teacher: Path
    made: Facts
    original: Facts
    content: CalibrationText

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return window_tokens(self.made, self.original)


def _read(student: Path, teacher: Path, text: Mapping[str, Any] | str | None, evaluation: str) -> _Pair:
    """Read headers and text, and refuse text that the result would be measured on."""
    content = calibration_text(text, teacher)
    refuse_overlap(content.text, read_text(evaluation))
    made, original = (facts_of(open_checkpoint(folder)) for folder in (student, teacher))
    return _Pair(student, teacher, made, original, content)


def _means(pair: _Pair, machine: Machine, notes: Path, method: Method, rank: int) -> Means:
    """The way of training that was decided on when the run began."""

    def decide() -> dict[str, Any]:
        return asdict(choose(pair.made, pair.original, machine, window=pair.window, method=method, rank=rank))

    return Means(**decided(notes, "means", decide))


def _pieces(pair: _Pair, tokens: int) -> Sequence[Sequence[int]]:
    """Windows of the text.

    Raises:
        InputRefused: The tokenizers cut it into different tokens.
    """
    pieces = calibration_windows(pair.teacher, pair.content, pair.window, windows_wanted(tokens, pair.window))
    if calibration_windows(pair.student, pair.content, pair.window, _COMPARED) != pieces[:_COMPARED]:
        raise InputRefused(
            f"{pair.student.name} and {pair.teacher.name} cut text into different tokens",
            hint="A student is healed by the model it was made from, with the vocabulary it has.",
        )
    return pieces


def _of_text(pair: _Pair, found: TrainingText, outcome: Outcome) -> dict[str, Any]:
    """What was trained on, for the report."""
    return {
        "text": pair.content.origin,
        "text_sha256": pair.content.sha256,
        "windows": len(found.training) - found.sampled,
        "sampled_windows": found.sampled,
        "passes": round(outcome.tokens / found.training.numel(), 2),
    }


def _later(progress: Progress, before: int) -> Progress:
    """Progress of a second part of work, as that of the whole."""
    return lambda done, total: progress(before + done, before + total)


def _predicted_bytes(pair: _Pair, means: Means, machine: Machine, windows: int) -> int:
    """Peak memory, with what is kept of the teacher's answers."""
    training = memory_bytes(pair.made, pair.original, means, pair.window, mixed=machine.mixed, gpu=machine.gpu)
    kept = kept_bytes(windows, pair.window, pair.made.vocabulary, means.keep) if means.keep else 0
    return training + kept


def _evaluation_windows(pair: _Pair, evaluation: str) -> list[list[int]]:
    text = evaluation_text(Path(evaluation))
    return [list(ids) for ids in calibration_windows(pair.teacher, text, pair.window, WINDOWS)]


def _layers(pair: _Pair) -> dict[int, int]:
    kept = kept_layers(pair.student, pair.made.layers, pair.original.layers)
    if kept is None:
        raise UsageError(
            f"{pair.student.name} does not say which of its teacher's layers it has",
            hint="`edgepack prune` notes that in edgepack-prune.json; train without the loss on hidden states.",
        )
    return pairs(kept)
