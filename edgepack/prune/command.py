"""`edgepack prune`, and the prune step of a build: everything around the worker that does it.

Finds source and texts, refuses what can be refused early, publishes the folder at once or keeps it in the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused, StepError
from edgepack.events import Event, Listener, StepHandle, silent, step
from edgepack.prune.request import Request, check

if TYPE_CHECKING:
    from edgepack.prune.cost import Cost
    from edgepack.source import Source
    from edgepack.workshop import Workshop

# Calibration: 8,192 positions choose the same layers as more do on models of this kind (docs/pruning.md).
WINDOWS, WINDOW_TOKENS = 16, 512
EVALUATION_WINDOWS = 16
_WORTH_A_LOOK_SECONDS = 30  # above it, a guess is made better by running a few windows first: seconds
_GGUF_HINT = "Prune the Hugging Face folder the GGUF was made from; edgepack builds a GGUF from the result."


def prune(
    model: str | Path,
    output: str | Path,
    request: Request,
    *,
    calibration: str | None = None,
    evaluation: str | Path | None = None,
    windows: int = WINDOWS,
    threads: int | None = None,
    listener: Listener = silent,
) -> tuple[Path, dict[str, Any]]:
    """Prune a model into a new folder.

    Args:
        model: Hugging Face folder or hub id.
        output: The folder; must not exist.
        request: What to leave out.
        calibration: Text to choose on: a file, a folder, `hub:NAME`; None takes the text that ships.
        evaluation: Text to measure on; None takes the text that ships.
        windows: Windows of calibration text.
        threads: For torch; None takes the machine's cores.
        listener: Told about steps and progress.

    Returns:
        The folder, and the document of its `edgepack-prune.json`.

    Raises:
        UsageError: `output` exists, or what is asked can't be done with this model.
        InputRefused: The model can't be pruned, or the texts overlap.
        StepError, StorageError: Scoring or writing failed; nothing is left at `output`.
    """
    from edgepack.publish import check_output, publish
    from edgepack.source import hash_source, resolve
    from edgepack.text import named_evaluation_text
    from edgepack.workshop import refuse_changed, stamps

    check_output(Path(output), force=False)
    with step(listener, "source", str(model), unit="bytes") as handle:
        source = resolve(str(model), handle.progress)
        handle.outcome = source.name
    refuse_early(source, request)
    with step(listener, "hash", source.name, unit="bytes") as handle:
        source = hash_source(source, handle.progress)
        handle.outcome = f"{len(source.files)} files"
    arguments = _arguments(source, request, calibration, named_evaluation_text(evaluation), windows, threads)
    expect(arguments, listener)
    report: dict[str, Any] = {}

    def build(folder: Path) -> None:
        before = stamps(source)
        report.update(_run(arguments | {"folder": str(folder)}, handle))
        refuse_changed(source, before)

    with step(listener, "prune", source.name, unit="%") as handle:
        published = publish(build, Path(output))
        handle.outcome = in_words(report)
    return published, report


def pruned_source(
    shop: Workshop, source: Source, request: Request, *, calibration: str | None = None, evaluation: Path | None = None
) -> tuple[Source, dict[str, Any]]:
    """The prune step of a build: the pruned folder in the store, as a source of its own.

    Args:
        shop: Where results are kept.
        source: The source, hashed.
        request: What to leave out.
        calibration: Text to choose on.
        evaluation: Text to measure on.

    Returns:
        A source whose path is a folder of the store; and the document of its `edgepack-prune.json`.
    """
    import json
    from dataclasses import replace

    from edgepack.digest import sha256_of
    from edgepack.prune.folder import SIDECAR
    from edgepack.text import named_evaluation_text
    from edgepack.workshop import keyed, refuse_changed, stamps

    refuse_early(source, request)
    text = named_evaluation_text(evaluation)
    arguments = _arguments(source, request, calibration, text, WINDOWS, shop.threads)
    texts = {str(number): Path(path) for number, (_, path) in enumerate(_text_files(arguments))}
    inputs = {
        "request": request.as_json() | {"vocabulary": len(request.vocabulary)},
        "model": source.files,
        "texts": list(sha256_of(texts | {"evaluation": text}).values()),
        "windows": WINDOWS,
    }

    with step(shop.listener, "prune", source.name, unit="%") as handle:

        def make(folder: Path) -> None:
            expect(arguments, shop.listener)
            before = stamps(source)
            _run(arguments | {"folder": str(folder)}, handle)
            refuse_changed(source, before)

        entry = shop.store.step("prune", keyed(inputs), make)
        report = json.loads(entry.files[SIDECAR].path.read_text(encoding="utf-8"))
        handle.cached = entry.cached
        handle.outcome = in_words(report)
    files = {name: file.sha256 for name, file in entry.files.items() if name != SIDECAR}
    return replace(source, kind="folder", path=entry.path, files=files), report


def refuse_early(source: Source, request: Request) -> None:
    """Refuse from headers what can't be pruned.

    Raises:
        InputRefused: A GGUF, experts, an unknown model type.
        UsageError: Numbers that don't fit the model.
    """
    from edgepack.checkpoint import open_checkpoint
    from edgepack.prune.anatomy import find_anatomy, sizes_of

    if source.kind == "gguf":
        raise InputRefused(f"{source.path.name}: a GGUF can't be pruned", hint=_GGUF_HINT)
    checkpoint = open_checkpoint(source.path)
    anatomy = find_anatomy(checkpoint)
    check(request, anatomy, sizes_of(checkpoint, anatomy), source.name)


def expect(arguments: dict[str, Any], listener: Listener) -> None:
    """Say what a run will take, and refuse one that does not fit in memory.

    Args:
        arguments: Of the worker.
        listener: Told.

    Raises:
        StepError: Not enough memory.
    """
    from edgepack.workshop import available_memory_bytes

    expected, free = predicted(arguments), available_memory_bytes()
    if expected.memory_bytes > free:
        raise StepError(
            f"pruning needs about {expected.memory_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            hint="Give fewer --windows, or prune on a larger machine; the result is an ordinary model folder.",
        )
    if expected.seconds > _WORTH_A_LOOK_SECONDS:
        expected = _timed(expected, arguments)
    listener(Event("note", "prune", expected.sentence()))


def _timed(expected: Cost, arguments: dict[str, Any]) -> Cost:
    """The time by what one window takes here and now."""
    from dataclasses import replace

    from edgepack.worker import run

    settings = {"model": arguments["model"], "tokens": arguments["window_tokens"], "threads": arguments["threads"]}
    each = run("edgepack.prune.probe:window_seconds", settings, what="timing a window")
    return replace(expected, seconds=expected.passes * float(each))


def predicted(arguments: dict[str, Any]) -> Cost:
    """What a run will take.

    Args:
        arguments: Of the worker.
    """
    from edgepack.checkpoint import open_checkpoint
    from edgepack.prune.anatomy import find_anatomy, generates, sizes_of
    from edgepack.prune.cost import cost
    from edgepack.prune.request import from_json

    checkpoint = open_checkpoint(Path(arguments["model"]))
    anatomy = find_anatomy(checkpoint)
    config = checkpoint.config
    return cost(
        from_json(arguments["request"]),
        anatomy,
        sizes_of(checkpoint, anatomy),
        checkpoint.parameters,
        hidden=int(config.get("hidden_size") or config.get("n_embd") or config.get("dim") or 0),
        generates=generates(checkpoint),
        windows=arguments["windows"],
        tokens=arguments["window_tokens"],
        evaluation_windows=arguments["evaluation_windows"],
        cores=arguments["threads"],
    )


def in_words(report: dict[str, Any]) -> str:
    """One line: what went, and what it cost."""
    if not report:
        return ""
    words = []
    for name, gone in report["removed"].items():
        if name == "depth":
            words.append(f"without layers {', '.join(map(str, gone['layers']))} of {gone['of']}")
        elif name == "sparsity":
            words.append(gone["pattern"])
        else:
            words.append(f"{name.replace('_', ' ')} {gone['from']:,} to {gone['to']:,}")
    refit = report["scores"].get("refit")
    if refit is not None:
        words.append("refit" if refit["kept"] else "not refit, which would be worse on held-out text")
    before, last = report["before"], report["steps"][-1]
    words.append(f"{before['bytes'] / 1e6:,.1f} to {last['bytes'] / 1e6:,.1f} MB")
    if "cosine_mean" in last:
        words.append(f"cosine {last['cosine_mean']:.4f}")
    else:
        words.append(f"KLD {last['mean_kld']:.4g}, perplexity {before['perplexity']:.4g} to {last['perplexity']:.4g}")
    return "; ".join(words)


def _run(arguments: dict[str, Any], handle: StepHandle) -> dict[str, Any]:
    from edgepack.worker import run

    found = run("edgepack.prune.steps:prune", arguments, what="pruning", progress=handle.progress)
    return dict(found)


def _arguments(
    source: Source, request: Request, calibration: str | None, evaluation: Path, windows: int, threads: int | None
) -> dict[str, Any]:
    from edgepack.calibrate.texts import resolve
    from edgepack.workshop import physical_cores

    return {
        "model": str(source.path),
        "request": request.as_json(),
        "source": {"name": source.name, "id": source.id, "commit": source.commit, "files": dict(source.files)},
        "calibration": resolve(calibration).as_json(),
        "vocabulary": [resolve(text).as_json() for text in request.vocabulary],
        "evaluation": str(evaluation),
        "windows": windows,
        "window_tokens": WINDOW_TOKENS,
        "evaluation_windows": EVALUATION_WINDOWS,
        "threads": threads or physical_cores(),
    }


def _text_files(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """(Name, path) of every text that choices are made on."""
    return [
        tuple(file) for located in [arguments["calibration"], *arguments["vocabulary"]] for file in located["files"]
    ]
