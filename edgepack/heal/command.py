"""`edgepack heal`: everything around the worker that does it: early refusals, the store, the published folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused, StepError, UsageError
from edgepack.events import Listener, silent, step
from edgepack.heal.budget import parse_tokens

if TYPE_CHECKING:
    from edgepack.source import Source

SIDECAR = "edgepack-heal.json"
# Float32 student, gradients, two moments, the best so far; the teacher. Then torch, activations and logits.
STUDENT_BYTES, TEACHER_BYTES, FIXED_BYTES = 20, 4, 1 << 30


def heal(
    model: str | Path,
    teacher: str | Path,
    output: str | Path,
    tokens: str | int,
    *,
    calibration: str | None = None,
    evaluation: str | Path | None = None,
    learning_rate: float | None = None,
    threads: int | None = None,
    listener: Listener = silent,
) -> tuple[Path, dict[str, Any]]:
    """Repair a pruned model by distilling its original into it.

    Args:
        model: The student: Hugging Face folder or hub id.
        teacher: The model it was made from.
        output: The healed folder; must not exist.
        tokens: To train on: `200k`, `2M`, a number.
        calibration: Text to train on: a file, a folder, `hub:NAME`; None takes the text that ships.
        evaluation: Text that nothing may be tuned on; None takes the text that ships.
        learning_rate: Peak; None takes 2e-4.
        threads: For torch; None takes the machine's cores.
        listener: Told about steps and progress.

    Returns:
        The folder, and the document of its `edgepack-heal.json`.

    Raises:
        UsageError: `output` exists, or the numbers are wrong.
        InputRefused: A GGUF, an encoder, different tokenizers, overlapping texts.
        StepError: Not enough memory; the loss is NaN.
    """
    from edgepack.calibrate.texts import resolve
    from edgepack.gguf.calibrated import digests
    from edgepack.publish import check_output, publish
    from edgepack.store import Store
    from edgepack.text import default_evaluation_text
    from edgepack.worker import run
    from edgepack.workshop import keyed, physical_cores, refuse_changed, sha256, stamps

    check_output(Path(output), force=False)
    amount = parse_tokens(str(tokens), "--tokens")
    text = Path(evaluation) if evaluation is not None else default_evaluation_text()
    if not text.is_file():
        raise UsageError(f"--evaluation: {text} is not a file", hint="Name a UTF-8 text file.")
    student, guide = (_source(name, listener) for name in (model, teacher))
    _refuse_early(student, guide)
    located = resolve(calibration)
    arguments = {
        "model": str(student.path),
        "teacher": str(guide.path),
        "tokens": amount,
        "text": located.as_json(),
        "evaluation": str(text),
        "threads": threads or physical_cores(),
        "learning_rate": learning_rate,
    }
    inputs = arguments | {"model": student.files, "teacher": guide.files, "text": digests(located)}
    inputs |= {"evaluation": sha256(text)}
    store = Store()
    with step(listener, "heal", f"{amount:,} tokens of {located.origin}", unit="tokens") as handle:

        def make(folder: Path) -> None:
            before = {source.path: stamps(source) for source in (student, guide)}
            with store.journal("heal", keyed(inputs)) as journal:
                report = run(
                    "edgepack.heal.worker:heal",
                    arguments | {"folder": str(folder), "journal": str(journal)},
                    what="healing",
                    progress=handle.progress,
                )
                for source in (student, guide):
                    refuse_changed(source, before[source.path])
                document = {"schema_version": 1, "student": student.name, "teacher": guide.name} | dict(report)
                (folder / SIDECAR).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

        entry = store.step("heal", keyed(inputs), make)
        report = json.loads(entry.files[SIDECAR].path.read_text(encoding="utf-8"))
        handle.cached = entry.cached
        handle.outcome = in_words(report)

    def place(folder: Path) -> None:
        for name in entry.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            store.release(entry, name, folder / name)

    published = publish(place, Path(output))
    store.settle(entry)
    return published, report


def in_words(report: dict[str, Any]) -> str:
    """One line: what it brought."""
    before, after = report["before"]["kld"], report["after"]["kld"]
    if not report["best_step"]:
        return f"held-out KLD {before:.4g}: training brought nothing, the model stays as it was"
    return f"held-out KLD {before:.4g} to {after:.4g} ({100 * (1 - after / before):.0f} % back)"


def _source(name: str | Path, listener: Listener) -> Source:
    from edgepack.source import hash_source, resolve

    with step(listener, "source", str(name), unit="bytes") as handle:
        source = hash_source(resolve(str(name), handle.progress), handle.progress)
        handle.outcome = f"{source.name}, {len(source.files)} files"
    return source


def _refuse_early(student: Source, teacher: Source) -> None:
    """Refuse from headers what can't be healed.

    Raises:
        InputRefused: A GGUF, an encoder, vocabularies of different sizes.
        StepError: Not enough memory.
    """
    from edgepack.checkpoint import open_checkpoint
    from edgepack.planning import is_encoder
    from edgepack.workshop import available_memory_bytes

    for source in (student, teacher):
        if source.kind == "gguf":
            raise InputRefused(f"{source.path.name}: a GGUF can't be trained", hint="Give the Hugging Face folder.")
        if is_encoder(source):
            raise InputRefused(f"{source.name}: an encoder; healing follows next-token predictions")
    made, original = (open_checkpoint(source.path) for source in (student, teacher))
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in (made, original)]
    if sizes[0] != sizes[1]:
        raise InputRefused(
            f"{student.name} has a vocabulary of {sizes[0]}, {teacher.name} of {sizes[1]}: expected the same",
            hint="Heal before the vocabulary is pruned.",
        )
    need = STUDENT_BYTES * made.parameters + TEACHER_BYTES * original.parameters + FIXED_BYTES
    free = available_memory_bytes()
    if need > free:
        raise StepError(
            f"healing needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            hint="Heal on a larger machine; the result is an ordinary model folder.",
        )
