"""The encoder of calibrated builds: ggml's scales, edgepack's rounding.

Tensors that have calibration statistics and a type of single weights are written with column feedback (`feedback.py`),
row by row never worse by d H d^T than ggml's own bytes. Everything else is ggml's.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from edgepack.calibrate.moments import Moments
from edgepack.figures import significant
from edgepack.gguf.blocks import SCALAR
from edgepack.gguf.feedback import quantize_rows_with_feedback
from edgepack.gguf.types import GgmlType


class FeedbackEncoder:
    """An `Encoder` of `stream.py`.

    Args:
        moments: Calibration statistics of the same model.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._errors: dict[str, npt.NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))
        self._lock = threading.Lock()

    def takes(self, name: str, kind: GgmlType) -> bool:
        """Whether the tensor has statistics and the type codes of single weights."""
        return name in self._moments and kind.name in SCALAR

    def quantize(self, name: str, rows: npt.NDArray[np.float32], kind: GgmlType, out: npt.NDArray[np.uint8]) -> None:
        """Quantize whole rows `[n, width]` into `out`."""
        known = self._moments.feedback(name)
        found = quantize_rows_with_feedback(
            np.ascontiguousarray(rows), kind, out, self._moments.importance(name), known.factor, known.order,
            moments=known.moments, damping=known.damping,
        )  # fmt: skip
        with self._lock:
            self._errors[name] += found.sum(axis=0)

    def saved(self) -> dict[str, float]:
        """Tensor -> its d H d^T over that of ggml's bytes."""
        return {
            name: significant(after / before, 3) if before > 0 else 1.0
            for name, (before, after) in sorted(self._errors.items())
        }
