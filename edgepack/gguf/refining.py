"""The step of a build that trains the codes of a finished GGUF (`refine.py`), and what is said of it beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.errors import InputRefused, UsageError
from edgepack.events import step
from edgepack.gguf import calibrated
from edgepack.worker import run
from edgepack.workshop import Exported, available_memory_bytes, keyed, physical_cores, refuse_changed, stamps

if TYPE_CHECKING:
    from edgepack.gguf.model import ModelSpec
    from edgepack.source import Source
    from edgepack.targets import Target
    from edgepack.workshop import Workshop

# float32 source, student, masters, gradients, Adam's two moments; codes, scales and what is left over at the peak.
BYTES_PER_PARAMETER = 28
_FIXED_BYTES = 1 << 30  # torch, activations of a window, logits
# Operations per parameter and token: 2 forward and 4 backward in the student, 2 in the source.
_OPERATIONS = 8


def refuse_impossible(model: ModelSpec, source: Source, target: Target) -> None:
    """Say before any work that a model can't be refined here.

    Raises:
        UsageError: It is no checkpoint, no causal language model, or too large for the memory that is free.
    """
    if not target.quantize.refine:
        return
    reason = None
    if source.path.is_file():
        reason = "its source is a GGUF, and training runs the Hugging Face model"
    elif model.embedding:
        reason = "it is an embedder, and training follows next-token predictions"
    elif model.experts:
        reason = "it has experts, which training does not know"
    else:
        need, free = BYTES_PER_PARAMETER * model.parameters + _FIXED_BYTES, available_memory_bytes()
        if need > free:
            reason = f"training needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    if reason:
        raise UsageError(f"{source.name} can't be refined: {reason}", hint="Leave --refine out.")


def refuse_types(types: Iterable[str], quantize: str) -> None:
    """Types that training can't work in are known before any work where a preset is named.

    Raises:
        UsageError: No tensor has a type whose weights are rounded one by one.
    """
    from edgepack.gguf.blocks import SCALAR

    if not SCALAR & set(types):
        raise UsageError(
            f"--refine: {quantize} has no tensor whose weights are rounded one by one",
            hint=f"Types that can be refined: {', '.join(sorted(SCALAR))}.",
        )


def sentence(model: ModelSpec, tokens: int) -> str:
    """What training takes here, in words."""
    seconds = tokens * _OPERATIONS * model.parameters / (calibrated.CORE_FLOPS * physical_cores())
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    if seconds >= 2 * 3600:
        time = f"{seconds / 3600:.0f} h"
    memory = (BYTES_PER_PARAMETER * model.parameters + _FIXED_BYTES) / 1e9
    return f"refining trains on {tokens:,} tokens: about {time} on the CPU of this machine, {memory:.1f} GB of memory"


def refined(shop: Workshop, source: Source, target: Target, exported: Exported) -> Exported:
    """The artifact with its codes trained towards the source, as a store entry of its own.

    Raises:
        InputRefused: The text is too short or overlaps what fidelity is measured on.
        StepError: Training diverged; the best so far is kept in the store's journal.
    """
    from edgepack.calibrate.texts import resolve

    tokens = target.quantize.refine or 0
    located = resolve(target.quantize.calibration)
    text = calibrated.digests(located)
    calibrated.compare_with_evaluation(shop, source, located, text)
    arguments = {
        "model": str(source.path),
        "artifact": str(exported.path),
        "tokens": tokens,
        "text": located.as_json(),
        "threads": shop.threads,
    }
    inputs = arguments | {"artifact": exported.digest, "model": source.files, "text": text}
    with step(shop.listener, "refine", f"{tokens:,} tokens of {located.origin}", unit="tokens") as handle:

        def make(folder: Path) -> None:
            before = stamps(source)
            with shop.store.journal("refine", keyed(inputs)) as journal:
                report = run(
                    "edgepack.gguf.refine:refine",
                    arguments | {"folder": str(folder), "journal": str(journal)},
                    what="training in the grid",
                    progress=handle.progress,
                )
                refuse_changed(source, before)
                if calibrated.digests(located) != text:
                    raise InputRefused(
                        f"training text {located.origin} changed while it was read",
                        hint="Build again when nobody writes to it.",
                    )
                (folder / "refine.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")

        entry = shop.store.step("refine", keyed(inputs), make)
        report = json.loads(entry.files["refine.json"].path.read_text(encoding="utf-8"))
        handle.cached = entry.cached
        handle.outcome = (
            f"held-out KLD {report['before']['kld']:.4g} -> {report['after']['kld']:.4g}"
            if report["best_step"]
            else f"held-out KLD {report['before']['kld']:.4g}: training brought nothing, the file stays as it was"
        )
    kept = {name: value for name, value in report.items() if name != "files"}
    return replace(exported, entry=entry, report=dict(exported.report) | {"refine": kept})
