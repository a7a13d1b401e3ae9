"""The range of an activation for static quantization, from what calibration data gave.

`minmax`: all of it. `percentile`: 99.999 % of the values on both sides; a few outliers are cut so that the others get
finer steps. `entropy`: the symmetric range whose 8-bit histogram diverges least from the true one (onnxruntime's
implementation). Arrays in, numbers out.

Sources: NVIDIA's calibrators as of TensorRT 7 (S. Migacz, GTC 2017); onnxruntime.quantization.calibrate.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from edgepack.onnx.integers import Floats

PERCENTILE = 99.999  # onnxruntime's default
# Of the histogram, and of 8 bits. onnxruntime's own default of 128 bins leaves one range to choose from: all of it.
_BINS, _LEVELS = 2048, 128


def find_range(samples: Sequence[Floats], how: str) -> tuple[np.float32, np.float32]:
    """Lowest and highest value to represent.

    Args:
        samples: What was seen; any shapes.
        how: `minmax`, `percentile` or `entropy`.
    """
    values = np.concatenate([sample.reshape(-1) for sample in samples])
    if how == "percentile":
        low, high = np.quantile(values, [1 - PERCENTILE / 100, PERCENTILE / 100])
        return np.float32(min(low, 0)), np.float32(max(high, 0))
    low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
    if how == "entropy" and low < high:
        from onnxruntime.quantization.calibrate import HistogramCollector

        collector = HistogramCollector("entropy", False, _BINS, _LEVELS, PERCENTILE, "same")
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
            collector.collect({"x": values})
            found = collector.compute_collection_result()["x"]
        low, high = max(low, np.float32(found[0])), min(high, np.float32(found[1]))
    return np.float32(low), np.float32(high)
