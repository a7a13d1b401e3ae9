"""Repair a pruned encoder by distillation: the worker behind `edgepack heal` for embedders and task heads.

The student's layers learn what the teacher makes of text: its answers (vectors or logits) and the hidden states of the
layers they came from (`encoder_objective.py`). Embeddings, poolers and heads are the teacher's and stay bit for bit.
The loop, what it keeps and what it writes are those of every healing (`distill.py`, `worker.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgepack.calibrate.overlap import refuse_overlap
from edgepack.calibrate.texts import calibration_text
from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.errors import InputRefused, StepError
from edgepack.heal.device import best_device
from edgepack.heal.distill import SCORED_COST, SCORING_SHARE, Settings, distill
from edgepack.heal.encoder_evaluation import Evaluation
from edgepack.heal.encoder_model import Encoder, layer_parameters, load
from edgepack.heal.encoder_objective import TowardsEncoder
from edgepack.heal.encoder_rows import LONGEST, Rows, encoder_rows
from edgepack.heal.encoder_teacher import Teacher, kept_bytes
from edgepack.heal.order import ALIKE
from edgepack.heal.written import write_model
from edgepack.prune.folder import read_sidecar, write_sidecar
from edgepack.text import read_text, text_sha256
from edgepack.worker import Progress, no_progress
from edgepack.workshop import available_memory_bytes

LEARNING_RATE = 3e-4  # peak: docs/healing.md, Encoders
HIDDEN_WEIGHT = 4.0  # docs/healing.md, Encoders
BATCH_ROWS = 16
_LEAST_STEPS = 50
_WARMUP = 0.05  # of the steps
_TEACHER_SHARE = 0.25  # of the free memory, for what the teacher said
_ACTIVATION_SHARE = 0.5


def heal_encoder(
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
    """Train a student encoder towards its teacher and write it (worker function).

    Args:
        model: The student: a checkpoint folder with the teacher's tokenizer, width and head.
        teacher: Folder of the model it was made from.
        folder: Empty; gets the healed model.
        tokens: To train on; the text is cut anew as often as that takes.
        text: What `texts.calibration_text` takes; None for the packaged text.
        evaluation: Path of the text that nothing may be tuned on, and that the result is measured on.
        threads: For torch.
        journal: Folder that outlives a killed process.
        learning_rate: Peak; None takes `LEARNING_RATE`.
        progress: In tokens.

    Returns:
        `tokens`, `steps`, `best_step`; `score`, the name of what held-out rows are judged by, and `before`, `after` and
        `difference` of it with ci95; `learning_rate`, `batch_tokens`, `text`, `text_sha256`, `rows`, `passes`,
        `layers` (student's to teacher's, from 1); `evaluation`: rows `before` and `after` on the evaluation text.

    Raises:
        InputRefused: The models differ in family, width, head or tokenizer; the text is too short, or overlaps the
            evaluation text.
        StepError: A model can't be loaded; the loss is NaN (the best so far stays in `journal`).
    """
    torch.set_num_threads(threads)
    made, original = (open_checkpoint(Path(path)) for path in (model, teacher))
    content, judged = calibration_text(text, original.path), read_text(evaluation)
    refuse_overlap(content.text, judged)
    student, guide = load(made), load(original)
    refuse_strangers(made, student, original, guide)
    rows = encoder_rows(original, content.text, guide.task.name, tokens, pairs=guide.single, longest=_longest(guide))
    _refuse_other_tokens(made, original, guide, content.text, rows)
    settings = _settings(student, rows, tokens, learning_rate or LEARNING_RATE)
    rows = replace(rows, training=_arranged(rows.training, settings.batch_windows))
    device = best_device()
    for encoder in (student, guide):
        encoder.model.to(device)
    measured = Evaluation(guide, original, judged, _room(guide))
    before = measured.row(student)
    layers = layers_taught(made, student.layers, guide.layers)
    for parameter in layer_parameters(student).values():
        parameter.requires_grad_(True)
    keep = _worth_keeping(guide, rows, tokens, len(layers))
    score = score_name(guide)
    said = Teacher(guide, rows.training, tuple(layers.values()), keep=keep)
    outcome = distill(
        student.model,
        TowardsEncoder(said, student, layers, HIDDEN_WEIGHT),
        rows.training,
        rows.held_out,
        settings,
        journal=Path(journal),
        score=score,
        progress=progress,
    )
    after = measured.row(student)
    _write(made, student, Path(folder))
    return outcome.as_json(score) | {
        "score": score,
        "learning_rate": settings.learning_rate,
        "batch_tokens": round(settings.batch_windows * float(rows.training.ge(0).sum()) / len(rows.training)),
        "text": content.origin,
        "text_sha256": content.sha256,
        "rows": len(rows.training),
        "passes": rows.passes,
        "layers": {str(own): theirs for own, theirs in layers.items()},
        "device": device.type,
        "evaluation": {
            "before": before,
            "after": after,
            "text": Path(evaluation).name,
            "text_sha256": text_sha256(judged),
        },
    }


def _write(made: Checkpoint, student: Encoder, folder: Path) -> None:
    """Write the healed folder; what was pruned stays written in it, so that it can be healed on.

    Raises:
        StepError: A trained weight has no tensor in the checkpoint it could be written to.
    """
    lost = set(layer_parameters(student)) - write_model(made, student.model, folder)
    if lost:
        raise StepError(f"{made.path.name}: {len(lost)} trained weights have no tensor in it, first {min(lost)}")
    document = read_sidecar(made.path)
    if document is not None:
        write_sidecar(folder, document)


def refuse_strangers(made: Checkpoint, student: Encoder, original: Checkpoint, guide: Encoder) -> None:
    """Refuse a pair whose states or answers can't be compared.

    Raises:
        InputRefused: Another family, task, width, vocabulary or number of labels.
    """
    named = [
        ("family", made.model_type, original.model_type),
        ("task", student.task.name, guide.task.name),
        ("width", *(int(encoder.model.config.hidden_size) for encoder in (student, guide))),
        ("vocabulary", *(int(encoder.model.config.vocab_size) for encoder in (student, guide))),
    ]
    if not guide.vectors and guide.task.name in ("text-classification", "token-classification"):
        named.append(("number of labels", *(int(encoder.model.config.num_labels) for encoder in (student, guide))))
    for what, ours, theirs in named:
        if ours != theirs:
            raise InputRefused(
                f"{made.path.name} has {what} {ours}, {original.path.name} has {theirs}: expected the same",
                hint="A student is healed by the model it was pruned from.",
            )


def _refuse_other_tokens(made: Checkpoint, original: Checkpoint, guide: Encoder, text: str, rows: Rows) -> None:
    """Hold the student's tokenizer against the teacher's on the held-out sentences."""
    own = encoder_rows(made, text, guide.task.name, 1, pairs=guide.single, longest=_longest(guide))
    if not torch.equal(own.held_out, rows.held_out):
        raise InputRefused(
            f"{made.path.name} and {original.path.name} cut text into different tokens",
            hint="A student is healed by the model it was made from, with the vocabulary it has.",
        )


def layers_taught(made: Checkpoint, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """The teacher's layer each of the student's should be like, from 1.

    Known from `edgepack-prune.json`, of several prunings from all of them; spread evenly where it is not.

    Args:
        made: The student's folder.
        student_layers: How many it has.
        teacher_layers: How many the teacher has.

    Raises:
        InputRefused: `edgepack-prune.json` is unsound.
    """
    kept = _kept_layers(read_sidecar(made.path), teacher_layers)
    if kept is None or len(kept) != student_layers:
        return {own: round(own * teacher_layers / student_layers) for own in range(1, student_layers + 1)}
    return {own: kept[own - 1] + 1 for own in range(1, student_layers)} | {student_layers: teacher_layers}


def _kept_layers(document: Mapping[str, Any] | None, teacher_layers: int) -> list[int] | None:
    """Numbers of the layers that stayed, as a teacher of so many layers counts them; None where nothing says so."""
    kept: list[int] | None = None
    while document is not None:
        here = [int(number) for number in document["kept_layers"]]
        kept = here if kept is None else [here[number] for number in kept]
        if document["removed"].get("depth", {}).get("of", len(here)) == teacher_layers:
            return kept
        document = document.get("pruned_before")
    return None


def score_name(encoder: Encoder) -> str:
    """What held-out rows are judged by, as reports call it."""
    if encoder.vectors:
        return "cosine_distance"
    return "squared_error" if encoder.single else "kld"


def _longest(encoder: Encoder) -> int:
    return min(LONGEST, _room(encoder))


def _room(encoder: Encoder) -> int:
    """Tokens a row may have; RoBERTa and MPNet number positions from behind the padding token's id."""
    limit = getattr(encoder.model.config, "max_position_embeddings", None)
    return LONGEST if not isinstance(limit, int) or limit < 1 else limit - 2


