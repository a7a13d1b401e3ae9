"""Repair a pruned model by distillation: the worker behind `edgepack heal`.

The student (a pruned folder, or any smaller model of the same vocabulary) learns the teacher's next-token predictions
on text (`distill.py`): all its weights in float32, or adapters where memory asks for them (`means.py`). It is kept as
it scored best on held-out text, the start included, and written in the number format it had, shard by shard under the
same names.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgepack import model_folder
from edgepack.calibrate.layers import load_model, parameter_name
from edgepack.calibrate.overlap import refuse_overlap
from edgepack.calibrate.texts import CalibrationText, calibration_text, calibration_windows
from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.errors import InputRefused, UsageError
from edgepack.files import copy, storage_errors
from edgepack.heal.cost import Facts, Means, facts_of, kept_bytes, memory_bytes
from edgepack.heal.data import training_text, windows_wanted
from edgepack.heal.device import best_device
from edgepack.heal.distill import distill, paced
from edgepack.heal.evaluation import WINDOWS, Evaluation, recovered
from edgepack.heal.hidden import kept_layers, pairs
from edgepack.heal.means import DEFAULT_RANK, Method, choose, peak_rate, window_tokens
from edgepack.heal.memory import worth_keeping
from edgepack.heal.objective import TowardsTeacher
from edgepack.heal.session import decided, here, peak_memory_bytes, trained
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
        `text`, `text_sha256`, `windows`, `sampled_windows`; `evaluation`: rows of teacher, student `before` and
        `after` on the evaluation text, and the shares that were `recovered`; `means`: how it was trained; `cost`: what
        was predicted and what it took.

    Raises:
        InputRefused: The tokenizers differ; the text is too short, or overlaps the evaluation text.
        UsageError: A method or rank that is not offered; a loss on hidden states where nothing says which layers
            stayed.
        StepError: Not enough memory; a model can't be loaded; the loss is NaN (the best so far stays in `journal`).
    """
    torch.set_num_threads(threads)
    student_folder, teacher_folder = Path(model), Path(teacher)
    content = calibration_text(text, teacher_folder)
    refuse_overlap(content.text, read_text(evaluation))
    made, original = (facts_of(open_checkpoint(path)) for path in (student_folder, teacher_folder))
    window = window_tokens(made, original)
    layers = _layers(student_folder, made, original) if hidden_weight else {}
    device = best_device()
    machine, notes = here(device), Path(journal)
    means = Means(
        **decided(
            notes,
            "means",
            lambda: asdict(choose(made, original, machine, window=window, method=method, rank=rank)),
        )
    )
    pieces = calibration_windows(teacher_folder, content, window, windows_wanted(tokens, window))
    if calibration_windows(student_folder, content, window, _COMPARED) != pieces[:_COMPARED]:
        raise InputRefused(
            f"{student_folder.name} and {teacher_folder.name} cut text into different tokens",
            hint="A student is healed by the model it was made from, with the vocabulary it has.",
        )
    student, guide = (load_model(path).to(device) for path in (student_folder, teacher_folder))
    measured = Evaluation(guide, _evaluation_windows(teacher_folder, evaluation, window))
    own, before = measured.rows(student)
    started = time.monotonic()
    found = training_text(
        guide, pieces, tokens, journal=notes, progress=lambda done, total: progress(done, total + tokens)
    )
    sampling_seconds = time.monotonic() - started
    if not layers:
        means = replace(means, keep=decided(notes, "keep", lambda: worth_keeping(tokens, found.training, guide)))
    settings = replace(
        paced(tokens, window, learning_rate or peak_rate(means, made), held_out=len(found.held_out)),
        micro_batch=means.micro_batch,
        checkpointing=means.checkpointing,
        probe=True,
    )
    kept = kept_bytes(len(found.training), window, made.vocabulary, means.keep) if means.keep else 0
    with trained(student, guide, means) as weights:
        outcome = distill(
            student,
            TowardsTeacher(guide, hidden=layers, hidden_weight=hidden_weight or 0.0, keep=means.keep),
            found.training,
            found.held_out,
            settings,
            journal=notes,
            weights=weights,
            progress=_later(progress, found.sampled * window),
        )
    _, after = measured.rows(student)
    write_model(open_checkpoint(student_folder), student, Path(folder))
    return outcome.as_json() | {
        "learning_rate": settings.learning_rate,
        "batch_tokens": settings.batch_windows * window,
        "text": content.origin,
        "text_sha256": content.sha256,
        "windows": len(found.training) - found.sampled,
        "sampled_windows": found.sampled,
        "device": device.type,
        "means": asdict(means) | {"hidden_weight": hidden_weight or 0.0},
        "cost": {
            "predicted_seconds": outcome.predicted_seconds,
            "seconds": outcome.seconds,
            "sampling_seconds": sampling_seconds,
            "tokens_per_s": outcome.tokens / outcome.seconds,
            "predicted_memory_bytes": kept
            + memory_bytes(made, original, means, window, mixed=machine.mixed, gpu=machine.gpu),
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


def _later(progress: Progress, before: int) -> Progress:
    """Progress of a second part of work, as that of the whole."""
    return lambda done, total: progress(before + done, before + total)


def _evaluation_windows(folder: Path, evaluation: str, window: int) -> list[list[int]]:
    content = read_text(evaluation)
    text = CalibrationText(content, text_sha256(content), Path(evaluation).name)
    return [list(ids) for ids in calibration_windows(folder, text, window, WINDOWS)]


def write_model(checkpoint: Checkpoint, model: Any, folder: Path) -> set[str]:
    """Write a checkpoint again with the weights a loaded model has now; everything else as it was.

    Args:
        checkpoint: Where the model was loaded from: names, number formats, shards, the other files.
        model: From `load_model`, changed.
        folder: An empty folder.

    Returns:
        Names of the model's parameters that were written.

    Raises:
        StorageError: The file system refused.
    """
    written: set[str] = set()
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters(remove_duplicate=False)}
    with storage_errors(folder):
        for name in model_folder.allowed_files(checkpoint.path):
            real = model_folder.locate(checkpoint.path, name)
            # Steps behind the encoder of a sentence-transformers folder have weights of their own.
            if real is not None and not model_folder.WEIGHTS.fullmatch(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy(real, folder / name)
        for file in sorted({info.file for info in checkpoint.tensors.values()}):
            with safe_open(file, framework="pt") as shard:
                kept = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
                metadata = shard.metadata()
            for name, values in kept.items():
                own = _loaded_name(name, parameters)
                trained = parameters.get(own)
                if trained is not None and trained.shape == values.shape:
                    kept[name] = trained.to(values.dtype).contiguous()
                    written.add(own)
            save_file(kept, folder / file.name, metadata=metadata or {"format": "pt"})
    return written


def _loaded_name(source: str, parameters: Mapping[str, Any]) -> str:
    """A tensor's name in the class that was loaded, which may lack the prefix of a head that was saved with it."""
    # Norms of checkpoints that came from TensorFlow: transformers' modeling_utils renames them as it loads.
    source = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", source))
    found = parameter_name(source, parameters)
    if found in parameters:
        return found
    beginning = [name for name in parameters if source.endswith(f".{name}")]
    return beginning[0] if len(beginning) == 1 else source


def _layers(folder: Path, student: Facts, teacher: Facts) -> dict[int, int]:
    kept = kept_layers(folder, student.layers, teacher.layers)
    if kept is None:
        raise UsageError(
            f"{folder.name} does not say which of its teacher's layers it has",
            hint="`edgepack prune` notes that in edgepack-prune.json; train without the loss on hidden states.",
        )
    return pairs(kept)
