"""Which neurons of the feed-forward networks a model can best do without: root mean square activation x norm of the
column that reads it.

    score_j = rms(a_j) ||W_down[:, j]||        what neuron j adds to the hidden state, in the mean

As many in every layer: GGUF has one width for all. Minitron (arXiv:2407.14679) ranks by activation alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from edgepack.figures import significant
from edgepack.prune.anatomy import Anatomy
from edgepack.prune.running import Running
from edgepack.prune.statistics import Statistics


def choose_neurons(
    running: Running, anatomy: Anatomy, statistics: Statistics, width: int, *, gone: Collection[int] = ()
) -> tuple[dict[int, tuple[int, ...]], dict[str, float]]:
    """The neurons that stay.

    Args:
        running: The model.
        anatomy: Of the model.
        statistics: From calibration text.
        width: Neurons that stay in every layer.
        gone: Layers that have been left out.

    Returns:
        By original number of the layer; and the part of the summed squared scores that is lost, layer by layer.
    """
    kept, lost = {}, {}
    for number, layer in enumerate(running.layers):
        if number in gone:
            continue
        columns = reading_columns(layer.get_submodule(anatomy.ffn_out).weight, anatomy)
        scores = statistics.inputs[number, anatomy.ffn_out] * columns.double().norm(dim=0)
        best = torch.argsort(scores, descending=True, stable=True)[:width]
        kept[number] = tuple(sorted(best.tolist()))
        energy = scores.square()
        lost[str(number)] = significant(1 - (energy[best].sum() / energy.sum()).item(), 4)
    return kept, lost


def reading_columns(weight: torch.Tensor, anatomy: Anatomy) -> torch.Tensor:
    """The matrix that reads the neurons, `[hidden, neurons]`, a view."""
    return weight.T if anatomy.transposed else weight


@contextmanager
def silenced(running: Running, anatomy: Anatomy, kept: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """The model in memory computing for a while what it would without the other neurons."""
    with zeroed(
        [
            (reading_columns(running.layers[number].get_submodule(anatomy.ffn_out).weight, anatomy), list(neurons))
            for number, neurons in kept.items()
        ]
    ):
        yield


@contextmanager
def zeroed(matrices: Sequence[tuple[torch.Tensor, list[int]]]) -> Iterator[None]:
    """Matrices `[out, in]` with all columns zero but some, for a while."""
    changes = []
    for columns, kept in matrices:
        gone = torch.ones(columns.shape[1], dtype=torch.bool)
        gone[kept] = False
        changes.append((columns, gone.nonzero()[:, 0], torch.zeros(())))
    with changed(changes):
        yield


@contextmanager
def changed(matrices: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Matrices `[out, in]` with other values in some columns, for a while.

    Args:
        matrices: Matrix, numbers of columns, and what stands there: `[out, columns]`, or a scalar.
    """
    saved = []
    with torch.no_grad():
        for columns, numbers, values in matrices:
            saved.append((columns, numbers, columns[:, numbers].clone()))
            columns[:, numbers] = values.to(columns.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            for columns, numbers, values in saved:
                columns[:, numbers] = values