def _settings(student: Encoder, rows: Rows, tokens: int, rate: float) -> Settings:
    """`BATCH_ROWS` a step, fewer where that would leave less than `_LEAST_STEPS` steps."""
    each = float(rows.training.ge(0).sum()) / len(rows.training)
    batch = min(BATCH_ROWS, max(4, round(tokens / each / _LEAST_STEPS)), len(rows.training))
    steps = max(1, round(tokens / each / batch))
    evaluations = int(SCORING_SHARE * steps * batch / (SCORED_COST * len(rows.held_out)))
    at_once = max(1, int(_ACTIVATION_SHARE * available_memory_bytes()) // _row_bytes(student, rows.training.shape[1]))
    return Settings(
        tokens,
        rate,
        batch_windows=batch,
        warmup=max(1, round(_WARMUP * steps)),
        evaluations=max(2, min(Settings.evaluations, evaluations)),
        micro_batch=min(at_once, ALIKE),
        probe=True,
    )


def _worth_keeping(guide: Encoder, rows: Rows, tokens: int, layers: int) -> bool:
    """Whether rows are seen again and what the teacher says of them fits in memory; a word's logits never do."""
    again = 1.5 * int(rows.training.ge(0).sum()) < tokens
    room = kept_bytes(guide, rows.training, layers) < _TEACHER_SHARE * available_memory_bytes()
    return again and room and guide.task.name != "fill-mask"


def _arranged(training: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows for the loop: passes end where steps end, and the first are of ordinary length, as `probe.py` times them."""
    lengths = training.ge(0).sum(dim=1).float()
    typical = (lengths - lengths.mean()).abs().argsort(stable=True)[:ALIKE]
    others = torch.ones(len(training), dtype=torch.bool).index_fill(0, typical, False)
    return torch.cat([training[typical], training[others]])[: len(training) // batch * batch]


def _row_bytes(encoder: Encoder, tokens: int) -> int:
    """Memory a row takes between forward and backward, float32.

    34 values for every token and unit of width, 2.5 for every pair of tokens in a head (Korthikanti et al.,
    arXiv:2205.05198, equation 1, in values of 2 bytes), and the logits of words with their copies.
    """
    config = encoder.model.config
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    layer = tokens * width * (34 + 5 * heads * tokens / width) / 2
    words = 4 * int(config.vocab_size) * tokens if encoder.task.name == "fill-mask" else 0
    return int(4 * (encoder.layers * layer + words))
