"""Calibration statistics on their way into the writer: importance values, and factors for column feedback.

Reads the folder that `edgepack/calibrate/collect.py` fills. A factor (Cholesky, of the inverse of the second moments of
an input) is computed when the first matrix with that input is reached, and dropped for the next ones: matrices with
the same input follow each other in a file, so memory is a few of them whatever the size of the model.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.gguf.imatrix import Imatrix, read_imatrix

Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.int64]

_KEPT_BYTES = 1 << 30  # of factors and moments; one of a width of 14,336 has 822 MB
# Of the mean diagonal of H. More than the paper's 0.01: on text it was not made from, the error of 13 matrices of a 37M
# model was 0.5 to 1 % smaller at 0.1 and another 0.3 to 0.7 % at 0.2 (H of 50 windows; docs/allocation.md).
FEEDBACK_DAMPING = 0.2


@dataclass(frozen=True)
class Feedback:
    """The arguments of `feedback.quantize_rows_with_feedback` that come from calibration.

    Args:
        factor: Upper Cholesky factor of the inverse of damped H, float32 `[width, width]`, in processing order.
        order: Column processed 1st, 2nd, ...
        moments: H, columns as they stand, not damped.
        damping: What was added to its diagonal.
    """

    factor: Floats
    order: Order
    moments: Floats
    damping: float

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.factor.nbytes + self.order.nbytes + self.moments.nbytes)


class Moments:
    """Statistics by GGUF tensor name. Safe to use from several threads.

    Args:
        folder: What `collect` filled.
        report: Its calibration.json.
        imatrix: Its importance matrix.
        gradients: Mean squared gradient by tensor, and `lookups`.
    """

    def __init__(
        self, folder: Path, report: Mapping[str, Any], imatrix: Imatrix, gradients: Mapping[str, Floats]
    ) -> None:
        self.imatrix = imatrix
        self.report = report
        self._folder = folder
        self._gradients = gradients
        self._inputs: Mapping[str, int] = report["inputs"]
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._locks: dict[tuple[str, int], threading.Lock] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._inputs

    @property
    def lookups(self) -> npt.NDArray[np.float64]:
        """Mean squared gradient of every dimension of the embedding's output, `[width]`."""
        return self._gradients["lookups"].astype(np.float64)

    def importance(self, name: str) -> Floats:
        """Mean square of every input column, float32 `[width]`."""
        return self.imatrix.values[name]

    def gradient(self, name: str) -> Floats:
        """Mean squared gradient of every output, float32 `[rows]` in the order of the GGUF."""
        return self._gradients[name]

    def quadratic(self, name: str, error: Floats) -> npt.NDArray[np.float64]:
        """D H d^T of every row of `error` `[rows, width]`."""
        moments: Floats = self._remember(("moments", self._inputs[name]), self._load)
        found: npt.NDArray[np.float64] = np.einsum("ij,ij->i", error @ moments, error, dtype=np.float64)
        return found

    def feedback(self, name: str) -> Feedback:
        """What column feedback needs to know of a tensor's inputs."""
        found: Feedback = self._remember(("feedback", self._inputs[name]), self._feedback)
        return found

    def _load(self, number: int) -> Floats:
        from safetensors.numpy import load_file

        return load_file(self._folder / "moments" / f"{number:04d}.safetensors")["moments"]

    def _feedback(self, number: int) -> Feedback:
        import torch

        from edgepack.calibrate.factor import damping, inverse_factor, processing_order

        kept = self._load(number)
        moments = torch.from_numpy(kept)
        order = processing_order(moments)
        factor = inverse_factor(moments[order][:, order], FEEDBACK_DAMPING).triu().contiguous().numpy()
        return Feedback(factor, np.asarray(order.numpy(), dtype=np.int64), kept, damping(moments, FEEDBACK_DAMPING))

    def _remember(self, key: tuple[str, int], make: Any) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # one thread computes, the others that want the same wait
            with self._lock:
                if key in self._kept:
                    return self._kept[key]
            value = make(key[1])
            with self._lock:
                self._kept[key] = value
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            return value


def open_moments(folder: Path) -> Moments:
    """Open the statistics in a folder.

    Raises:
        InputRefused, StorageError: The importance matrix can't be read.
    """
    from safetensors.numpy import load_file

    report = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    gradients = load_file(folder / "gradients.safetensors")
    return Moments(folder, report, read_imatrix(folder / "imatrix.gguf"), gradients)
