"""Weights as integers: the arithmetic of symmetric quantization, by output channel, by row and by block.

    w ~ scale * q,  q integer

**Saturation.** x86-64 processors without VNNI multiply 8-bit integers with `vpmaddubsw`: neighbouring products of an
unsigned activation (0..255) and a signed weight are added in 16 bits, and a sum beyond 32,767 is cut off (Intel SDM
volume 2, PMADDUBSW; onnxruntime's MLAS pairs inputs 2i and 2i+1). The usual cure gives up a bit of every weight
(`reduce_range`, 7 bits). What is really needed is less: in every pair, the positive weights must not add up to more
than 128, nor the negative ones, since 255 * 128 <= 32,767. `by_output(pair_safe=True)` widens the scale of an output
channel until that holds for all its pairs: no activation can then overflow, and for normally distributed weights the
step grows by a third, where reduce_range doubles it.

Knows arrays only, nothing of graphs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Signed = npt.NDArray[np.int8]

INT8_MAX = 127  # -128 is not used: symmetric, as onnxruntime quantizes signed weights
_PAIR_SUM = 127.4  # of two quantized weights of one sign, before rounding adds at most 1: then 128 at most, exactly
_CANDIDATES = 16  # scales tried for a 4-bit block; more gain less than 1 % of the squared error


def by_output(weight: Floats, *, pair_safe: bool) -> tuple[Signed, Floats]:
    """8-bit integers with one scale per output channel.

    Args:
        weight: [inputs, outputs].
        pair_safe: Keep every pair of inputs (2i, 2i+1) from saturating 16 bits, whatever the activations are.

    Returns:
        Integers [inputs, outputs] in -127..127, scales [outputs] > 0.
    """
    largest = np.abs(weight).max(axis=0) / INT8_MAX
    if pair_safe:
        largest = np.maximum(largest, _pair_sums(weight) / _PAIR_SUM)
    scale = _usable(largest)
    return np.clip(np.rint(weight / scale), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def widest_pairs(rows: Floats) -> Floats:
    """Scales with which no two weights of an output saturate, in whatever order they meet (kernels of convolutions).

    Args:
        rows: [outputs, weights].

    Returns:
        [outputs] > 0: the step of 8 bits, or wider.
    """
    sums = [np.sort(np.maximum(sign * rows, 0), axis=1)[:, -2:].sum(axis=1) for sign in (1, -1)]
    return _usable(np.maximum(np.abs(rows).max(axis=1) / INT8_MAX, np.maximum(*sums) / _PAIR_SUM))


def saturates(weight: Signed, activations: Bytes) -> bool:
    """Whether `vpmaddubsw` would cut a sum off: the exact 16-bit arithmetic, for checks.

    Args:
        weight: [inputs, outputs].
        activations: [rows, inputs].
    """
    pairs = _pairs(weight.astype(np.int32))
    rows = _pairs(activations.T.astype(np.int32))
    for pair, row in zip(pairs, rows, strict=True):
        sums = row.T @ pair
        if sums.max(initial=0) > 32_767 or sums.min(initial=0) < -32_768:
            return True
    return False


def by_row(table: Floats) -> tuple[Signed, Floats]:
    """8-bit integers with one scale per row, for embedding tables.

    Args:
        table: [rows, width].

    Returns:
        Integers [rows, width], scales [rows, 1] > 0.
    """
    scale = _usable(np.abs(table).max(axis=1, keepdims=True) / INT8_MAX)
    return np.clip(np.rint(table / scale), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def by_block(rows: Floats, *, bits: int, block: int) -> tuple[Bytes, Floats]:
    """Unsigned integers around 2^(bits-1) with one scale per block, packed as onnxruntime's block operators read them.

    4-bit scales are searched for the least squared error, around the one that maps the value of largest magnitude to
    -8, the end of the range that has a step more (the choice of llama.cpp's Q4_0, ggml-quants.c quantize_row_q4_0_ref).

    Args:
        rows: [outputs, inputs]: blocks run along the inputs.
        bits: 4 or 8.
        block: Weights per block; a last block that is not full is filled with zeros.

    Returns:
        [outputs, blocks, block * bits / 8] with the lower half of a byte first, scales [outputs, blocks].
    """
    outputs, inputs = rows.shape
    count = -(-inputs // block)
    padded = np.zeros((outputs, count * block), np.float32)
    padded[:, :inputs] = rows
    blocks = padded.reshape(outputs, count, block)
    if bits == 8:
        scale = _usable(np.abs(blocks).max(axis=2, keepdims=True) / INT8_MAX)
        levels = np.clip(np.rint(blocks / scale), -INT8_MAX, INT8_MAX) + 128
        return levels.astype(np.uint8), scale[..., 0]
    scale = _searched_scale(blocks)
    levels = (np.clip(np.rint(blocks / scale), -8, 7) + 8).astype(np.uint8)
    return levels[..., 0::2] | (levels[..., 1::2] << 4), scale[..., 0]


def _searched_scale(blocks: Floats) -> Floats:
    """Scale of least squared error for 4 bits, [.., .., 1]; may be negative."""
    place = np.abs(blocks).argmax(axis=2, keepdims=True)
    extreme = np.take_along_axis(blocks, place, axis=2)
    best = np.where(extreme == 0, np.float32(1), extreme / np.float32(-8)).astype(np.float32)
    least = np.full(extreme.shape, np.inf, np.float32)
    for reach in np.linspace(-9.0, -5.5, _CANDIDATES, dtype=np.float32):
        scale = np.where(extreme == 0, np.float32(1), extreme / reach).astype(np.float32)
        error = ((np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks) ** 2).sum(axis=2, keepdims=True)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def _usable(scale: npt.NDArray[np.floating]) -> Floats:
    """Scales as float32; 1 where all weights are zero (or so small that their scale would be)."""
    single = scale.astype(np.float32)
    return np.where(single < np.finfo(np.float32).tiny, np.float32(1), single)


def _pairs(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """[pairs, 2, outputs]; an odd last input is paired with zero."""
    inputs, outputs = weight.shape
    if inputs % 2:
        weight = np.concatenate([weight, np.zeros((1, outputs), weight.dtype)])
    return weight.reshape(-1, 2, outputs)


def _pair_sums(weight: Floats) -> Floats:
    """Per output, the largest sum of one sign over all pairs of inputs."""
    pairs = _pairs(weight)
    positive = np.maximum(pairs, 0).sum(axis=1).max(axis=0)
    sums: Floats = np.maximum(positive, np.maximum(np.negative(pairs), 0).sum(axis=1).max(axis=0))
    return sums
