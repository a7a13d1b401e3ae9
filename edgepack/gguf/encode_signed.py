"""Search of scales and codes for the types without offsets: Q3_K, Q6_K, IQ4_XS, and Q4_0, IQ4_NL with one scale each.

A superblock of 256 weights has sub-blocks of 16 or 32; weight = (d * scale) * level, with a small signed integer for
the scale and one of 8 to 64 levels. Minimised is the sum of w (weight - x)^2 with ggml's own w. Steps:

1. Each sub-block by itself: levels for a range of step widths that bring its largest weight near the lowest level (the
   levels reach further below zero than above) or the highest, the best scale for each by weighted least squares (as
   `make_qx_quants` and `quantize_row_iq4_nl_impl` of llama.cpp ggml/src/ggml-quants.c).
2. d: the divisor of those scales that lets them be rounded to integers at the least loss.
3. A few rounds of: every sub-block tries its neighbours in integer scale with levels rounded anew; then d is fitted to
   the levels by least squares. The best that was ever seen is kept.

128 sub-blocks are searched at once, one per lane of the arrays `[weight in sub-block, sub-block]`; every sum runs over
the first index in order, so the result is the same for any vector width and any grouping.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgepack.gguf import blocks
from edgepack.gguf.encode_offset import half
from edgepack.gguf.jit import compiled

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

_LANES = 128
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest integer
_LEVELS = tuple(blocks.FORMS["IQ4_NL"].levels)
_GAPS = tuple(b - a for a, b in pairwise(_LEVELS))
_MIDDLES = tuple((a + b) * np.float32(0.5) for a, b in pairwise(_LEVELS))
_ZERO, _ONE, _HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)


@compiled
def encode(
    rows: _Floats,
    weights: _Floats,
    sub: int,
    levels: _Floats,
    even: bool,
    top: int,
    trials: _Floats,
    rounds: int,
    codes: _Floats,
    scales: npt.NDArray[np.int8],
    d: _Floats,
) -> None:
    """Search all superblocks; fills the last three arguments.

    Args:
        rows: float32 [blocks, block], the superblocks.
        weights: float32 [blocks, block], what squared errors are multiplied by; at least 0.
        sub: Weights per sub-block.
        levels: Lowest and highest level.
        even: All integers between are levels; else the levels are those of IQ4_NL.
        top: Integer scales are -top .. top - 1; 1: there are none, d alone is the scale.
        trials: Step widths to try are largest / (lowest level + trial).
        rounds: Rounds of step 3.
        codes: float32 [blocks, block]: the levels chosen.
        scales: int8 [blocks, block / sub].
        d: float32 [blocks], values that float16 holds; infinite where the search overflowed.
    """
    count, block = rows.shape
    subs = block // sub
    group = _LANES // subs
    x = np.zeros((sub, _LANES), dtype=np.float32)
    w = np.zeros((sub, _LANES), dtype=np.float32)
    made = np.zeros((8, _LANES), dtype=np.float32)
    largest, inverse, products, squares = made[0], made[1], made[2], made[3]
    score, scale, weight = made[4], made[5], made[6]
    for first in range(0, count, group):
        live = min(group, count - first)
        for at in range(live):
            for part in range(subs):
                for i in range(sub):
                    x[i, at * subs + part] = rows[first + at, part * sub + i]
                    w[i, at * subs + part] = weights[first + at, part * sub + i]
        largest[:] = _ZERO
        for i in range(sub):
            for lane in range(_LANES):
                value = x[i, lane]
                largest[lane] = value if abs(value) > abs(largest[lane]) else largest[lane]
        score[:] = _ZERO
        scale[:] = _ZERO
        weight[:] = _ZERO
        for trial in trials:
            for lane in range(_LANES):
                value = largest[lane]
                inverse[lane] = (levels[0] + trial) / value if value != _ZERO else _ZERO
            _sums(x, w, inverse, levels, even, products, squares)
            for lane in range(_LANES):
                some = squares[lane] > _ZERO
                fitted = products[lane] / (squares[lane] if some else _ONE)
                better = some and fitted * products[lane] > score[lane]
                score[lane] = fitted * products[lane] if better else score[lane]
                scale[lane] = fitted if better else scale[lane]
                weight[lane] = squares[lane] if better else weight[lane]
        _integers(x, w, scale, weight, live, subs, levels, even, top, rounds, first, codes, scales, d)


@compiled
def _level(value: np.float32, lowest: np.float32, highest: np.float32, even: bool) -> np.float32:
    """The level nearest to `value`."""
    if even:
        value = value if value > lowest else lowest  # NaN too
        value = value if value < highest else highest
        return (value + _ROUND) - _ROUND
    level = lowest
    for k in range(len(_GAPS)):  # unrolled: a table look-up would keep the loop around this from being vectorised
        level += _GAPS[k] if value >= _MIDDLES[k] else _ZERO
    return level


@compiled
def _sums(
    x: _Floats, w: _Floats, inverse: _Floats, levels: _Floats, even: bool, products: _Floats, squares: _Floats
) -> None:
    """Weighted sums of q x and q^2 for the levels q nearest to x * inverse."""
    products[:] = _ZERO
    squares[:] = _ZERO
    lowest, highest = levels[0], levels[1]
    for i in range(x.shape[0]):
        for lane in range(x.shape[1]):
            q = _level(x[i, lane] * inverse[lane], lowest, highest, even)
            weighted = w[i, lane] * q
            products[lane] += weighted * x[i, lane]
            squares[lane] += weighted * q


@compiled
def _errors(
    x: _Floats, w: _Floats, scale: _Floats, inverse: _Floats, levels: _Floats, even: bool, errors: _Floats
) -> None:
    """Weighted squared error of every lane, levels rounded anew."""
    errors[:] = _ZERO
    lowest, highest = levels[0], levels[1]
    for i in range(x.shape[0]):
        for lane in range(x.shape[1]):
            difference = scale[lane] * _level(x[i, lane] * inverse[lane], lowest, highest, even) - x[i, lane]
            errors[lane] += w[i, lane] * difference * difference


@compiled
def _divisor(values: _Floats, weights: _Floats, top: int) -> np.float32:
    """The step, one that float16 holds, to round `values` to -top .. top - 1 with at the least weighted error."""
    largest = _ZERO
    for value in values:
        largest = value if abs(value) > abs(largest) else largest
    if largest == _ZERO:
        return _ZERO
    inverse = np.empty(16, dtype=np.float32)
    products, squares = np.zeros(16, dtype=np.float32), np.zeros(16, dtype=np.float32)
    for k in range(16):
        inverse[k] = (_HALF * np.float32(k) - np.float32(0.25) - np.float32(top)) / largest
    for j in range(values.size):
        for k in range(16):
            code = (values[j] * inverse[k] + _ROUND) - _ROUND
            code = min(max(code, np.float32(-top)), np.float32(top - 1))
            products[k] += weights[j] * values[j] * code
            squares[k] += weights[j] * code * code
    steps, errors = np.empty(16, dtype=np.float32), np.zeros(16, dtype=np.float32)
    for k in range(16):
        steps[k] = half(products[k] / squares[k]) if squares[k] > _ZERO else _ZERO
    for j in range(values.size):
        for k in range(16):
            code = (values[j] * inverse[k] + _ROUND) - _ROUND
            code = min(max(code, np.float32(-top)), np.float32(top - 1))
            difference = values[j] - steps[k] * code
            errors[k] += weights[j] * difference * difference
    best: np.float32 = steps[errors.argmin()]
    return best


@compiled
def _invert(step: _Floats, integer: _Floats, scale: _Floats, inverse: _Floats) -> None:
    for lane in range(step.size):
        scale[lane] = step[lane] * integer[lane]
        inverse[lane] = _ONE / scale[lane] if scale[lane] != _ZERO else _ZERO


@compiled
def _integers(
    x: _Floats,
    w: _Floats,
    found: _Floats,
    weight: _Floats,
    live: int,
    subs: int,
    levels: _Floats,
    even: bool,
    top: int,
    rounds: int,
    first: int,
    codes: _Floats,
    scales: npt.NDArray[np.int8],
    d: _Floats,
) -> None:
    """Steps 2 and 3 for a group of superblocks; writes the result of the first `live`."""
    made = np.zeros((10, _LANES), dtype=np.float32)
    step, integer, scale, inverse, error = made[0], made[1], made[2], made[3], made[4]
    tried, least, chosen, kept_step, kept_integer = made[5], made[6], made[7], made[8], made[9]
    kept = np.full(_LANES // subs, np.inf, dtype=np.float32)
    lowest, most = np.float32(-top), np.float32(top - 1)
    kept_step[:] = np.inf  # stays where numbers overflow, and is refused with the row
    for lane in range(0, _LANES, subs):
        part = slice(lane, lane + subs)
        step[part] = half(found[lane]) if top == 1 else _divisor(found[part], weight[part], top)
    for lane in range(_LANES):
        integer[lane] = (found[lane] / step[lane] + _ROUND) - _ROUND if step[lane] != _ZERO else _ZERO
        integer[lane] = _ONE if top == 1 else min(max(integer[lane], lowest), most)
    for turn in range(rounds):
        if turn:
            _invert(step, integer, scale, inverse)
            _sums(x, w, inverse, levels, even, tried, least)
            for lane in range(0, _LANES, subs):
                products, squares = _ZERO, _ZERO
                for other in range(lane, lane + subs):
                    products += integer[other] * tried[other]
                    squares += integer[other] * integer[other] * least[other]
                if squares > _ZERO:
                    step[lane : lane + subs] = half(products / squares)
        least[:] = np.float32(np.inf)
        for change in range(0 if top == 1 else -1, 1 if top == 1 else 2):
            for lane in range(_LANES):
                moved = min(max(integer[lane] + np.float32(change), lowest), most)
                tried[lane] = integer[lane] if top == 1 else moved
            _invert(step, tried, scale, inverse)
            _errors(x, w, scale, inverse, levels, even, error)
            for lane in range(_LANES):
                chosen[lane] = tried[lane] if error[lane] < least[lane] else chosen[lane]
                least[lane] = min(error[lane], least[lane])
        integer[:] = chosen
        for at in range(live):
            part = slice(at * subs, (at + 1) * subs)
            total = least[part].sum()
            if total < kept[at]:
                kept[at] = total
                kept_step[part], kept_integer[part] = step[part], integer[part]
    _invert(kept_step, kept_integer, scale, inverse)
    for lane in range(live * subs):
        block, place = first + lane // subs, lane % subs
        for i in range(x.shape[0]):
            codes[block, place * x.shape[0] + i] = _level(x[i, lane] * inverse[lane], levels[0], levels[1], even)
        scales[block, place] = np.int8(kept_integer[lane])
        d[block] = kept_step[lane]
