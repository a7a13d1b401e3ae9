"""What leaving parts out would cost, before anything is cut: the price list that an automatic plan starts from.

Layers are chosen greedily and neurons by activation x norm on the first half of the windows, and the KL divergence of
each state is taken on the second half.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgepack.checkpoint import open_checkpoint
from edgepack.prune import depth as layers_of
from edgepack.prune import width
from edgepack.prune.anatomy import find_anatomy, sizes_of
from edgepack.prune.cost import kept_windows
from edgepack.prune.likeness import Reference
from edgepack.prune.running import Batch, Running, load
from edgepack.prune.statistics import collect
from edgepack.prune.texts import FIRST_SCORED, texts_of
from edgepack.worker import Progress, no_progress


def damage(
    *,
    model: str,
    depth: int,
    widths: Sequence[int],
    calibration: dict[str, Any],
    evaluation: str,
    windows: int,
    window_tokens: int,
    threads: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Price a model's layers and neurons (worker function).

    Args:
        model: Folder of a decoder.
        depth: Most layers to leave out.
        widths: Numbers of neurons that stay.
        calibration: `Located.as_json`: half of its windows to choose on, half to measure on.
        evaluation: Path of a text that must not overlap with it.
        windows: Of calibration text, both halves.
        window_tokens: Tokens of one.
        threads: For torch.
        progress: In batches of the choice.

    Returns:
        `depth`: number of layers -> `{"layers", "mean_kld"}`; `ffn`: width -> `{"mean_kld"}`; nats per token.

    Raises:
        InputRefused, StepError: As pruning raises them.
    """
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(Path(model))
    anatomy = find_anatomy(checkpoint)
    sizes = sizes_of(checkpoint, anatomy)
    texts = texts_of(checkpoint, calibration, Path(evaluation), windows, window_tokens, windows)
    batches = texts.calibration(2 * kept_windows(max(1, windows // 2), texts.tokens, sizes))
    half = max(1, len(batches) // 2)
    loaded = load(checkpoint.path, generates=True)

    def running(some: Sequence[Batch]) -> Running:
        return Running(loaded, sizes.layers, some, first=FIRST_SCORED, stop=texts.tokens - 1, pooling=None)

    choosing, measuring = running(batches[:half]), running(batches[half:] or batches[:half])
    judged = [Reference(measuring.outputs(batch), vectors=False) for batch in measuring.batches]
    found: dict[str, Any] = {"depth": {}, "ffn": {}}
    if depth:
        own = [Reference(choosing.outputs(batch), vectors=False) for batch in choosing.batches]
        stays = (0,) if anatomy.first_stays else ()
        chosen = layers_of.choose(choosing, own, depth, "greedy", run=anatomy.period, stays=stays, progress=progress)
        gone: list[int] = []
        for step in chosen.evidence["rounds"]:
            gone += step["dropped"]
            lost = layers_of.set_distance(measuring, judged, gone)
            found["depth"][str(len(gone))] = {"layers": sorted(gone), "mean_kld": lost}
    if widths:
        statistics = collect(choosing, anatomy, sizes)
        for wide in widths:
            kept, _ = width.choose_neurons(choosing, anatomy, statistics, wide)
            with width.silenced(measuring, anatomy, kept):
                found["ffn"][str(wide)] = {"mean_kld": layers_of.set_distance(measuring, judged, ())}
    return found
