"""`edgepack heal`, and the healing step of a build: early refusals, the store, the published folder.

The work itself is done in a worker: `heal/worker.py` for language models, `heal/encoders.py` for encoders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused, StepError
from edgepack.events import Event, Listener, silent, step
from edgepack.heal.budget import parse_tokens
from edgepack.heal.means import DEFAULT_RANK, Method
from edgepack.heal.watch import Watcher, called

if TYPE_CHECKING:
    from edgepack.source import Source
    from edgepack.store import Entry
    from edgepack.workshop import Workshop

SIDECAR = "edgepack-heal.json"
# Of an encoder: float32 student, gradients, two moments, the best so far; the teacher; torch, activations.
STUDENT_BYTES, TEACHER_BYTES, FIXED_BYTES = 20, 4, 1 << 30


@dataclass(frozen=True)
class Options:
    """How to heal, beside how long.

    Args:
        data: Text to train on: a file, a folder, `hub:NAME`; None takes the text that ships.
        learning_rate: Peak; None takes that of the method.
        method: `full` (all weights), `lora` (adapters, merged), or `auto` for the best that fits in memory. Encoders
            are always trained whole.
        rank: Of adapters, 16 to 64.
        hidden_weight: Of a loss that pulls hidden states towards those of the teacher's layers that the student's
            were; None takes none. Of language models; encoders always have it.
    """

    data: str | None = None
    learning_rate: float | None = None
    method: Method = "auto"
    rank: int = DEFAULT_RANK
    hidden_weight: float | None = None


def heal(
    model: str | Path,
    teacher: str | Path,
    output: str | Path,
    tokens: str | int,
    *,
    options: Options = Options(),
    evaluation: str | Path | None = None,
    threads: int | None = None,
    listener: Listener = silent,
) -> tuple[Path, dict[str, Any]]:
    """Repair a pruned model by distilling its original into it.

    Args:
        model: The student: Hugging Face folder or hub id.
        teacher: The model it was made from.
        output: The healed folder; must not exist.
        tokens: To train on: `200k`, `2M`, a number.
        options: How.
        evaluation: Text that nothing may be tuned on, and that the result is measured on; None takes the text that
            ships.
        threads: For torch; None takes the machine's cores.
        listener: Told about steps and progress.

    Returns:
        The folder, and the document of its `edgepack-heal.json`.

    Raises:
        UsageError: `output` exists, or the numbers are wrong.
        InputRefused: A GGUF, different tokenizers, overlapping texts.
        StepError: Not enough memory; the loss is NaN.
    """
    from edgepack.publish import check_output, publish
    from edgepack.store import Store
    from edgepack.text import named_evaluation_text
    from edgepack.workshop import Workshop, physical_cores

    check_output(Path(output), force=False)
    amount = parse_tokens(str(tokens), "--tokens")
    text = named_evaluation_text(evaluation)
    student, guide = (_source(name, listener) for name in (model, teacher))
    shop = Workshop(Store(), listener, threads or physical_cores(), evaluation=text)
    entry, report = _healed(shop, student, guide, amount, options, text)

    def place(folder: Path) -> None:
        for name in entry.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shop.store.release(entry, name, folder / name)

    published = publish(place, Path(output))
    shop.store.settle(entry)
    return published, report


def healed_source(
    shop: Workshop,
    student: Source,
    teacher: Source,
    tokens: int,
    *,
    calibration: str | None = None,
    evaluation: Path | None = None,
    options: Options | None = None,
) -> tuple[Source, dict[str, Any]]:
    """The healing step of a build: the healed folder in the store, as a source of its own.

    Args:
        shop: Where results are kept.
        student: The pruned source, hashed.
        teacher: What it was pruned from, hashed.
        tokens: To train on.
        calibration: Text to train on where `options` names none.
        evaluation: Text that the result is measured on.
        options: How.

    Returns:
        A source whose path is a folder of the store; and the document of its `edgepack-heal.json`.
    """
    from edgepack.text import named_evaluation_text

    chosen = options or Options(data=calibration)
    entry, report = _healed(shop, student, teacher, tokens, chosen, named_evaluation_text(evaluation))
    files = {name: file.sha256 for name, file in entry.files.items() if name != SIDECAR}
    return replace(student, kind="folder", path=entry.path, files=files), report


def _healed(
    shop: Workshop, student: Source, teacher: Source, tokens: int, options: Options, evaluation: Path
) -> tuple[Entry, dict[str, Any]]:
    """Train in a worker, or take the result from the store."""
    from edgepack.calibrate.texts import resolve
    from edgepack.gguf.calibrated import digests
    from edgepack.planning import is_encoder
    from edgepack.worker import run
    from edgepack.workshop import keyed, refuse_changed, sha256, stamps

    _refuse_early(student, teacher)
    encoder = is_encoder(student)
    function = "edgepack.heal.encoders:heal_encoder" if encoder else "edgepack.heal.worker:heal"
    located = resolve(options.data)
    arguments = {
        "model": str(student.path),
        "teacher": str(teacher.path),
        "tokens": tokens,
        "text": located.as_json(),
        "evaluation": str(evaluation),
        "threads": shop.threads,
        "learning_rate": options.learning_rate,
    }
    arguments |= {} if encoder else {
        "method": options.method, "rank": options.rank, "hidden_weight": options.hidden_weight,
    }  # fmt: skip
    inputs = arguments | {"model": student.files, "teacher": teacher.files, "text": digests(located)}
    inputs |= {"evaluation": sha256(evaluation)}
    with step(shop.listener, "heal", f"{tokens:,} tokens of {located.origin}", unit="tokens") as handle:

        def make(folder: Path) -> None:
            before = {source.path: stamps(source) for source in (student, teacher)}
            _expect(student, teacher, tokens, options, shop, sum(path.stat().st_size for _, path in located.files))
            with shop.store.journal("heal", keyed(inputs)) as journal:
                watcher = Watcher(journal, lambda line: shop.listener(Event("note", "heal", line)), handle.progress)
                report = run(
                    function,
                    arguments | {"folder": str(folder), "journal": str(journal)},
                    what="healing",
                    progress=watcher,
                )
                watcher.look()
                for source in (student, teacher):
                    refuse_changed(source, before[source.path])
                document = {"schema_version": 1, "student": student.name, "teacher": teacher.name} | dict(report)
                (folder / SIDECAR).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

        entry = shop.store.step("heal", keyed(inputs), make)
        report = json.loads(entry.files[SIDECAR].path.read_text(encoding="utf-8"))
        handle.cached = entry.cached
        handle.outcome = in_words(report)
    return entry, report


def in_words(report: Mapping[str, Any]) -> str:
    """One line: what it brought, on held-out text and on the evaluation text."""
    name = str(report.get("score", "kld"))
    before, after = report["before"][name], report["after"][name]
    words = f"held-out {called(name)} {before:.4g}"
    if not report["best_step"]:
        return f"{words}: training brought nothing, the model stays as it was"
    words += f" to {after:.4g} ({100 * (1 - after / before):.0f} % back)"
    rows = [report["evaluation"][key] for key in ("before", "after")]
    if "cosine_mean" in rows[1]:
        return f"{words}; cosine {rows[0]['cosine_mean']:.4f} to {rows[1]['cosine_mean']:.4f}"
    if "perplexity" in rows[1]:
        return f"{words}; perplexity {rows[0]['perplexity']:.4g} to {rows[1]['perplexity']:.4g}"
    return words


def _source(name: str | Path, listener: Listener) -> Source:
    from edgepack.source import hash_source, resolve

    with step(listener, "source", str(name), unit="bytes") as handle:
        source = hash_source(resolve(str(name), handle.progress), handle.progress)
        handle.outcome = f"{source.name}, {len(source.files)} files"
    return source


def _refuse_early(student: Source, teacher: Source) -> None:
    """Refuse from headers what can't be healed.

    Raises:
        InputRefused: A GGUF, an encoder and a language model, vocabularies of different sizes.
    """
    from edgepack.checkpoint import open_checkpoint
    from edgepack.planning import is_encoder

    for source in (student, teacher):
        if source.kind == "gguf":
            raise InputRefused(f"{source.path.name}: a GGUF can't be trained", hint="Give the Hugging Face folder.")
    kinds = ["an encoder" if is_encoder(source) else "a language model" for source in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise InputRefused(
            f"{student.name} is {kinds[0]}, {teacher.name} is {kinds[1]}: expected two of one kind",
            hint="A student is healed by the model it was made from.",
        )
    made, original = (open_checkpoint(source.path) for source in (student, teacher))
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in (made, original)]
    if sizes[0] != sizes[1]:
        raise InputRefused(
            f"{student.name} has a vocabulary of {sizes[0]}, {teacher.name} of {sizes[1]}: expected the same",
            hint="Heal before the vocabulary is pruned.",
        )


def _expect(student: Source, teacher: Source, tokens: int, options: Options, shop: Workshop, text_bytes: int) -> None:
    """Say what training will take, and refuse what does not fit in memory.

    Raises:
        StepError: Not enough memory; says what each way of training needs, and which fits.
        UsageError: A method or rank that is not offered.
    """
    from edgepack.checkpoint import open_checkpoint
    from edgepack.heal.means import predict
    from edgepack.planning import is_encoder
    from edgepack.workshop import available_memory_bytes

    made, original = (open_checkpoint(source.path) for source in (student, teacher))
    if not is_encoder(student):
        cost = predict(
            made,
            original,
            tokens,
            cores=shop.threads,
            text_bytes=text_bytes,
            method=options.method,
            rank=options.rank,
        )
        shop.listener(Event("note", "heal", cost.sentence()))
        return
    need = STUDENT_BYTES * made.parameters + TEACHER_BYTES * original.parameters + FIXED_BYTES
    free = available_memory_bytes()
    if need > free:
        raise StepError(
            f"healing needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            hint="Heal on a larger machine; the result is an ordinary model folder.",
        )
