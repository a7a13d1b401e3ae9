"""Repair a pruned model by distillation: the worker behind `edgepack heal`.

The student (a pruned folder, or any smaller model of the same vocabulary) learns the teacher's next-token predictions
on text (`distill.py`); all its weights are trained in float32. It is kept as it scored best on held-out text, the start
included, and written in the number format it had, shard by shard under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgepack import model_folder
from edgepack.calibrate.layers import load_model, parameter_name
from edgepack.calibrate.overlap import refuse_overlap
from edgepack.calibrate.texts import calibration_text, calibration_windows
from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.errors import InputRefused, UsageError
from edgepack.files import copy, storage_errors
from edgepack.heal.data import WINDOW_TOKENS, training_text, windows_wanted
from edgepack.heal.device import best_device
from edgepack.heal.distill import distill, paced
from edgepack.heal.memory import worth_keeping
from edgepack.heal.objective import TowardsTeacher
from edgepack.text import read_text
from edgepack.worker import Progress, no_progress

# Peak learning rate for all weights of a student that lost layers: the study's (docs/healing.md).
LEARNING_RATE = 2e-4
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
        learning_rate: Peak; None takes `LEARNING_RATE`.
        progress: In tokens.

    Returns:
        `tokens`, `steps`, `best_step`, held-out `before`, `after` and `difference` (KLD with ci95), `learning_rate`,
        `text`, `text_sha256`, `windows`, `sampled_windows`.

    Raises:
        InputRefused: The tokenizers differ; the text is too short, or overlaps the evaluation text.
        StepError: A model can't be loaded; the loss is NaN (the best so far stays in `journal`).
    """
    torch.set_num_threads(threads)
    student_folder, teacher_folder = Path(model), Path(teacher)
    content = calibration_text(text, teacher_folder)
    refuse_overlap(content.text, read_text(evaluation))
    window = min(WINDOW_TOKENS, *(_context(open_checkpoint(path)) for path in (student_folder, teacher_folder)))
    pieces = calibration_windows(teacher_folder, content, window, windows_wanted(tokens, window))
    if calibration_windows(student_folder, content, window, _COMPARED) != pieces[:_COMPARED]:
        raise InputRefused(
            f"{student_folder.name} and {teacher_folder.name} cut text into different tokens",
            hint="A student is healed by the model it was made from, with the vocabulary it has.",
        )
    device = best_device()
    student, guide = (load_model(path).to(device) for path in (student_folder, teacher_folder))
    student.requires_grad_(True)
    found = training_text(guide, pieces, tokens, journal=Path(journal))
    settings = paced(tokens, window, learning_rate or LEARNING_RATE)
    outcome = distill(
        student,
        TowardsTeacher(guide, keep=worth_keeping(tokens, found.training, guide)),
        found.training,
        found.held_out,
        settings,
        journal=Path(journal),
        progress=progress,
    )
    write_model(open_checkpoint(student_folder), student, Path(folder))
    return outcome.as_json() | {
        "learning_rate": settings.learning_rate,
        "batch_tokens": settings.batch_windows * window,
        "text": content.origin,
        "text_sha256": content.sha256,
        "windows": len(found.training) - found.sampled,
        "sampled_windows": found.sampled,
        "device": device.type,
    }


def write_model(checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """Write a checkpoint again with the weights a loaded model has now; everything else as it was.

    Args:
        checkpoint: Where the model was loaded from: names, number formats, shards, the other files.
        model: From `load_model`, changed.
        folder: An empty folder.

    Raises:
        StorageError: The file system refused.
    """
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters(remove_duplicate=False)}
    with storage_errors(folder):
        for name in model_folder.allowed_files(checkpoint.path):
            real = model_folder.locate(checkpoint.path, name)
            if real is not None and not name.endswith(".safetensors"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy(real, folder / name)
        for file in sorted({info.file for info in checkpoint.tensors.values()}):
            with safe_open(file, framework="pt") as shard:
                kept = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
                metadata = shard.metadata()
            for name, values in kept.items():
                trained = parameters.get(parameter_name(name, parameters))
                if trained is not None and trained.shape == values.shape:
                    kept[name] = trained.to(values.dtype).contiguous()
            save_file(kept, folder / file.name, metadata=metadata or {"format": "pt"})


def _context(checkpoint: Checkpoint) -> int:
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = checkpoint.config.get(key)
        if isinstance(value, int):
            return value
    raise UsageError(f"{checkpoint.path.name}: config.json names no context length")
