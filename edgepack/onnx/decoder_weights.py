"""Fill a decoder's data file: read, quantize and write some rows at a time, on several threads.

Rows are quantized independently of one another, so the bytes do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from edgepack.onnx.decoder_graph import Matrix, Stored, as_stored
from edgepack.onnx.deferred import materialize, not_finite, row_reader, without_casts
from edgepack.onnx.matmul_nbits import Format, Quantized, quantize
from edgepack.onnx.weight_file import Slot, WeightFile, stored_values
from edgepack.worker import Progress

_CHUNK_WEIGHTS = 1 << 20  # read, quantized and written at a time by each thread: 4 MB of float32


class Filling:
    """The data file while it is written.

    Args:
        file: Open, allocated.
        slots: Where everything goes.
        threads: Worker threads.
        progress: In weights written.
    """

    def __init__(self, file: WeightFile, slots: Sequence[Slot], threads: int, progress: Progress) -> None:
        self._file, self._threads, self._progress = file, threads, progress
        self._offsets = {slot.stored.name: slot.offset or 0 for slot in slots}
        self._total = sum(slot.stored.weights for slot in slots if slot.offset is not None)
        self._done = 0

    def plain(self, slots: Sequence[Slot]) -> None:
        """Write every tensor that is not quantized.

        Raises:
            InputRefused: NaN or infinite weights.
        """
        for slot in slots:
            if slot.stored.values is None or slot.offset is None:
                continue
            for start, part in _pieces(slot.stored):
                self._file.write(part, slot.offset + start)
            self._advance(slot.stored.weights)

    def quantized(self, matrix: Matrix, form: Format, pair: tuple[Stored, Stored], ready: Quantized | None) -> None:
        """Quantize a matrix, or take the codes that are made, and write it.

        Raises:
            InputRefused: NaN or infinite weights.
        """
        codes_at, scales_at = (self._offsets[stored.name] for stored in pair)
        step = max(1, _CHUNK_WEIGHTS // matrix.width)
        read = row_reader(matrix.weights)
        if ready is None:
            read(0, 1)  # what must be computed whole is, before threads ask for it

        def one(start: int) -> int:
            stop = min(start + step, matrix.rows)
            if ready is None:
                made = quantize(read(start, stop), form, where=partial(not_finite, matrix.weights, matrix.name))
                codes, scales = made.codes, made.scales
            else:
                codes, scales = ready.codes[start:stop], ready.scales[start:stop]
            self._file.write(as_stored(codes, pair[0].kind), codes_at + start * form.row_bytes(matrix.width))
            self._file.write(scales, scales_at + start * form.scale_bytes(matrix.width))
            return (stop - start) * form.blocks(matrix.width) * form.block

        with ThreadPoolExecutor(self._threads) as pool:
            for count in pool.map(one, range(0, matrix.rows, step)):
                self._advance(count)

    def _advance(self, weights: int) -> None:
        self._done = min(self._done + weights, self._total)
        self._progress(self._done, self._total)


def _pieces(stored: Stored) -> Iterator[tuple[int, torch.Tensor]]:
    """Byte offset and values of a tensor, in chunks of rows where the checkpoint can be read so."""
    values = stored.values
    if values is None:
        return
    if values.ndim == 2 and values.dtype.is_floating_point and values.numel() > _CHUNK_WEIGHTS:
        read = row_reader(without_casts(values))
        rows, width = values.shape
        step = max(1, _CHUNK_WEIGHTS // width)
        for start in range(0, rows, step):
            yield start * (stored.nbytes // rows), stored_values(read(start, min(start + step, rows)), stored)
        return
    yield 0, stored_values(materialize(values), stored)
