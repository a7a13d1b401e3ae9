"""Pruning from end to end, in a worker: choose on calibration text, write the folder, measure it on other text.

    vocabulary -> depth -> ffn -> kv heads -> refit or sparsity

Choices are made on the model in memory with the earlier ones in force (a layer handed through, columns zero), which
computes what the cut model computes; the folder is written once, and the last measurement is of the folder itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.conform.tokens import load_tokenizer, open_reference
from edgepack.errors import InputRefused, UsageError
from edgepack.figures import significant
from edgepack.prune import cost, depth, heads, width
from edgepack.prune.anatomy import Anatomy, Sizes, find_anatomy, sizes_of
from edgepack.prune.cut import Cut, pieces
from edgepack.prune.evidence import Stage, measure, size_of
from edgepack.prune.folder import read_sidecar, special_ids, write_folder, write_sidecar
from edgepack.prune.likeness import Reference
from edgepack.prune.refit import Refit, arrives, refit, targets
from edgepack.prune.request import Request, check, from_json
from edgepack.prune.running import Batch, Running, load
from edgepack.prune.sparsity import Thinning, download_bytes
from edgepack.prune.statistics import Statistics, collect
from edgepack.prune.texts import FIRST_SCORED, SENTENCES_PER_WINDOW, Texts, texts_of
from edgepack.prune.vocabulary import check_same_tokens, choose_tokens, used_tokens, without_tokens
from edgepack.prune.weights import unchanged
from edgepack.worker import Progress

SCHEMA_VERSION = 1
# Parts of the whole that scoring, statistics, writing and measuring take, for progress: rough.
_PARTS = {"choose": 50, "statistics": 5, "refit": 10, "write": 10, "measure": 25}


_NO_REFIT = "Leave refit out."


@dataclass
class _Work:
    """What the steps hand on."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    sizes: Sizes
    request: Request
    cut: Cut = field(default_factory=Cut)
    cuts: list[tuple[str, Cut]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    removed: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, removed: Any, scores: Any = None, **changes: Any) -> None:
        self.cut = replace(self.cut, **changes)
        self.cuts.append((name, self.cut))
        self.removed[name] = removed
        if scores is not None:
            self.scores[name] = scores

    @property
    def gone(self) -> tuple[int, ...]:
        kept = self.cut.layers
        return () if kept is None else tuple(number for number in range(self.sizes.layers) if number not in kept)


