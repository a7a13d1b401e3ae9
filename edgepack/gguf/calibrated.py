"""Builds of a given size: calibrate the source, price every tensor, allocate types; each step kept in the store.

    calibrate    imatrix, second moments, gradients     (edgepack/calibrate/collect.py)
    sensitivity  nats per token for every tensor and type (edgepack/calibrate/sensitivity.py)
    allocate     a type for every tensor                (edgepack/gguf/tuning.py)

Before any of it, says whether the model can be calibrated here, what that will take, and how large files can be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.backend import Candidate
from edgepack.errors import InputRefused, UsageError
from edgepack.events import Event, step
from edgepack.gguf import tuning
from edgepack.gguf.file import Metadata
from edgepack.gguf.layout import Layout, plan_layout
from edgepack.gguf.presets import find_preset
from edgepack.gguf.size import Size, parse_size
from edgepack.predict import MB, predict
from edgepack.worker import run
from edgepack.workshop import Workshop, available_memory_bytes, keyed, physical_cores, refuse_changed, sha256, stamps

if TYPE_CHECKING:
    from edgepack.calibrate.texts import Located
    from edgepack.gguf.imatrix import Imatrix
    from edgepack.gguf.model import ModelSpec, TensorSpec
    from edgepack.source import Source
    from edgepack.store import Entry
    from edgepack.targets import Target

WINDOW_TOKENS = 512
# Windows of text: gains grow with them (feedback takes 14 % off at 24, 18 % at 200), and so does the time. A model of
# this many parameters gets the most; a larger one fewer in proportion, so that time grows slower than the model.
MOST_WINDOWS, LEAST_WINDOWS, FULL_PARAMETERS = 100, 16, 100_000_000
# Above this, `auto` leaves calibration to those who ask for it. Half an hour: a coffee, not an afternoon.
AUTO_SECONDS = 1800
# Floating-point operations per second and core that transformers reaches in float32 on this kind of work (AVX2 to
# AVX-512; measured: 100 with AVX-512, in 10^9 a second; half of it assumed): only good for saying minutes or hours.
CORE_FLOPS = 50e9
BASE_BYTES = 420_000_000  # Python, torch, transformers and a tokenizer
DISTINCT_INPUTS = 0.8  # of the squared widths: query, key and value share an input, gate and up another
MOMENTS_BYTES = 2 << 30  # `calibrate.statistics.MOMENTS_BYTES`, which needs torch to import


@dataclass(frozen=True)
class Cost:
    """What calibration will take on this machine.

    Args:
        windows: Windows of calibration text.
        forward_passes: Passes over one window, a gradient counted as three.
        seconds: Rough.
        memory_bytes: Peak of the process.
    """

    windows: int
    forward_passes: int
    seconds: float
    memory_bytes: int

    def sentence(self) -> str:
        """The cost in words."""
        minutes = self.seconds / 60
        time = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        return (
            f"calibration reads {self.windows} windows of {WINDOW_TOKENS} tokens ({self.forward_passes} passes): "
            f"about {time} on this machine, {self.memory_bytes / 1e9:.1f} GB of memory"
        )


def cost(model: ModelSpec, target: Target) -> Cost:
    """Predict what calibrating a model takes here."""
    windows = target.quantize.calibration_windows or windows_for(model.parameters)
    passes = windows + 3 * min(windows, gradient_windows(windows))
    matrices = tuning.multiplied(model)
    squares = DISTINCT_INPUTS * sum(tensor.width**2 for tensor in matrices)
    # Second moments cost width^2 per token and input, the forward pass 2 operations per weight and token.
    flops = WINDOW_TOKENS * (passes * 2 * model.parameters + windows * 2 * squares)
    return Cost(windows, passes, flops / (CORE_FLOPS * physical_cores()), _memory_bytes(model, squares))


def _memory_bytes(model: ModelSpec, squares: float) -> int:
    """Float32 weights, and the larger of the two phases: what a window's gradients keep, or second moments twice (sums
    and what is being added). Within 10 % of what was measured at 5M, 37M and 0.2B parameters.
    """
    matrices = tuning.multiplied(model)
    vocabulary = max(tensor.rows for tensor in model.tensors if tensor.name.startswith(("token_embd", "output.")))
    activations = 1.3 * sum(tensor.width + tensor.rows for tensor in matrices) + 5 * vocabulary
    gradients = 4 * WINDOW_TOKENS * activations
    moments = 2 * min(MOMENTS_BYTES, 4 * squares)
    return int(BASE_BYTES + 4 * model.parameters + 1.1 * max(gradients, moments))


def windows_for(parameters: int) -> int:
    """Windows of calibration text for a model of this size."""
    return max(LEAST_WINDOWS, min(MOST_WINDOWS, MOST_WINDOWS * FULL_PARAMETERS // max(parameters, 1)))


def gradient_windows(windows: int) -> int:
    """Windows that gradients are taken over."""
    return max(4, min(16, windows // 4))


def obstacle(model: ModelSpec, source: Source, target: Target) -> str | None:
    """Why a model can't be calibrated here; None when it can."""
    if source.path.is_file():
        return "its source is a GGUF, and calibration runs the Hugging Face model"
    if model.embedding:
        return "it is an embedder, and sensitivity is measured on next-token predictions"
    if model.experts:
        return "it has experts, which calibration does not know"
    if model.context_length < WINDOW_TOKENS:
        return f"its context is {model.context_length} tokens, and calibration reads windows of {WINDOW_TOKENS}"
    if target.quantize.imatrix:
        return "quantize.imatrix is set, and calibration gathers its own"
    need, free = cost(model, target).memory_bytes, available_memory_bytes()
    if need > free:
        return f"calibration needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def promised_imatrix(model: ModelSpec, source: Source, target: Target) -> Imatrix:
    """Stands for the importance matrix that calibration will make, so that headers are sized exactly.

    Raises:
        UsageError: The model can't be calibrated here.
    """
    from edgepack.calibrate.texts import resolve

    reason = obstacle(model, source, target)
    if reason:
        raise UsageError(
            f"{source.name} can't be calibrated: {reason}",
            hint="Leave --calibration out, or give an importance matrix of llama-imatrix.",
        )
    located = resolve(target.quantize.calibration)
    return tuning.expected_imatrix(model, [name for name, _ in located.files])


