"""Smaller models of the same kind that could be made: which there are, and what one would look like as a GGUF.

A variant is a number of layers and a width of the feed-forward networks. It is sized and timed by the same plan as the
model itself: from a description with fewer and narrower tensors, before anything is cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgepack.prune.anatomy import Anatomy, Sizes
from edgepack.prune.request import BLOCK, SUPERBLOCK, Request

if TYPE_CHECKING:
    from edgepack.gguf.model import ModelSpec, TensorSpec

# At most a third of the layers, or of the neurons: beyond it a model is pruned and healed in rounds
# (../docs/pruning.md; Muralidharan et al., arXiv:2407.14679).
MOST_SHARE = 1 / 3
_NARROWER = (1 / 8, 1 / 4, 1 / 3)
_BLOCK_NUMBER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Variant:
    """What is left out.

    Args:
        depth: Layers that go.
        ffn: Neurons that stay in every layer; None for all.
    """

    depth: int = 0
    ffn: int | None = None

    @property
    def name(self) -> str:
        """As `--prune` takes it; `bits alone` where nothing goes."""
        parts = [f"depth={self.depth}"] if self.depth else []
        parts += [f"ffn={self.ffn}"] if self.ffn else []
        return ",".join(parts) or "bits alone"

    @property
    def request(self) -> Request:
        """What to prune."""
        return Request(depth=self.depth, ffn=self.ffn)


WHOLE = Variant()


def variants(anatomy: Anatomy, sizes: Sizes) -> list[Variant]:
    """Every variant worth a look: some layers, some neurons, or both; least first.

    Args:
        anatomy: Of the model: layers may only go in runs.
        sizes: Of the model.
    """
    depths = [0, *range(anatomy.period, int(sizes.layers * MOST_SHARE) + 1, anatomy.period)]
    found = [Variant(depth, width) for depth in depths for width in (None, *widths(sizes))]
    return [variant for variant in found if variant != WHOLE]


def widths(sizes: Sizes) -> list[int]:
    """Narrower feed-forward networks, in the multiples that k-quants come in, widest first."""
    unit = SUPERBLOCK if sizes.ffn > SUPERBLOCK else BLOCK
    found = {round(sizes.ffn * (1 - share) / unit) * unit for share in _NARROWER}
    least = sizes.ffn * (1 - MOST_SHARE) - unit / 4
    return sorted((width for width in found if least <= width < sizes.ffn and width > 0), reverse=True)


def shrunk(model: ModelSpec, variant: Variant, sizes: Sizes) -> ModelSpec:
    """The description of a variant: enough to size it; its tensors can't be read.

    The last layers stand for those that will go: of the architectures that can be pruned all layers have one size.

    Args:
        model: The whole model.
        variant: What is left out of it.
        sizes: Of the whole model.
    """
    layers = model.layers - variant.depth
    tensors = []
    for tensor in model.tensors:
        match = _BLOCK_NUMBER.match(tensor.name)
        if match is None:
            tensors.append(tensor)
        elif int(match[1]) < layers:
            tensors.append(tensor if variant.ffn is None else _narrow(tensor, sizes.ffn, variant.ffn))
    return replace(model, tensors=tuple(tensors), attention=model.attention[:layers])


def _narrow(tensor: TensorSpec, old: int, new: int) -> TensorSpec:
    """A matrix of the feed-forward network with fewer neurons; gate and up may be stacked in one."""
    if ".ffn_" not in tensor.name or "norm" in tensor.name:
        return tensor
    number = {old: new, 2 * old: 2 * new}
    place = 0 if "ffn_down" not in tensor.name else len(tensor.shape) - 1
    shape = tuple(number.get(size, size) if at == place else size for at, size in enumerate(tensor.shape))
    return replace(tensor, shape=shape)
