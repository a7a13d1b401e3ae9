"""Choose factors that spread an activation's outliers over the weights, by the error they leave on calibration data.

    y = (x / f) (f w),    f_c = max|x_c|^a / max|w_c|^(1-a)

A transformer's activations have a few channels many times larger than the rest; a scale per tensor then leaves the rest
two or three bits. Dividing channel c by f_c costs nothing but rounding. The exponent a is the one with the least
squared error of the quantized product on samples that the peaks were not taken from; 0 means no factors. (On the same
samples the largest exponents win: they flatten every peak that was seen, and blow up those that were not. In
all-MiniLM-L6-v2 that costs 0.006 of the cosine's 1 % quantile.)

Source: SmoothQuant (Xiao et al. 2023, arXiv:2211.10438), equation 4, there with one exponent (0.5) for all layers; the
search per layer is that of AWQ (Lin et al. 2024, arXiv:2306.00978), equation 5. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgepack.onnx.integers import Floats, by_output

EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_OUTPUTS = 256  # columns on which the error is computed: evenly spread, enough for a sum over all of them
_ROWS = 512  # tokens, likewise
# Factors are rounded to eighths of an octave, so that another processor's last bits don't change the weights' bytes.
_STEPS = 8
_GAIN = 0.9  # factors must leave at most this part of the error: they cost a multiplication
_LEAST = 1e-4  # of a channel's largest magnitude, relative to the largest of all


@dataclass(frozen=True)
class Smoothing:
    """What was chosen for a unit.

    Args:
        factor: [inputs], or None where none helps enough.
        exponent: 0 for None.
        error: Squared error of the quantized product relative to the product, with the factors.
        plain_error: The same without.
    """

    factor: Floats | None
    exponent: float
    error: float
    plain_error: float


def choose_factor(samples: Sequence[Floats], weight: Floats, *, pair_safe: bool) -> Smoothing:
    """Find the factors of one unit.

    Args:
        samples: Activations, each [tokens, inputs]: one per sentence, because a scale is shared within a sentence.
        weight: [inputs, outputs], all matrices of the unit side by side.
        pair_safe: As the weights will be quantized.
    """
    peaks, seen = _peaks(samples), _peaks(samples[1::2] or samples)
    samples = _some(samples[::2])
    rows = np.abs(weight).max(axis=1)
    columns = np.ascontiguousarray(weight[:, :: max(1, weight.shape[1] // _OUTPUTS)])
    exact = np.concatenate(samples) @ columns
    power = float(np.square(exact, dtype=np.float64).sum()) or 1.0
    plain = _error(samples, exact, columns, None, pair_safe) / power
    best = Smoothing(None, 0.0, plain, plain)
    if peaks.max() == 0 or rows.max() == 0:
        return best
    for exponent in EXPONENTS:
        error = _error(samples, exact, columns, _factor(seen, rows, exponent), pair_safe) / power
        if error < min(best.error, _GAIN * plain):
            best = Smoothing(_factor(peaks, rows, exponent), exponent, error, plain)
    return best


def _factor(peaks: Floats, rows: Floats, exponent: float) -> Floats:
    """Factors with a geometric mean of about 1."""
    peaks, rows = np.maximum(peaks, _LEAST * peaks.max()), np.maximum(rows, _LEAST * rows.max())
    octaves = exponent * np.log2(peaks) - (1 - exponent) * np.log2(rows)
    rounded: Floats = np.exp2(np.rint(_STEPS * (octaves - octaves.mean())) / _STEPS).astype(np.float32)
    return rounded


def _peaks(samples: Sequence[Floats]) -> Floats:
    """Largest magnitude of each channel."""
    peaks: Floats = np.max([np.abs(sample).max(axis=0) for sample in samples], axis=0)
    return peaks


def dynamic_range(sample: Floats) -> Floats:
    """What DynamicQuantizeLinear keeps of an activation: quantized to 8 bits and back (onnx, DynamicQuantizeLinear)."""
    low, high = min(float(sample.min()), 0.0), max(float(sample.max()), 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    kept: Floats = ((np.clip(np.rint(sample / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)
    return kept


def _error(samples: Sequence[Floats], exact: Floats, weight: Floats, factor: Floats | None, pair_safe: bool) -> float:
    """Sum of squared differences between the quantized product and the exact one."""
    integers, scale = by_output(weight if factor is None else weight * factor[:, None], pair_safe=pair_safe)
    kept = [dynamic_range(sample if factor is None else sample / factor) for sample in samples]
    return float(np.square(np.concatenate(kept) @ (integers * scale) - exact, dtype=np.float64).sum())


def _some(samples: Sequence[Floats]) -> list[Floats]:
    """The first samples, up to `_ROWS` tokens."""
    chosen: list[Floats] = []
    for sample in samples:
        chosen.append(sample)
        if sum(len(one) for one in chosen) >= _ROWS:
            break
    return chosen
