"""Run calibration text through the source model once and keep what it says of every matrix.

The folder that `collect` fills:

    imatrix.gguf              importance matrix, as llama-imatrix writes it (and reads it)
    moments/<k>.safetensors   second moments `[width, width]` of one input; matrices that are given one input share it
    gradients.safetensors     mean squared gradient of every output of every matrix, in the order of the GGUF's rows
    calibration.json          which matrix has which input, and what was run

A tied embedding is the output matrix too; its importance values are those of the final norm's output, an entry that
llama-imatrix does not make.

Second moments are gathered in portions that fit in memory, with one pass over the text for each. Partial sums are
saved now and then in a journal: killed at any time, a rerun goes on from there and gives the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edgepack.calibrate.imatrix_file import write_imatrix
from edgepack.calibrate.layers import Matrix, load_model, matrices
from edgepack.calibrate.layers import row_order as _row_order
from edgepack.calibrate.statistics import Collector, groups
from edgepack.calibrate.texts import calibration_text, calibration_windows
from edgepack.errors import StepError
from edgepack.gguf.model import ModelSpec, describe
from edgepack.text import WINDOW_TOKENS
from edgepack.worker import Progress, no_progress

_PORTION = 8  # windows between two looks at the clock
_SAVE_SECONDS = 60.0
_LOOKUPS = "lookups"


def collect(
    *,
    model: str,
    text: Mapping[str, Any] | str | None,
    windows: int,
    gradient_windows: int,
    folder: str,
    journal: str,
    threads: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fill `folder` with the statistics of a checkpoint.

    Args:
        model: Checkpoint folder.
        text: What `texts.calibration_text` takes; None for the packaged text.
        windows: Most windows of 512 tokens, for the second moments.
        gradient_windows: How many of them, from the start, gradients are taken over: they need less text, and a window
            costs three times as much.
        folder: Empty; filled.
        journal: Folder that outlives a killed process; emptied at the end.
        threads: For torch.
        progress: In windows run.

    Returns:
        The content of calibration.json.

    Raises:
        InputRefused: The text is too short or no text; a matrix has no counterpart in transformers.
        StepError: transformers can't load the model; NaN or infinite activations.
    """
    torch.set_num_threads(threads)
    source, out = Path(model), Path(folder)
    content = calibration_text(text, source)
    pieces = calibration_windows(source, content, WINDOW_TOKENS, windows)
    spec = describe(source)
    loaded = load_model(source)
    found = matrices(loaded, spec)
    layers = {name: matrix.module for name, matrix in found.items() if not matrix.looked_up}
    parts = list(groups(layers))
    few = pieces[:gradient_windows]
    ticks = _Ticks(len(few) + len(parts) * len(pieces), progress)
    gradients = _Sums(Path(journal) / "gradients.safetensors", len(few)).gather(
        few, lambda some: _gradients(Collector(loaded, some), layers), ticks
    )
    _save(_in_file_order(gradients, found, spec), out / "gradients.safetensors")
    inputs, squares = _moments(loaded, parts, pieces, out, Path(journal), ticks)
    tokens = len(pieces) * WINDOW_TOKENS
    write_imatrix(
        out / "imatrix.gguf",
        {name: (values.numpy() * tokens, tokens) for name, values in squares.items()},
        datasets=content.datasets,
        chunks=len(pieces),
        chunk_size=WINDOW_TOKENS,
    )
    report = {
        "text": content.origin,
        "text_sha256": content.sha256,
        "windows": len(pieces),
        "gradient_windows": len(few),
        "tokens": tokens,
        "inputs": inputs,
        "passes": len(parts),
        "tied": spec.tied,
    }
    (out / "calibration.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")
    for file in Path(journal).glob("*.safetensors"):
        file.unlink()
    return report


