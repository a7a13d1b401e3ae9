"""What goes through a model's layers on calibration text: the sums that neurons, heads and weights are judged by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from edgepack.prune.anatomy import Anatomy, Sizes
from edgepack.prune.running import Running
from edgepack.worker import Progress, no_progress


@dataclass(frozen=True)
class Statistics:
    """Gathered in one pass, by original number of the layer.

    Args:
        inputs: Of every matrix in the layers, `(layer, module)`: root mean square of each input, float64 `[in]`.
        heads: Of every key-value head: root mean square of what it adds to the hidden state, float64 `[kv heads]`.
    """

    inputs: Mapping[tuple[int, str], torch.Tensor]
    heads: Mapping[int, torch.Tensor]


def collect(
    running: Running,
    anatomy: Anatomy,
    sizes: Sizes,
    *,
    gone: Collection[int] = (),
    progress: Progress = no_progress,
) -> Statistics:
    """Run the text through the model.

    Args:
        running: The model on calibration text.
        anatomy: Of the model.
        sizes: Of the model.
        gone: Layers left out.
        progress: In batches.
    """
    squares: dict[tuple[int, str], torch.Tensor] = {}
    heads: dict[int, torch.Tensor] = {}
    counts: dict[tuple[int, str], int] = {}
    real: list[torch.Tensor | None] = [None]

    def watch(number: int, name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def seen(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            values = args[0].flatten(0, -2) if real[0] is None else args[0][real[0]]
            key = (number, name)
            squares[key] = squares.get(key, 0) + values.square().sum(0, dtype=torch.float64)
            counts[key] = counts.get(key, 0) + len(values)
            if anatomy.attention and name == anatomy.attention[3]:
                heads[number] = heads.get(number, 0) + _contributions(values, module, sizes)

        return module.register_forward_pre_hook(seen)

    handles = [
        watch(number, name, module)
        for number, layer in enumerate(running.layers)
        if number not in gone
        for name, module in layer.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]
    try:
        with running.without(gone):
            for done, batch in enumerate(running.batches, 1):
                mask = batch.get("attention_mask")
                real[0] = None if mask is None else mask.bool()
                running.outputs(batch)
                progress(done, len(running.batches))
    finally:
        for handle in handles:
            handle.remove()
    return Statistics(
        {key: (values / counts[key]).sqrt() for key, values in squares.items()},
        {number: (values / counts[number, anatomy.attention[3]]).sqrt() for number, values in heads.items()},
    )


def _contributions(values: torch.Tensor, output: torch.nn.Module, sizes: Sizes) -> torch.Tensor:
    """Sum over positions of the squared length of each key-value head's part of the output, `[kv heads]`."""
    weight: torch.Tensor = output.weight
    pieces = zip(values.chunk(sizes.kv_heads, dim=1), weight.chunk(sizes.kv_heads, dim=1), strict=True)
    return torch.stack([(part @ columns.T).square().sum(dtype=torch.float64) for part, columns in pieces])