def room(model: ModelSpec, target: Target, own_keys: Metadata, imatrix: Imatrix) -> tuning.Room:
    """The sizes a file of this model can have."""
    return tuning.room(
        model,
        tuning.allowed_types(target.quantize.candidates, target.quantize.types),
        overrides=dict(target.quantize.tensors),
        imatrix=imatrix,
        shard_bytes=_shard_bytes(target),
        extra_metadata=own_keys,
    )


def candidate(model: ModelSpec, source: Source, target: Target, quantize: str, own_keys: Metadata) -> Candidate:
    """What a file of a size is predicted to cost: laid out with types by size alone, which the real ones resemble.

    Raises:
        BudgetError: The size is below what the smallest types can reach.
        UsageError: The model can't be calibrated here.
    """
    size = parse_size(quantize)
    reason = obstacle(model, source, target)
    if reason:
        raise UsageError(
            f"{size.name}: a file of a given size needs calibration, which {source.name} can't have: {reason}",
            hint="Name a preset instead: --quantize Q4_K_M.",
        )
    imatrix = promised_imatrix(model, source, target)
    where = room(model, target, own_keys, imatrix)
    note = cost(model, target).sentence()
    if where.budget(size) > where.most:
        note += f"; the largest types on offer make {where.most:,} bytes, and F16 (--quantize F16) is closer still"
    return replace(_guessed(model, target, size, own_keys, imatrix, where), note=note)


