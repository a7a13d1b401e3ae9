"""Importance matrices: the files that llama-imatrix writes, read into what the quantizers take.

For every weight matrix the file holds the sum of the squared activations of each input column and how many activations
went into it; the quantizers weigh the error of a column by the mean. Division and special cases as `load_imatrix` of
llama.cpp tools/quantize/quantize.cpp, the format as in common/imatrix-loader.cpp (GGUF files only).
Knows nothing of types or of how the values were gathered.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, StorageError, UsageError
from edgepack.gguf.file import GgufFile, TensorEntry, read_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_REQUIRED = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_READ_BYTES = 1 << 20
_HINT = "llama-imatrix writes one. An old .dat file converts with: llama-imatrix --in-file old.dat -o new.gguf"


@dataclass(frozen=True)
class Imatrix:
    """Importance of every input column of every weight matrix.

    Args:
        values: GGUF tensor name -> float32 [experts * width], the mean square of each input column (experts = 1 for an
            ordinary matrix); ones for an expert that saw no token, as llama-quantize has it.
        sha256: Of the file: what a package records, since names and paths say little.
        datasets: Names of the calibration texts, as llama-imatrix was given them.
        chunks: Windows of text that went in.
    """

    values: Mapping[str, npt.NDArray[np.float32]]
    sha256: str
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def of(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
        """Values of one tensor as float32 [experts, width]; None where there are none or of another size."""
        values = self.values.get(name)
        experts, width = math.prod(shape[:-2]), shape[-1]
        if values is None or values.size != experts * width:
            return None
        return values.reshape(experts, width)


def read_imatrix(path: Path) -> Imatrix:
    """Read a GGUF file of llama-imatrix.

    Args:
        path: The file; a legacy `.dat` is refused.

    Raises:
        InputRefused: Not a GGUF, not an importance matrix, sums without counts, values negative or not finite.
        StorageError: The file can't be read.
        UsageError: There is no such file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such importance matrix", hint=_HINT)
    file = read_gguf(path)
    missing = [key for key in _REQUIRED if key not in file.metadata]
    if missing or file.get("general.type", "imatrix") != "imatrix":
        what = f"no {missing[0]}" if missing else f"general.type is {file.get('general.type')!r}"
        raise InputRefused(f"{path}: not an importance matrix ({what})", hint=_HINT)
    try:
        with path.open("rb") as stream:
            values = {name: _mean(file, name, stream.fileno()) for name in _names(file)}
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: can't be read: {error.strerror}") from error
    chunks = file.get("imatrix.chunk_count")
    return Imatrix(values, digest, tuple(map(str, file.get("imatrix.datasets"))), int(chunks))


def _names(file: GgufFile) -> list[str]:
    """Tensors that have both sums and counts; half a pair is a damaged file."""
    sums = {name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)}
    counts = {name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)}
    if sums != counts:
        raise InputRefused(f"{file.path}: {min(sums ^ counts)} has sums or counts, expected both")
    if not sums:
        raise InputRefused(f"{file.path}: no importance values in it", hint=_HINT)
    return sorted(sums)


def _mean(file: GgufFile, name: str, descriptor: int) -> npt.NDArray[np.float32]:
    """Mean square per input column, flat over experts."""
    sums = _read(file, file.tensors[name + _SUMS], descriptor)
    counts = np.floor(_read(file, file.tensors[name + _COUNTS], descriptor) + np.float32(0.5))
    if sums.size % counts.size:
        raise InputRefused(f"{file.path}: {name} has {sums.size} sums for {counts.size} counts, expected a multiple")
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and sums.min() >= 0):
        raise InputRefused(f"{file.path}: {name} has sums of squares that are negative or not finite")
    columns = sums.reshape(counts.size, -1)
    seen = counts[:, None] > 0
    mean = np.where(seen, columns / np.where(seen, counts[:, None], np.float32(1)), np.float32(1))
    return np.ascontiguousarray(mean.reshape(-1), dtype=np.float32)


def _read(file: GgufFile, entry: TensorEntry, descriptor: int) -> npt.NDArray[np.float32]:
    if entry.type.name != "F32":
        raise InputRefused(f"{file.path}: {entry.name} is {entry.type.name}, expected F32")
    start = file.data_offset + entry.offset
    data = bytearray()
    while len(data) < entry.nbytes:
        piece = os.pread(descriptor, min(_READ_BYTES, entry.nbytes - len(data)), start + len(data))
        if not piece:
            raise InputRefused(f"{file.path}: ends inside {entry.name}")
        data += piece
    return np.frombuffer(bytes(data), dtype="<f4")
