"""A model of transformers whose matrices stand on the grids of a GGUF's blocks, to be trained there.

Scales and offsets stay as the file has them; what is trained are masters in full precision, and what the model computes
with are the nearest grid points:

    code = nearest level of (master + offset) / scale          weight = scale * level[code] - offset

The gradient of the loss with respect to the weight is taken for that of the master (straight-through estimator, Bengio
et al., arXiv:1308.3432). Masters start at the original weights, moved into the cell of the code the file has: at most
`INSIDE` of a step from its grid point, so that the model starts as exactly the file, and a weight that lies near the
border of its cell needs only a nudge.

Nothing here is recorded by autograd: the model's own parameters hold the weights, and `pull` reads their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgepack.calibrate.layers import Matrix
from edgepack.gguf.blocks import FORMS, Grid
from edgepack.gguf.types import GgmlType

INSIDE = 0.49  # of the distance to the neighbouring level; 0.5 is the border


class GridMatrix:
    """One matrix on its grid.

    Args:
        matrix: Where the model keeps it; its values are the original ones, and are replaced.
        grid: The file's codes, scales and offsets, rows in the order of the GGUF.
        kind: The file's type.
        order: Row of the model that each row of the GGUF is.
    """

    def __init__(self, matrix: Matrix, grid: Grid, kind: GgmlType, order: torch.Tensor) -> None:
        form = FORMS[kind.name]
        self._matrix, self._sub, self._order = matrix, form.sub, order
        device = matrix.rows.device
        self._levels = torch.from_numpy(form.levels.copy()).to(device)
        self._uniform = bool((np.diff(form.levels) == 1).all())
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2
        self._scales, self._offsets, self._start = (
            self._in_model_order(part).to(device) for part in (grid.scales, grid.offsets, grid.codes)
        )
        self._inverse = torch.where(self._scales == 0, 0.0, 1 / self._scales)
        self.master = self._inside(self._in_blocks(matrix.rows))
        # A step too fine for the offset it stands on, or none at all: those codes stay as they are.
        self._stuck = ((self._codes() != self._start) & (self._inverse != 0)[..., None]).any(-1) | (self._inverse == 0)

    def _in_model_order(self, rows: npt.NDArray[Any]) -> torch.Tensor:
        given = torch.from_numpy(rows)
        found = torch.empty_like(given)
        found[self._order] = given
        return found.reshape(len(rows), -1, self._sub) if given.dtype == torch.uint8 else found

    def _in_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), -1, self._sub)

    def _inside(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights moved into the cells of the codes."""
        level = self._levels[self._start.int()]
        gap = torch.diff(self._levels)
        below = torch.cat([gap[:1], gap])[self._start.int()]
        above = torch.cat([gap, gap[-1:]])[self._start.int()]
        place = (weights + self._offsets[..., None]) * self._inverse[..., None]
        place = torch.maximum(torch.minimum(place, level + INSIDE * above), level - INSIDE * below)
        return place * self._scales[..., None] - self._offsets[..., None]

    def _codes(self) -> torch.Tensor:
        place = (self.master + self._offsets[..., None]) * self._inverse[..., None]
        if self._uniform:
            return place.sub_(self._levels[0]).round_().clamp_(0, len(self._levels) - 1).to(torch.uint8)
        return torch.bucketize(place, self._middles).to(torch.uint8)

    def codes(self) -> torch.Tensor:
        """uint8 `[rows, sub-blocks, weights]`, rows in the model's order."""
        return torch.where(self._stuck[..., None], self._start, self._codes())

    def push(self) -> None:
        """Write the grid points into the model."""
        level = self._levels[self.codes().int()]
        values = level.mul_(self._scales[..., None]).sub_(self._offsets[..., None])
        self._matrix.rows.copy_(values.reshape(len(values), -1))

    def pull(self) -> None:
        """Take the gradient of the model's weights."""
        gradient = self._matrix.parameter.grad
        if gradient is None:
            self.master.grad = None
            return
        rows = gradient.t() if self._matrix.transposed else gradient
        self.master.grad = self._in_blocks(rows.contiguous())
        self._matrix.parameter.grad = None

    @property
    def changed(self) -> int:
        """Codes that are no longer those of the file."""
        return int((self.codes() != self._start).sum())

    def gguf_codes(self) -> npt.NDArray[np.uint8]:
        """Codes uint8 `[rows, width]` in the order of the GGUF's rows."""
        found: npt.NDArray[np.uint8] = self.codes().flatten(1).cpu()[self._order].numpy()
        return found


@dataclass(frozen=True)
class GridWeights:
    """The `Weights` (edgepack/heal/weights.py) of a student on a grid.

    Args:
        matrices: By GGUF name.
        norms: GGUF name -> parameter of the model, trained as it is.
    """

    matrices: Mapping[str, GridMatrix]
    norms: Mapping[str, Any]

    @property
    def masters(self) -> Mapping[str, torch.Tensor]:
        """See `Weights`."""
        return {name: matrix.master for name, matrix in self.matrices.items()} | dict(self.norms)

    def pull(self) -> None:
        """See `Weights`."""
        for matrix in self.matrices.values():
            matrix.pull()

    def push(self) -> None:
        """See `Weights`."""
        with torch.no_grad():
            for matrix in self.matrices.values():
                matrix.push()