def filling(
    model: ModelSpec,
    source: Source,
    target: Target,
    own_keys: Callable[[str], Metadata],
    fits: Callable[[Candidate], bool],
) -> tuple[Candidate | None, str | None]:
    """The largest file of calibrated types that `fits`, to a hundredth of a bit per weight.

    Returns:
        The candidate, or None and why a preset has to do.
    """
    reason = obstacle(model, source, target)
    if reason:
        return (
            None,
            None if source.path.is_file() or model.embedding else f"types can't be chosen by calibration: {reason}",
        )
    expected = cost(model, target)
    if expected.seconds > AUTO_SECONDS:
        return None, (
            f"a preset was chosen, because {expected.sentence()}; --bpw N asks for the best file of a size all the same"
        )
    imatrix = promised_imatrix(model, source, target)
    where = room(model, target, own_keys("0.00bpw"), imatrix)
    low, high = (math.ceil(100 * where.bits_per_weight(nbytes)) for nbytes in (where.least, where.most))

    def at(hundredths: int) -> Candidate:
        size = parse_size(f"{hundredths / 100:.2f}bpw")
        return _guessed(model, target, size, own_keys(size.name), imatrix, where)

    if not fits(at(low)):
        return None, None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    return replace(at(low), note=expected.sentence()), None


def _guessed(
    model: ModelSpec, target: Target, size: Size, own_keys: Metadata, imatrix: Imatrix, where: tuning.Room
) -> Candidate:
    prior = {
        tensor.name: {kind: _prior(tensor, where.nbytes(tensor.name, kind)) for kind in where.kinds[tensor.name]}
        for tensor in model.tensors
        if tensor.name in where.kinds
    }
    guessed = tuning.choose(where, prior, size, {})
    layout = layout_of(model, target, guessed.types, guessed.base, own_keys, imatrix)
    return Candidate(size.name, replace(predict(model, layout, target), exact=False))


def _prior(tensor: TensorSpec, nbytes: int) -> float:
    """Squared error falls by 4 with every bit."""
    return float(tensor.parameters * 4.0 ** (-8 * nbytes / tensor.parameters))


def layout_of(
    model: ModelSpec, target: Target, types: Mapping[str, str], base: str, own_keys: Metadata, imatrix: Imatrix | None
) -> Layout:
    """The exact layout of a map of types."""
    return plan_layout(
        model, base, overrides=types, imatrix=imatrix, shard_bytes=_shard_bytes(target), extra_metadata=own_keys
    )


def _shard_bytes(target: Target) -> int | None:
    return target.delivery.shard_mb * MB if target.delivery.shard_mb else None


def calibrate(shop: Workshop, source: Source, target: Target) -> Entry:
    """Statistics of the source on the calibration text, as a store entry (see `calibrate/collect.py`).

    Raises:
        InputRefused: The text is too short, no text, or overlaps what fidelity is measured on.
        StepError: The model can't be run.
    """
    from edgepack.calibrate.texts import resolve
    from edgepack.gguf.model import describe

    expected = cost(describe(source.path), target)
    located = resolve(target.quantize.calibration)
    arguments: dict[str, Any] = {
        "model": str(source.path),
        "text": located.as_json(),
        "windows": expected.windows,
        "gradient_windows": gradient_windows(expected.windows),
        "threads": shop.threads,
    }
    text = digests(located)
    inputs = arguments | {"model": source.files, "text": text}
    with step(shop.listener, "calibrate", f"{expected.windows} windows of {located.origin}", unit="windows") as handle:
        compare_with_evaluation(shop, source, located, text)

        def make(folder: Path) -> None:
            before = stamps(source)
            with shop.store.journal("calibrate", keyed(inputs)) as journal:
                run(
                    "edgepack.calibrate.collect:collect",
                    arguments | {"folder": str(folder), "journal": str(journal)},
                    what="calibration",
                    progress=handle.progress,
                )
            refuse_changed(source, before)
            if digests(located) != text:
                raise InputRefused(
                    f"calibration text {located.origin} changed while it was read",
                    hint="Build again when nobody writes to it.",
                )

        entry = shop.store.step("calibrate", keyed(inputs), make)
        handle.cached = entry.cached
        handle.outcome = f"{facts(entry)['tokens']:,} tokens of {located.origin}"
    return entry


def digests(located: Located) -> list[list[str]]:
    """Names and sha256 of a text's files."""
    return [[name, sha256(path)] for name, path in located.files]


