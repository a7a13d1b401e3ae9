"""Which key-value heads a model can best do without, each with the query heads that share it.

    score_g = rms over positions of || W_o[:, g] x_g ||        what the group adds to the hidden state

As many in every layer: config.json has one number for all. Query heads are never parted from their group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from edgepack.figures import significant
from edgepack.prune.anatomy import Anatomy, Sizes
from edgepack.prune.cut import query_width, spread
from edgepack.prune.running import Running
from edgepack.prune.statistics import Statistics
from edgepack.prune.width import zeroed


def choose_groups(statistics: Statistics, count: int) -> tuple[dict[int, tuple[int, ...]], dict[str, list[float]]]:
    """The key-value heads that stay.

    Args:
        statistics: From calibration text.
        count: Heads that stay in every layer.

    Returns:
        By original number of the layer; and the scores of all heads.
    """
    kept, scores = {}, {}
    for number, values in sorted(statistics.heads.items()):
        kept[number] = tuple(sorted(torch.argsort(values, descending=True, stable=True)[:count].tolist()))
        scores[str(number)] = [significant(value) for value in values.tolist()]
    return kept, scores


@contextmanager
def silenced(running: Running, anatomy: Anatomy, sizes: Sizes, kept: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """The model in memory computing for a while what it would without the other heads."""
    output = anatomy.attention[3] if kept else ""
    with zeroed(
        [
            (running.layers[number].get_submodule(output).weight, spread(groups, query_width(sizes)).tolist())
            for number, groups in kept.items()
        ]
    ):
        yield
