"""Search of scales, offsets and codes for the types with both: Q2_K, Q4_K, Q5_K.

A superblock of 256 weights has sub-blocks of 16 or 32; weight = (d * scale) * code - (dmin * offset), with small
integers for scale, offset and code. Minimised is the sum of w (weight - x)^2 with ggml's own w. Steps:

1. Each sub-block by itself: codes for a range of step widths around (max - min) / highest, the best scale and offset
   for each by weighted least squares (as `make_qkx3_quants` of llama.cpp ggml/src/ggml-quants.c).
2. d and dmin: the divisors of those scales and offsets that let them be rounded to integers at the least loss, each
   weighted by how much its sub-block suffers.
3. A few rounds of: every sub-block tries its neighbours in integer scale and offset with codes rounded anew; then d and
   dmin are fitted to the codes by least squares. The best that was ever seen is kept.

Sub-blocks of 8 superblocks are searched at once, one per lane of the arrays `[weight in sub-block, sub-block]`; every
sum runs over the first index in order, so the result is the same for any vector width and any grouping.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgepack.gguf.jit import compiled

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

_GROUP = 8  # superblocks at once: 64 or 128 lanes, 16 KB each of weights and importance
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest integer
_ZERO, _ONE, _HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)


@compiled
def encode(
    rows: _Floats,
    weights: _Floats,
    sub: int,
    highest: int,
    top: int,
    trials: _Floats,
    rounds: int,
    codes: _Bytes,
    scales: _Bytes,
    offsets: _Bytes,
    d: _Floats,
    dmin: _Floats,
) -> None:
    """Search all superblocks; fills the last five arguments.

    Args:
        rows: float32 [blocks, 256], the superblocks.
        weights: float32 [blocks, 256], what squared errors are multiplied by; at least 0.
        sub: Weights per sub-block.
        highest: Largest code.
        top: Largest integer scale and offset.
        trials: Step widths to try are (max - min) / (highest + trial).
        rounds: Rounds of step 3.
        codes: uint8 [blocks, 256].
        scales: uint8 [blocks, 256 / sub].
        offsets: uint8 [blocks, 256 / sub].
        d: float32 [blocks], values that float16 holds; infinite where the search overflowed.
        dmin: float32 [blocks], likewise.
    """
    count = len(rows)
    subs = 256 // sub
    lanes = _GROUP * subs
    x = np.zeros((sub, lanes), dtype=np.float32)
    w = np.zeros((sub, lanes), dtype=np.float32)
    low = np.zeros(lanes, dtype=np.float32)
    span = np.zeros(lanes, dtype=np.float32)
    best = np.zeros((6, lanes), dtype=np.float32)
    sums = np.zeros((6, lanes), dtype=np.float32)
    trial_scale = np.zeros(lanes, dtype=np.float32)
    for first in range(0, count, _GROUP):
        live = min(_GROUP, count - first)
        for block in range(live):
            for part in range(subs):
                lane = block * subs + part
                for i in range(sub):
                    x[i, lane] = rows[first + block, part * sub + i]
                    w[i, lane] = weights[first + block, part * sub + i]
        _start(x, w, low, span, best)
        for trial in trials:
            for lane in range(lanes):
                trial_scale[lane] = (np.float32(highest) + trial) / span[lane] if span[lane] > _ZERO else _ZERO
            _sums(x, w, low, trial_scale, np.float32(highest), sums)
            _keep(low, sums, best)
        _integers(x, w, best, live, subs, highest, top, rounds, first, codes, scales, offsets, d, dmin)


@compiled
def _start(x: _Floats, w: _Floats, low: _Floats, span: _Floats, best: _Floats) -> None:
    """Range of every lane, and the best constant for it.

    Rows of `best`: error less the sum of w y^2, scale, offset, then sums of w l^2, w, w y, where y = x - low.
    """
    low[:] = _ZERO
    span[:] = np.float32(-np.inf)
    best[:] = _ZERO
    for i in range(x.shape[0]):
        for lane in range(x.shape[1]):
            low[lane] = min(low[lane], x[i, lane])
            span[lane] = max(span[lane], x[i, lane])
    for i in range(x.shape[0]):
        for lane in range(x.shape[1]):
            best[4, lane] += w[i, lane]
            best[5, lane] += w[i, lane] * (x[i, lane] - low[lane])
    for lane in range(x.shape[1]):
        span[lane] -= low[lane]
        base = min(best[5, lane] / best[4, lane], -low[lane]) if best[4, lane] > _ZERO else _ZERO
        best[0, lane] = base * (base * best[4, lane] - best[5, lane] - best[5, lane])
        best[2, lane] = -(low[lane] + base)


@compiled
def _sums(x: _Floats, w: _Floats, low: _Floats, inverse: _Floats, highest: np.float32, sums: _Floats) -> None:
    """Weighted sums of l, l^2 and l y for codes l = round(y * inverse), y = x - low."""
    sums[:] = _ZERO
    for i in range(x.shape[0]):
        for lane in range(x.shape[1]):
            y = x[i, lane] - low[lane]
            code = (y * inverse[lane] + _ROUND) - _ROUND
            code = min(max(code, _ZERO), highest)
            weighted = w[i, lane] * code
            sums[0, lane] += weighted
            sums[1, lane] += weighted * code
            sums[2, lane] += weighted * y


@compiled
def _keep(low: _Floats, sums: _Floats, best: _Floats) -> None:
    """Solve for scale and offset of every lane; keep them where the error is the least so far."""
    for lane in range(low.size):
        l1, l2, ly, total, y1 = sums[0, lane], sums[1, lane], sums[2, lane], best[4, lane], best[5, lane]
        determinant = total * l2 - l1 * l1
        solved = determinant > np.float32(1e-5) * total * l2  # else noise: all codes are alike
        inverse = _ONE / (determinant if solved else _ONE)
        scale, base = (total * ly - y1 * l1) * inverse, (l2 * y1 - l1 * ly) * inverse
        most = -low[lane]  # offsets are not negative
        clipped = (ly - most * l1) / (l2 if l2 > _ZERO else _ONE)
        scale, base = (clipped, most) if base > most or not solved else (scale, base)
        error = scale * (scale * l2 - ly - ly) + base * (base * total + (scale * l1 - y1) + (scale * l1 - y1))
        better = error < best[0, lane] and scale > _ZERO
        best[0, lane] = error if better else best[0, lane]
        best[1, lane] = scale if better else best[1, lane]
        best[2, lane] = most - base if better else best[2, lane]
        best[3, lane] = l2 if better else best[3, lane]


@compiled
def half(value: np.float32) -> np.float32:
    """Rounded to what a float16 holds; it is far from its largest."""
    if abs(value) < np.float32(2.0**-14):  # subnormal: multiples of 2^-24
        return ((value * np.float32(2.0**24) + _ROUND) - _ROUND) * np.float32(2.0**-24)
    split = value * np.float32(8193.0)  # Veltkamp's split: 2^13 + 1 leaves 11 bits
    return split - (split - value)


@compiled
def _divisor(values: _Floats, weights: _Floats, top: int) -> np.float32:
    """The step, one that float16 holds, to round `values` to 0 .. top with at the least weighted squared error."""
    largest = values.max()
    if not largest > _ZERO:
        return _ZERO
    inverse = np.empty(16, dtype=np.float32)
    products, squares = np.zeros(16, dtype=np.float32), np.zeros(16, dtype=np.float32)
    for k in range(16):
        inverse[k] = (np.float32(top) + np.float32(0.25) - _HALF * np.float32(k)) / largest
    for j in range(values.size):
        for k in range(16):
            code = min((values[j] * inverse[k] + _ROUND) - _ROUND, np.float32(top))
            products[k] += weights[j] * values[j] * code
            squares[k] += weights[j] * code * code
    steps, errors = np.empty(16, dtype=np.float32), np.zeros(16, dtype=np.float32)
    for k in range(16):
        steps[k] = half(products[k] / squares[k]) if squares[k] > _ZERO else _ZERO
    for j in range(values.size):
        for k in range(16):
            code = min((values[j] * inverse[k] + _ROUND) - _ROUND, np.float32(top))
            difference = values[j] - steps[k] * code
            errors[k] += weights[j] * difference * difference
    best: np.float32 = steps[errors.argmin()]
    return best


@compiled
def _errors(
    x: _Floats, w: _Floats, scale: _Floats, offset: _Floats, inverse: _Floats, highest: np.float32, errors: _Floats
) -> None:
    """Weighted squared error of every lane, codes rounded anew."""
    errors[:] = _ZERO
    for i in range(x.shape[0]):
        for lane in range(x.shape[1]):
            code = ((x[i, lane] + offset[lane]) * inverse[lane] + _ROUND) - _ROUND
            code = min(max(code, _ZERO), highest)
            difference = scale[lane] * code - offset[lane] - x[i, lane]
            errors[lane] += w[i, lane] * difference * difference


@compiled
def _neighbours(
    x: _Floats,
    w: _Floats,
    step: _Floats,
    base: _Floats,
    scales: _Floats,
    offsets: _Floats,
    highest: np.float32,
    top: np.float32,
    errors: _Floats,
    scratch: _Floats,
) -> None:
    """Move integer scale and offset of every lane to the best of the nine around it; `errors` of that choice."""
    lanes = x.shape[1]
    scale, offset, inverse, error = scratch[0], scratch[1], scratch[2], scratch[3]
    was, was_offset = scratch[4], scratch[5]
    was[:] = scales
    was_offset[:] = offsets
    errors[:] = np.float32(np.inf)
    for up in range(-1, 2):
        for out in range(-1, 2):
            for lane in range(lanes):
                scale[lane] = step[lane] * min(max(was[lane] + np.float32(up), _ZERO), top)
                offset[lane] = base[lane] * min(max(was_offset[lane] + np.float32(out), _ZERO), top)
                inverse[lane] = _ONE / scale[lane] if scale[lane] > _ZERO else _ZERO
            _errors(x, w, scale, offset, inverse, highest, error)
            for lane in range(lanes):
                if error[lane] < errors[lane]:
                    errors[lane] = error[lane]
                    scales[lane] = min(max(was[lane] + np.float32(up), _ZERO), top)
                    offsets[lane] = min(max(was_offset[lane] + np.float32(out), _ZERO), top)


@compiled
def _fit(
    x: _Floats,
    w: _Floats,
    step: _Floats,
    base: _Floats,
    scales: _Floats,
    offsets: _Floats,
    highest: np.float32,
    sums: _Floats,
    subs: int,
) -> None:
    """Least squares for d and dmin of each superblock, its codes and integers given; into `step` and `base`."""
    lanes = x.shape[1]
    sums[:] = _ZERO
    inverse, l1, l2, lx, x1, total = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]
    for lane in range(lanes):
        scale = step[lane] * scales[lane]
        inverse[lane] = _ONE / scale if scale > _ZERO else _ZERO
    for i in range(x.shape[0]):
        for lane in range(lanes):
            code = ((x[i, lane] + base[lane] * offsets[lane]) * inverse[lane] + _ROUND) - _ROUND
            code = min(max(code, _ZERO), highest)
            weighted = w[i, lane] * code
            l1[lane] += weighted
            l2[lane] += weighted * code
            lx[lane] += weighted * x[i, lane]
            x1[lane] += w[i, lane] * x[i, lane]
            total[lane] += w[i, lane]
    for first in range(0, lanes, subs):
        # Minimise over d, m: sum of w (d s l - m o - x)^2 with integers s, o of each sub-block.
        ss, so, oo, sx, ox = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for lane in range(first, first + subs):
            s, o = scales[lane], offsets[lane]
            ss += s * s * l2[lane]
            so += s * o * l1[lane]
            oo += o * o * total[lane]
            sx += s * lx[lane]
            ox += o * x1[lane]
        determinant = ss * oo - so * so
        d, m = step[first], base[first]
        if determinant > _ZERO:
            d, m = half((sx * oo - ox * so) / determinant), half((sx * so - ox * ss) / determinant)
        elif ss > _ZERO:
            d = half(sx / ss)
        if d > _ZERO and m >= _ZERO:
            step[first : first + subs] = d
            base[first : first + subs] = m


@compiled
def _integers(
    x: _Floats,
    w: _Floats,
    best: _Floats,
    live: int,
    subs: int,
    highest: int,
    top: int,
    rounds: int,
    first: int,
    codes: _Bytes,
    scales: _Bytes,
    offsets: _Bytes,
    d: _Floats,
    dmin: _Floats,
) -> None:
    """Steps 2 and 3 for a group of superblocks; writes the result of the first `live`."""
    lanes = x.shape[1]
    most = np.float32(top)
    made = np.zeros((9, lanes), dtype=np.float32)
    step, base, error, s, o = made[0], made[1], made[2], made[3], made[4]
    kept_step, kept_base, kept_s, kept_o = made[5], made[6], made[7], made[8]
    kept = np.full(lanes // subs, np.inf, dtype=np.float32)
    scratch = np.zeros((6, lanes), dtype=np.float32)
    kept_step[:] = np.inf  # stays where numbers overflow, and is refused with the row
    for lane in range(0, lanes, subs):
        step[lane : lane + subs] = _divisor(best[1, lane : lane + subs], best[3, lane : lane + subs], top)
        base[lane : lane + subs] = _divisor(best[2, lane : lane + subs], best[4, lane : lane + subs], top)
    for lane in range(lanes):
        s[lane] = min((best[1, lane] / step[lane] + _ROUND) - _ROUND, most) if step[lane] > _ZERO else _ZERO
        o[lane] = min((best[2, lane] / base[lane] + _ROUND) - _ROUND, most) if base[lane] > _ZERO else _ZERO
    for turn in range(rounds):
        if turn:
            _fit(x, w, step, base, s, o, np.float32(highest), scratch, subs)
        _neighbours(x, w, step, base, s, o, np.float32(highest), most, error, scratch)
        for block in range(live):
            part = slice(block * subs, (block + 1) * subs)
            total = error[part].sum()
            if total < kept[block]:
                kept[block] = total
                kept_step[part], kept_base[part], kept_s[part], kept_o[part] = step[part], base[part], s[part], o[part]
    for lane in range(live * subs):
        at, place = first + lane // subs, lane % subs
        scale, offset = kept_step[lane] * kept_s[lane], kept_base[lane] * kept_o[lane]
        inverse = _ONE / scale if scale > _ZERO else _ZERO
        for i in range(x.shape[0]):
            code = ((x[i, lane] + offset) * inverse + _ROUND) - _ROUND
            code = min(code, np.float32(highest)) if code > _ZERO else _ZERO  # NaN too
            codes[at, place * x.shape[0] + i] = np.uint8(code)
        scales[at, place], offsets[at, place] = np.uint8(kept_s[lane]), np.uint8(kept_o[lane])
        d[at], dmin[at] = kept_step[lane], kept_base[lane]