def facts(entry: Entry) -> dict[str, Any]:
    """What the manifest says of a calibration: text, windows, tokens."""
    report = json.loads(entry.files["calibration.json"].path.read_text(encoding="utf-8"))
    return {name: report[name] for name in ("text", "text_sha256", "windows", "gradient_windows", "tokens")}


def compare_with_evaluation(shop: Workshop, source: Source, located: Located, text: list[list[str]]) -> None:
    """What is measured on must not have been calibrated on; texts of different kinds are worth a word."""
    if shop.evaluation is None:
        return
    arguments = {
        "calibration": located.as_json(),
        "evaluation": str(shop.evaluation),
        "source": str(source.path),
    }
    inputs = {"calibration": text, "evaluation": sha256(shop.evaluation), "source": source.files}
    found, _ = shop.remember(
        "calibration-text",
        inputs,
        lambda: run("edgepack.calibrate.compared:compared", arguments, what="a look at the calibration text"),
    )
    if found["unlike"]:
        shop.listener(Event("note", "calibrate", found["unlike"]))


def allocation(
    shop: Workshop,
    source: Source,
    target: Target,
    quantize: str,
    entry: Entry,
    own_keys: Metadata,
    limits: Mapping[str, Mapping[str, float]],
) -> tuning.Allocation:
    """Price every tensor in every type and choose.

    Args:
        shop: Store and listener.
        source: The model.
        target: Types, presets to beat, budgets.
        quantize: The size.
        entry: From `calibrate`.
        own_keys: edgepack's keys in the file.
        limits: Budgets that the prediction must meet; a smaller size is taken until it does. Empty: the size is the
            user's own.

    Raises:
        BudgetError: The size is too small for any types.
    """
    from edgepack.gguf.imatrix import read_imatrix
    from edgepack.gguf.model import describe
    from edgepack.planning import misses

    model = describe(source.path)
    imatrix = read_imatrix(entry.path / "imatrix.gguf")
    where = room(model, target, own_keys, imatrix)
    presets = {
        find_preset(name).name: layout_of(model, target, dict(target.quantize.tensors), name, own_keys, imatrix)
        for name in target.quantize.candidates
    }
    costs = sensitivity(shop, source, entry, _kinds(where, presets), feedback=target.quantize.feedback)["costs"]
    with step(shop.listener, "allocate", quantize, unit="tensors") as handle:
        size = parse_size(quantize)
        while True:
            chosen = tuning.choose(where, costs, size, presets)
            layout = layout_of(model, target, chosen.types, chosen.base, own_keys, imatrix)
            if not misses(predict(model, layout, target), limits):
                break
            size = Size(size.name, total_bytes=int(0.99 * layout.total_bytes))
        handle.outcome = f"{layout.total_bytes / 1e6:,.1f} MB, predicted KLD {chosen.predicted_kld:.3g}"
        if chosen.runner_up:
            handle.outcome += f" ({chosen.runner_up['quantize']}: {chosen.runner_up['predicted_kld']:.3g})"
    return chosen


def _kinds(where: tuning.Room, presets: Mapping[str, Layout]) -> list[str]:
    """Types to price: those on offer, and those of the presets that have to be beaten."""
    offered = {kind for kinds in where.kinds.values() for kind in kinds}
    used = {layout.types[name].name for layout in presets.values() for name in where.kinds}
    return sorted(offered | used)


def sensitivity(
    shop: Workshop, source: Source, entry: Entry, kinds: Sequence[str], *, feedback: bool
) -> dict[str, Any]:
    """Costs of every tensor and type, from the store if they are there."""
    arguments = {"model": str(source.path), "kinds": list(kinds), "feedback": feedback, "threads": shop.threads}
    with step(shop.listener, "sensitivity", f"{len(kinds)} types", unit="weights") as handle:
        found, handle.cached = shop.remember(
            "sensitivity",
            arguments | {"model": source.files, "statistics": entry.key},
            lambda: run(
                "edgepack.calibrate.sensitivity:sensitivity",
                arguments | {"statistics": str(entry.path)},
                what="sensitivity",
                progress=handle.progress,
            ),
        )
        handle.outcome = f"{len(found['costs'])} tensors priced"
    return dict(found)
