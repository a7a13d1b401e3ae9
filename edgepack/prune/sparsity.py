"""Single weights set to zero: by magnitude, or by magnitude x norm of the input (Wanda, arXiv:2306.11695).

    magnitude  |w_ij|, the smallest of a whole matrix
    wanda      |w_ij| rms(x_j), the smallest of each output row

or N of every M neighbours in a row (2:4), by either score. Embeddings, output matrix and norms stay. File and speed do
not change: neither llama.cpp nor onnxruntime on a CPU skips zeros; only a compressed download gets smaller. Offered
with the measurements that say so (`download_bytes`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import read_rows
from edgepack.errors import UsageError
from edgepack.prune.anatomy import Anatomy
from edgepack.prune.cut import Piece
from edgepack.prune.request import Sparsity

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_GZIP_LEVEL = 6  # of gzip(1) and of most servers
_CHUNK = 4 << 20
_BINS = 1 << 16  # of the histogram that finds a threshold: the upper half of a float32


class Thinning:
    """Zeros for the matrices of a model's layers.

    Args:
        sparsity: How many and by what.
        anatomy: Of the model.
        inputs: Root mean square of the inputs of every matrix, by its name in the source; float64 `[in]`.
        transposed: Weights are `[in, out]`.
    """

    def __init__(self, sparsity: Sparsity, anatomy: Anatomy, inputs: Mapping[str, npt.NDArray[np.float64]]) -> None:
        self._sparsity = sparsity
        self._anatomy = anatomy
        self._inputs = inputs
        self._thresholds: dict[str, float] = {}
        self.weights = 0
        self.zeros = 0

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Look at what needs to be known of whole matrices, and refuse what can't be grouped.

        Raises:
            UsageError: Rows that are no multiple of the group, or matrices stored column by column.
        """
        for piece in pieces:
            if not self.thins(piece):
                continue
            if self._anatomy.transposed:
                raise UsageError("sparsity: the matrices of this model are stored column by column: not supported")
            if self._sparsity.group and piece.shape[-1] % self._sparsity.group:
                raise UsageError(
                    f"sparsity {self._sparsity.name}: rows of {piece.info.name} have {piece.shape[-1]} weights, "
                    f"expected a multiple of {self._sparsity.group}"
                )
            if self._sparsity.criterion == "magnitude" and not self._sparsity.group:
                self._thresholds[piece.name] = _threshold(piece, self._sparsity.share)

    def thins(self, piece: Piece) -> bool:
        """True for matrices of the layers."""
        return len(piece.info.shape) == 2 and self._anatomy.place(piece.info.name) is not None

    def change(self, piece: Piece, first: int, rows: Array) -> Array:
        """The rows with their zeros; a `Change` of weights.py."""
        if not self.thins(piece):
            return rows
        scores = np.abs(_floats(rows, piece.info.dtype))
        if self._sparsity.criterion == "wanda":
            scale = self._inputs[piece.info.name]
            scores = scores * (scale if piece.columns is None else scale[piece.columns]).astype(np.float32)
        gone = self._lowest(scores, piece)
        found = rows.copy()
        found[gone] = 0
        self.weights += found.size
        self.zeros += int(np.count_nonzero(gone))
        return found

    def _lowest(self, scores: Floats, piece: Piece) -> npt.NDArray[np.bool_]:
        if self._sparsity.group:
            groups = scores.reshape(len(scores), -1, self._sparsity.group)
            order = np.argsort(groups, axis=-1, kind="stable")
            gone = np.zeros(groups.shape, bool)
            np.put_along_axis(gone, order[..., : self._sparsity.group - self._sparsity.keep], True, axis=-1)
            return gone.reshape(scores.shape)
        if self._sparsity.criterion == "magnitude":
            below: npt.NDArray[np.bool_] = scores <= self._thresholds[piece.name]
            return below
        count = round(scores.shape[1] * self._sparsity.share)
        gone = np.zeros(scores.shape, bool)
        np.put_along_axis(gone, np.argpartition(scores, count, axis=1)[:, :count], True, axis=1)
        return gone


def _floats(rows: Array, dtype: str) -> Floats:
    if dtype == "BF16":
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32, copy=False)


def _threshold(piece: Piece, share: float) -> float:
    """The magnitude that so much of the matrix does not exceed; exact for BF16, to 1/128 for others."""
    rows = int(np.prod(piece.info.shape[:-1]))
    counts = np.zeros(_BINS, np.int64)
    step = max(1, _CHUNK // max(1, piece.info.shape[-1]))
    for start in range(0, rows, step):
        found = read_rows(piece.info, start, min(start + step, rows))
        if piece.rows is not None:
            found = found[piece.rows[(piece.rows >= start) & (piece.rows < start + step)] - start]
        if piece.columns is not None:
            found = found[:, piece.columns]
        upper = np.abs(_floats(found, piece.info.dtype)).view(np.uint32) >> np.uint32(16)
        counts += np.bincount(upper.ravel(), minlength=_BINS)
    total = np.cumsum(counts)
    place = int(np.searchsorted(total, share * total[-1]))
    # everything whose upper half is that of the threshold counts as not above it
    return float(np.array([(place << 16) | 0xFFFF], np.uint32).view(np.float32)[0])


def download_bytes(files: Sequence[Path]) -> int:
    """Bytes of the files as gzip would send them: the one thing zeros make smaller."""
    total = 0
    for path in files:
        compressor = zlib.compressobj(_GZIP_LEVEL)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total += len(compressor.compress(chunk))
        total += len(compressor.flush())
    return total
