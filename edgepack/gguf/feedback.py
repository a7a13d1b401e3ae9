"""Round the weights of a row one column after the other, each column's error made up for by those still to come (GPTQ).

With H the second moments of a matrix's inputs, an error d of a row costs d H d^T. Let U be the upper Cholesky factor of
H^-1. Scales and offsets of all blocks are searched first, with importance weights, and stay as they are; then columns
are rounded in order to the nearest level of their block, and after column c

    e_c = (w_c - q_c) / U_cc        w_j -= e_c U_cj  for j > c

so that the cost of the row is the sum of e_c^2. The same recurrence with given codes tells the cost of any rounding.
Source: Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1; the order of columns by descending H_cc is the
`act_order` of its authors' code.

Where H itself is given, codes are then polished: in a few passes over all columns, each code moves to the level that
costs least with all others as they are (coordinate descent), which the one-way recurrence can't do for columns that
were rounded early. Each row ends as the better of this and ggml's own bytes.

Rows do not depend on one another. Up to 64 of them are worked on at once; each weight meets the same operations in the
same order however rows were grouped, so the bytes don't depend on threads or chunks. Knows nothing of where H comes
from. Imports numba: for worker processes only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgepack.gguf import blocks, encode, ggml
from edgepack.gguf.jit import compiled
from edgepack.gguf.types import GgmlType, row_bytes

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

_LANES = 64  # rows worked on at once: 4 registers of AVX-512; their errors of one lazy block (32 KB) stay in L1
_LAZY = 128  # columns before the rest of the row is updated; the paper's value
_TICKS = 512  # level codes by half steps from -128 to 127.5
_PASSES = 2  # of coordinate descent: the first takes 2.5 % off the cost, the second 1 %
_PANEL = 16  # rows that share a row of H while it is in L1


def quantize_rows_with_feedback(
    rows: _Floats,
    kind: GgmlType,
    out: _Bytes,
    importance: _Floats | None,
    factor: _Floats,
    order: npt.NDArray[np.int64] | None = None,
    *,
    moments: _Floats | None = None,
    damping: float = 0.0,
) -> npt.NDArray[np.float64]:
    """Quantize whole rows into `out`, no row worse in d H d^T than ggml's own bytes.

    Args:
        rows: float32 [n, width], C-contiguous, finite.
        kind: One of `blocks.SCALAR`.
        out: uint8, C-contiguous, at least `n * row_bytes(kind, width)` bytes; the start of it is written.
        importance: float32 [width] for the search of scales, or None.
        factor: float32 [width, width], C-contiguous, the upper Cholesky factor of the inverse of (damped) H, rows and
            columns in the order they are processed: that of `H[order][:, order]`.
        order: Column processed 1st, 2nd, ...: a permutation of range(width). None: as they stand.
        moments: float32 [width, width], C-contiguous, H with columns as they stand, not damped. None: no polishing.
        damping: What was added to the diagonal of H before `factor` was made.

    Returns:
        float64 [n, 2]: each row's d H d^T (H as damped for the factor) with ggml's bytes, and with the bytes written.

    Raises:
        UsageError: Not a type of single weights, or what `ggml.quantize_rows` refuses.
    """
    count, width = rows.shape if rows.ndim == 2 else (0, 0)
    for name, square in (("factor", factor), ("moments", moments)):
        if square is not None and not (
            square.shape == (width, width) and square.dtype == np.float32 and square.flags.c_contiguous
        ):
            raise ValueError(f"{name} must be contiguous float32 [{width}, {width}], not {square.dtype} {square.shape}")
    columns = np.arange(width) if order is None else np.asarray(order, dtype=np.int64)
    if not np.array_equal(np.sort(columns), np.arange(width)):
        raise ValueError(f"order must be a permutation of range({width})")
    ggml.quantize_rows(rows, kind, out, importance)
    data = out[: count * row_bytes(kind, width)].reshape(count, -1)
    plain = blocks.unpack(data, kind, width)
    grid = plain
    if kind.name in encode.ENCODABLE:  # scales that fit better
        searched = np.empty_like(data)
        encode.quantize_rows(rows, kind, searched.reshape(-1), importance)
        grid = blocks.unpack(searched, kind, width)
    form = blocks.FORMS[kind.name]
    ticks = _ticks(form)
    costs = np.empty((count, 2))
    for free, of in ((False, plain), (True, grid)):
        _feed_back(
            *(rows, of.codes, of.scales, of.offsets, factor, columns),
            *(form.sub, form.levels, ticks, free, costs[:, int(free)]),
        )
    if moments is not None:
        _polish(
            *(rows, grid.codes, grid.scales, grid.offsets, moments, np.float32(damping), columns),
            *(form.sub, form.levels, ticks, _PASSES, costs[:, 1]),
        )
    better = costs[:, 1] < costs[:, 0]  # not where a cost is NaN
    data[better] = blocks.pack(grid, kind)[better]
    costs[~better, 1] = costs[~better, 0]
    return costs


def _ticks(form: blocks.Form) -> _Bytes:
    """Code of the nearest level for each half step: every midpoint between two levels is a multiple of 1/2."""
    points = np.arange(_TICKS) / 2 - 128 + 0.25
    nearest: _Bytes = np.abs(points[:, None] - form.levels).argmin(axis=1).astype(np.uint8)
    return nearest


@compiled
def _feed_back(
    rows: _Floats,
    codes: _Bytes,
    scales: _Floats,
    offsets: _Floats,
    factor: _Floats,
    columns: npt.NDArray[np.int64],
    sub: int,
    levels: _Floats,
    ticks: _Bytes,
    free: bool,
    costs: npt.NDArray[np.float64],
) -> None:
    """The cost of every row, of `codes` as they are, or as they become if `free`."""
    count, width = rows.shape
    lanes = min(_LANES, (count + 15) // 16 * 16)
    left = np.zeros((width, lanes), dtype=np.float32)  # the weights as they are by now, a column per row of the array
    chosen = np.zeros((width, lanes), dtype=np.uint8)
    errors = np.zeros((_LAZY, lanes), dtype=np.float32)
    scale = np.zeros((scales.shape[1], lanes), dtype=np.float32)
    offset = np.zeros((scales.shape[1], lanes), dtype=np.float32)
    total = np.zeros(lanes, dtype=np.float64)
    for first in range(0, count, lanes):
        live = min(lanes, count - first)
        for lane in range(live):
            for block in range(scales.shape[1]):
                scale[block, lane] = scales[first + lane, block]
                offset[block, lane] = offsets[first + lane, block]
            for at in range(width):
                left[at, lane] = rows[first + lane, columns[at]]
                chosen[at, lane] = codes[first + lane, columns[at]]
        _sweep(left, chosen, scale, offset, factor, columns, sub, levels, ticks, errors, total, free)
        for lane in range(live):
            costs[first + lane] = total[lane]
            if free:
                for at in range(width):
                    codes[first + lane, columns[at]] = chosen[at, lane]


@compiled
def _sweep(
    left: _Floats,
    chosen: _Bytes,
    scale: _Floats,
    offset: _Floats,
    factor: _Floats,
    columns: npt.NDArray[np.int64],
    sub: int,
    levels: _Floats,
    ticks: _Bytes,
    errors: _Floats,
    total: npt.NDArray[np.float64],
    free: bool,
) -> None:
    """One pass over all columns of `left` [width, lanes]: rounds if `free`, else takes `chosen`; fills `total`."""
    width, lanes = left.shape
    half, highest = np.float32(2.0), np.float32(_TICKS - 1)
    middle, zero = np.float32(_TICKS // 2), np.float32(0.0)
    total[:] = 0.0
    for start in range(0, width, _LAZY):
        stop = min(start + _LAZY, width)
        for at in range(start, stop):
            block = columns[at] // sub
            diagonal = factor[at, at]
            for lane in range(lanes):
                step, shift = scale[block, lane], offset[block, lane]
                if free and step != zero:
                    tick = (left[at, lane] + shift) / step * half + middle
                    tick = min(tick, highest) if tick > zero else zero  # NaN, of a damaged scale, becomes 0
                    chosen[at, lane] = ticks[int(tick)]
                value = step * levels[chosen[at, lane]] - shift
                error = (left[at, lane] - value) / diagonal
                errors[at - start, lane] = error
                total[lane] += np.float64(error) * np.float64(error)
            for later in range(at + 1, stop):
                weight = factor[at, later]
                for lane in range(lanes):
                    left[later, lane] -= weight * errors[at - start, lane]
        for later in range(stop, width):
            for at in range(start, stop):
                weight = factor[at, later]
                for lane in range(lanes):
                    left[later, lane] -= weight * errors[at - start, lane]


@compiled
def _polish(
    rows: _Floats,
    codes: _Bytes,
    scales: _Floats,
    offsets: _Floats,
    moments: _Floats,
    damping: np.float32,
    columns: npt.NDArray[np.int64],
    sub: int,
    levels: _Floats,
    ticks: _Bytes,
    passes: int,
    costs: npt.NDArray[np.float64],
) -> None:
    """Coordinate descent on `codes`; takes what it saves off `costs`.

    With g = d H, moving weight c by m changes the cost by m (2 g_c + m H_cc): the best m is -g_c / H_cc, or near it.
    """
    count, width = rows.shape
    half, highest = np.float32(2.0), np.float32(_TICKS - 1)
    middle, zero = np.float32(_TICKS // 2), np.float32(0.0)
    gradient = np.zeros((_PANEL, width), dtype=np.float32)
    for first in range(0, count, _PANEL):
        live = min(_PANEL, count - first)
        gradient[:] = zero
        for c in range(width):
            for lane in range(live):
                row = first + lane
                step, shift = scales[row, c // sub], offsets[row, c // sub]
                error = step * levels[codes[row, c]] - shift - rows[row, c]
                gradient[lane, c] += damping * error
                for j in range(width):
                    gradient[lane, j] += error * moments[c, j]
        for _ in range(passes):
            for at in range(width):
                c = columns[at]
                diagonal = moments[c, c] + damping
                for lane in range(live):
                    row = first + lane
                    step, shift = scales[row, c // sub], offsets[row, c // sub]
                    if step == zero or not diagonal > zero:
                        continue
                    now = step * levels[codes[row, c]] - shift
                    tick = (now - gradient[lane, c] / diagonal + shift) / step * half + middle
                    tick = min(tick, highest) if tick > zero else zero
                    code = ticks[int(tick)]
                    move = step * levels[code] - shift - now
                    change = move * (half * gradient[lane, c] + move * diagonal)
                    if change < zero:
                        codes[row, c] = code
                        costs[row] += np.float64(change)
                        gradient[lane, c] += damping * move
                        for j in range(width):
                            gradient[lane, j] += move * moments[c, j]