class _Ticks:
    """Progress in windows over all passes."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, windows: int) -> None:
        self._done += windows
        self._progress(self._done, self._total)


class _Sums:
    """Sums over windows that survive the process: saved now and then, taken up again.

    Args:
        file: Where they are kept meanwhile.
        windows: Of the whole text: sums of another run are not taken up.
    """

    def __init__(self, file: Path, windows: int) -> None:
        self._file, self._windows = file, windows

    def gather(self, pieces: Sequence[Sequence[int]], means: Any, ticks: _Ticks) -> dict[str, torch.Tensor]:
        """Means over `pieces`; `means(some windows)` gives those of a few.

        Always in the same portions, so that a rerun adds up the same numbers in the same order.
        """
        totals, done = self._saved()
        ticks.add(done)
        saved = time.monotonic()
        for start in range(done, len(pieces), _PORTION):
            some = pieces[start : start + _PORTION]
            for name, mean in means(some).items():
                totals[name] = totals[name].add_(mean, alpha=len(some)) if name in totals else mean * len(some)
            ticks.add(len(some))
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(totals | {"windows": torch.tensor([start + len(some), self._windows])}, self._file)
                saved = time.monotonic()
        return {name: total / len(pieces) for name, total in totals.items()}

    def _saved(self) -> tuple[dict[str, torch.Tensor], int]:
        if not self._file.is_file():
            return {}, 0
        try:
            totals = load_file(self._file)
            done, windows = totals.pop("windows").tolist()
        except (SafetensorError, KeyError):  # torn by a machine that lost power
            return {}, 0
        return (totals, done) if windows == self._windows else ({}, 0)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write beside, then rename: a killed process leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    save_file({name: values.contiguous() for name, values in tensors.items()}, beside)
    beside.replace(path)


def _gradients(collector: Collector, layers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    gradients, lookups = collector.gradients(layers)
    return gradients | {_LOOKUPS: lookups}


def _moments(
    model: Any, parts: Sequence[Mapping[str, Any]], pieces: Sequence[Sequence[int]], out: Path, journal: Path,
    ticks: _Ticks,
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:  # fmt: skip
    """Matrix -> number of its input, and matrix -> mean square of each input column."""
    inputs: dict[str, int] = {}
    squares: dict[str, torch.Tensor] = {}
    count = 0
    for number, part in enumerate(parts):
        owners = _owners(model, part, pieces[0])
        heads = {name: part[name] for name in dict.fromkeys(owners.values())}
        sums = _Sums(journal / f"moments-{number}.safetensors", len(pieces))
        found = sums.gather(pieces, lambda some, heads=heads: Collector(model, some).moments(heads), ticks)
        places = {}
        for name in heads:
            if not torch.isfinite(found[name]).all():
                raise StepError(f"calibration: the inputs of {name} are NaN or infinite on the calibration text")
            _save({"moments": found[name]}, out / "moments" / f"{count:04d}.safetensors")
            places[name] = count
            count += 1
        for name, owner in owners.items():
            inputs[name] = places[owner]
            squares[name] = found[owner].diagonal().clone()
    return inputs, squares


def _owners(model: Any, part: Mapping[str, Any], piece: Sequence[int]) -> dict[str, str]:
    """Matrix -> the first matrix that is given the same tensor: they share one matrix of second moments."""
    seen: list[tuple[Any, str]] = []
    owners: dict[str, str] = {}

    def watch(name: str) -> Any:
        def look(layer: Any, inputs: Any, output: Any) -> None:
            owner = next((first for tensor, first in seen if tensor is inputs[0]), name)
            owners[name] = owner
            if owner == name:
                seen.append((inputs[0], name))

        return look

    handles = [layer.register_forward_hook(watch(name)) for name, layer in part.items()]
    try:
        with torch.no_grad():
            model(torch.tensor([piece[:8]]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in part if name not in owners]
    if missing:
        raise StepError(f"calibration: {missing[0]} takes no part in the model's computation")
    return {name: owners[name] for name in part}


def _in_file_order(
    gradients: dict[str, torch.Tensor], found: Mapping[str, Matrix], spec: ModelSpec
) -> dict[str, torch.Tensor]:
    """Gradients by output in the order the GGUF has its rows in."""
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    ordered = {_LOOKUPS: gradients[_LOOKUPS]}
    for name, values in gradients.items():
        if name != _LOOKUPS:
            ordered[name] = values[_row_order(tensors[name], found[name])]
    return ordered