def prune(
    *,
    model: str,
    folder: str,
    request: dict[str, Any],
    source: dict[str, Any],
    calibration: dict[str, Any],
    vocabulary: list[dict[str, Any]],
    evaluation: str,
    windows: int,
    window_tokens: int,
    evaluation_windows: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Prune a checkpoint into a folder (worker function).

    Args:
        model: The checkpoint's folder.
        folder: An empty folder.
        request: `Request.as_json`.
        source: What the sidecar says of the source: name, id, commit, files.
        calibration: `Located.as_json` of the text choices are made on.
        vocabulary: The same of texts whose tokens stay.
        evaluation: Path of the text the result is measured on.
        windows: Of calibration text; sentences for encoders are four for each.
        window_tokens: Tokens of a window.
        evaluation_windows: Of evaluation text.
        threads: For torch.
        progress: In hundredths of the whole, roughly.

    Returns:
        The document of the sidecar.

    Raises:
        UsageError, InputRefused, StepError, StorageError: As the steps do.
    """
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(Path(model))
    anatomy = find_anatomy(checkpoint)
    work = _Work(checkpoint, anatomy, sizes_of(checkpoint, anatomy), from_json(request))
    check(work.request, anatomy, work.sizes, checkpoint.path.name)
    texts = texts_of(checkpoint, calibration, Path(evaluation), windows, window_tokens, evaluation_windows)
    _vocabulary(work, vocabulary)
    full = load(checkpoint.path, generates=texts.generates)
    most = cost.kept_windows(windows, texts.tokens, work.sizes) if texts.generates else windows
    running = _running(full, work.sizes.layers, texts.calibration(most), texts, choosing=True)
    share = _arriving(work, running)
    _depth(work, running, progress)
    statistics = _statistics(work, running, progress)
    _width(work, running, statistics)
    thinning = _thinning(work, statistics)
    if thinning is not None:
        thinning.prepare(list(pieces(checkpoint, anatomy, work.sizes, work.cut)))
    refitted = _refit(work, full, share, texts, progress)
    change = next((step.change for step in (thinning, refitted) if step is not None), unchanged)
    written = write_folder(checkpoint, work.cut, Path(folder), change=change, progress=_part(progress, "write"))
    before, after = _evidence(work, full, texts, Path(folder), progress)
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "request": request | {"vocabulary": [Path(text).name for text in request["vocabulary"]]},
        "kept_layers": list(work.cut.layers or range(work.sizes.layers)),
        "removed": work.removed,
        "scores": work.scores,
        "text": texts.as_json(),
        "before": before,
        "steps": after,
        "sparsity": None if thinning is None else _sparsity_report(work, thinning, written),
        "pruned_before": read_sidecar(checkpoint.path),
    }
    write_sidecar(Path(folder), document)
    return document


def _vocabulary(work: _Work, located: Sequence[Mapping[str, Any]]) -> None:
    """Choose tokens, and prove that the texts keep theirs."""
    if not located:
        return
    from edgepack.calibrate.texts import calibration_text

    checkpoint, rows = work.checkpoint, work.sizes.vocabulary
    document = checkpoint.json("tokenizer.json")
    if document is None:
        raise InputRefused(
            f"{checkpoint.path.name}: no tokenizer.json, which a smaller vocabulary is made from",
            hint="Save it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        )
    found = [calibration_text(place, checkpoint.path) for place in located]
    texts = [text.text for text in found]
    settings = checkpoint.json("tokenizer_config.json") or {}
    texts.append(checkpoint.text("chat_template.jinja") or str(settings.get("chat_template") or ""))
    encode = _encoder(load_tokenizer(document, str(checkpoint.path / "tokenizer.json")))
    counts = used_tokens(encode, texts)
    kept = choose_tokens(document, counts, rows=rows, special=special_ids(checkpoint))
    smaller = load_tokenizer(without_tokens(document, kept), "the smaller tokenizer.json")
    compared = check_same_tokens(encode, _encoder(smaller), kept, texts)
    work.take(
        "vocabulary",
        {"from": rows, "to": len(kept), "texts": [text.origin for text in found], "kept": list(kept)},
        {"tokens_used": len(counts), "tokens_compared": compared, "texts_sha256": [text.sha256 for text in found]},
        tokens=kept,
    )


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _depth(work: _Work, running: Running, progress: Progress) -> None:
    request = work.request
    if request.depth:
        references = [
            Reference(running.outputs(batch), vectors=running.pooling is not None) for batch in running.batches
        ] if request.method == "greedy" else []  # fmt: skip
        chosen = depth.choose(
            running,
            references,
            request.depth,
            request.method,
            run=work.anatomy.period,
            stays=(0,) if work.anatomy.first_stays else (),
            progress=_part(progress, "choose"),
        )
        gone, evidence = chosen.layers, {"method": request.method} | chosen.evidence
    elif request.layers:
        gone, evidence = request.layers, {"method": "named"}
    else:
        return
    layers = tuple(number for number in range(work.sizes.layers) if number not in gone)
    work.take("depth", {"layers": list(gone), "of": work.sizes.layers}, evidence, layers=layers)


def _statistics(work: _Work, running: Running, progress: Progress) -> Statistics | None:
    request = work.request
    weighed = request.sparsity is not None and request.sparsity.criterion == "wanda"
    if request.ffn is None and request.kv_heads is None and not weighed:
        return None
    return collect(running, work.anatomy, work.sizes, gone=work.gone, progress=_part(progress, "statistics"))


def _width(work: _Work, running: Running, statistics: Statistics | None) -> None:
    request = work.request
    if statistics is None:
        return
    if request.ffn is not None:
        neurons, lost = width.choose_neurons(running, work.anatomy, statistics, request.ffn, gone=work.gone)
        work.take("ffn", {"from": work.sizes.ffn, "to": request.ffn}, {"lost_share": lost}, neurons=neurons)
    if request.kv_heads is not None:
        groups, scores = heads.choose_groups(statistics, request.kv_heads)
        removed = {
            "from": work.sizes.kv_heads,
            "to": request.kv_heads,
            "query_heads_each": work.sizes.ratio,
            "kept": {str(number): list(kept) for number, kept in groups.items()},
        }
        work.take("kv_heads", removed, {"contribution": scores}, groups=groups)


def _thinning(work: _Work, statistics: Statistics | None) -> Thinning | None:
    if work.request.sparsity is None:
        return None
    inputs = {} if statistics is None else {
        name: statistics.inputs[place[1], place[2].removesuffix(".weight")].numpy()
        for name in work.checkpoint.tensors
        if (place := work.anatomy.place(name)) is not None
        and (place[1], place[2].removesuffix(".weight")) in statistics.inputs
    }  # fmt: skip
    work.take("sparsity", {"pattern": work.request.sparsity.name})
    return Thinning(work.request.sparsity, work.anatomy, inputs)


def _arriving(work: _Work, running: Running) -> float | None:
    """What `arrives` says, for a refit; refuses one that could do nothing, before anything is chosen."""
    request = work.request
    if not request.refit:
        return None
    share = arrives(running, work.anatomy)
    if share is None and request.ffn is None and request.kv_heads is None:
        name = work.checkpoint.path.name
        raise UsageError(f"refit: the layers of {name} normalise what they add, so none can make up", hint=_NO_REFIT)
    return share


def _refit(work: _Work, full: Any, share: float | None, texts: Texts, progress: Progress) -> Refit | None:
    """Let what stays make up for what went, unless that is no better on text it was not fitted on."""
    if not work.request.refit:
        return None
    count = cost.REFIT_WINDOWS if texts.generates else cost.REFIT_SENTENCES // SENTENCES_PER_WINDOW
    batches = replace(texts, windows=count).calibration(count)
    held = max(1, round(cost.REFIT_HELD * len(batches)))
    if held == len(batches):
        raise InputRefused(f"{texts.choosing.origin}: too short to refit on and to try the result on")
    running = _running(full, work.sizes.layers, batches[held:], texts, choosing=True)
    chosen = targets(work.anatomy, work.sizes, work.cut, additive=share is not None)
    if not chosen:
        gone = ", ".join(map(str, work.gone))
        raise UsageError(f"refit: nothing can make up for layers {gone}: no layer is before them", hint=_NO_REFIT)
    dtypes = {
        place[1:]: info.dtype
        for name, info in work.checkpoint.tensors.items()
        if (place := work.anatomy.place(name)) is not None
    }
    found = refit(running, work.anatomy, chosen, share or 1.0, dtypes, progress=_part(progress, "refit"))
    before, after = _tried(work, found, _running(full, work.sizes.layers, batches[:held], texts, choosing=True))
    kept = after < before
    work.scores["refit"] = {
        "matrices": len(chosen),
        "runs_of_layers": sum(target.run is not None for target in chosen),
        "held_out": {"before": significant(before), "after": significant(after), "batches": held},
        "batches": len(running.batches),
        "kept": kept,
    }
    if not kept:
        return None
    work.cuts.append(("refit", work.cut))
    return found


def _tried(work: _Work, found: Refit, running: Running) -> tuple[float, float]:
    """Mean distance from the full model without and with it."""
    before = after = positions = 0.0
    state = _state(work, running, work.cut)
    for batch in running.batches:
        reference = Reference(running.outputs(batch), vectors=running.pooling is not None)
        with state():
            before += reference.distance(running.outputs(batch))
            with found.applied(running):
                after += reference.distance(running.outputs(batch))
        positions += reference.count
    return before / positions, after / positions


def _running(model: Any, blocks: int, batches: Sequence[Batch], texts: Texts, *, choosing: bool) -> Running:
    first, stop = (FIRST_SCORED, texts.tokens - 1) if choosing else texts.scored
    return Running(model, blocks, batches, first=min(first, stop - 1), stop=stop, pooling=texts.pooling)


def _evidence(
    work: _Work, full: Any, texts: Texts, folder: Path, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows of the source and of every step; the last one is measured on the folder that was written."""
    sizes, cut = work.sizes, work.cut
    batches = texts.evaluation(folder)
    tokens = None if cut.tokens is None else torch.tensor(cut.tokens)
    if tokens is not None:  # the smaller tokenizer's ids, as the full model numbers them
        batches = [dict(batch) | {"input_ids": tokens[batch["input_ids"]]} for batch in batches]
    running = _running(full, sizes.layers, batches, texts, choosing=False)
    kept = len(cut.layers or range(sizes.layers))
    pruned = _running(load(folder, generates=texts.generates), kept, (), texts, choosing=False)
    stages = [Stage(name, running, _state(work, running, state), tokens) for name, state in work.cuts[:-1]]
    stages.append(Stage(work.cuts[-1][0], pruned, nullcontext, tokens, own_ids=True))
    first, stop = texts.scored
    before, rows = measure(
        running, stages, batches, first=first, stop=stop, tokens=tokens, progress=_part(progress, "measure")
    )
    found = []
    for (name, state), row in zip(work.cuts, rows, strict=True):
        found.append({"step": name, **_size(work, state, texts), **row})
    if tokens is not None and texts.generates:
        before["bits_per_byte"] = _bits_per_byte(running, work.checkpoint.path, texts)
        found[-1]["bits_per_byte"] = _bits_per_byte(pruned, folder, texts)
    return {"step": "source", **_size(work, Cut(), texts), **before}, found


def _bits_per_byte(running: Running, folder: Path, texts: Texts) -> float:
    """What a model and its own tokenizer make of the evaluation text: comparable between tokenizers."""
    batches = texts.evaluation(folder)
    targets = [batch["input_ids"][0, texts.scored[0] + 1 : texts.scored[1] + 1] for batch in batches]
    tokenizer = open_reference(folder)
    nats = sum(
        torch.nn.functional.cross_entropy(running.outputs(batch), aim, reduction="sum").item()
        for batch, aim in zip(batches, targets, strict=True)
    )
    if tokenizer.decode is None:
        raise InputRefused(f"{folder.name}: its tokenizer can't turn ids into text")
    nbytes = sum(len(tokenizer.decode(aim.tolist()).encode()) for aim in targets)
    return significant(nats / math.log(2) / nbytes, 5)


def _size(work: _Work, cut: Cut, texts: Texts) -> dict[str, int]:
    rows = work.sizes.vocabulary if cut.tokens is None else len(cut.tokens)
    after = pieces(work.checkpoint, work.anatomy, work.sizes, cut)
    found = size_of(after, work.anatomy, output_rows=rows if texts.generates else 0)
    return found | {"layers": len(cut.layers or range(work.sizes.layers))}


def _state(work: _Work, running: Running, cut: Cut) -> Callable[[], AbstractContextManager[None]]:
    """Puts the full model into the state of a cut that has not been written: all of it but the vocabulary."""

    @contextmanager
    def state() -> Iterator[None]:
        gone = () if cut.layers is None else [n for n in range(work.sizes.layers) if n not in cut.layers]
        with ExitStack() as stack:
            stack.enter_context(running.without(gone))
            stack.enter_context(width.silenced(running, work.anatomy, cut.neurons))
            stack.enter_context(heads.silenced(running, work.anatomy, work.sizes, cut.groups))
            yield

    return state


def _sparsity_report(work: _Work, thinning: Thinning, written: Sequence[Path]) -> dict[str, Any]:
    """Zeros, and what they change of the file: nothing but its compressed download."""
    sources = sorted({info.file for info in work.checkpoint.tensors.values()})
    return {
        "pattern": work.request.sparsity.name if work.request.sparsity else None,
        "zero_share": round(thinning.zeros / max(1, thinning.weights), 6),
        "weights": thinning.weights,
        "file_bytes": sum(path.stat().st_size for path in written),
        "source_file_bytes": sum(path.stat().st_size for path in sources),
        "gzip_bytes": download_bytes(written),
        "source_gzip_bytes": download_bytes(sources),
        "note": "neither llama.cpp nor onnxruntime on a CPU skips zeros: file, memory and speed stay the same, "
        "only a compressed download gets smaller",
    }


def _part(progress: Progress, name: str) -> Progress:
    """Progress of one step as a part of the whole."""
    names = list(_PARTS)
    before, own = sum(_PARTS[earlier] for earlier in names[: names.index(name)]), _PARTS[name]

    def part(done: int, total: int) -> None:
        progress(before + own * done // max(1, total), sum(_PARTS.values()))

    return part
