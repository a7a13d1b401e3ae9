"""Copies of GGUF files in which only integer codes (and norms) are others.

Everything else is the same byte: header, scales, offsets, tensors that are not named. The copy is read again and held
against the original before it counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack import files
from edgepack.errors import StepError
from edgepack.files import storage_errors
from edgepack.gguf import blocks
from edgepack.gguf.file import GgufFile, TensorEntry, read_gguf, read_gguf_shards

_Bytes = npt.NDArray[np.uint8]
Codes = Mapping[str, Callable[[], _Bytes]]
Norms = Mapping[str, npt.NDArray[np.float32]]


def tensor_data(file: GgufFile, entry: TensorEntry) -> _Bytes:
    """The bytes of a tensor, uint8 `[rows, row_bytes]`."""
    with storage_errors(file.path):
        data = np.fromfile(file.path, np.uint8, entry.nbytes, offset=file.data_offset + entry.offset)
    rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
    return data.reshape(rows, -1)


def rewritten(artifact: Path, folder: Path, codes: Codes, norms: Norms) -> list[str]:
    """Copy an artifact into a folder with other codes and norms.

    Args:
        artifact: The GGUF, or one of its shards.
        folder: Where the copies go, under the same names.
        codes: Tensor of a scalar type -> a function that gives its codes, uint8 `[rows, width]`.
        norms: F32 tensor -> its values.

    Returns:
        File names, in order.

    Raises:
        StepError: What was written is not what was meant.
        StorageError: The file system refused.
    """
    written = []
    for file in read_gguf_shards(artifact):
        copy = folder / file.path.name
        files.copy(file.path, copy)
        with storage_errors(copy):
            descriptor = os.open(copy, os.O_WRONLY)
            try:
                for name, entry in file.tensors.items():
                    if name in codes or name in norms:
                        data = _recoded(file, entry, codes, norms)
                        _write(descriptor, data, file.data_offset + entry.offset)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _check(file, read_gguf(copy), codes, norms)
        written.append(copy.name)
    return written


def _recoded(file: GgufFile, entry: TensorEntry, codes: Codes, norms: Norms) -> _Bytes:
    if entry.name in norms:
        return np.ascontiguousarray(norms[entry.name], dtype="<f4").view(np.uint8)
    grid = blocks.unpack(tensor_data(file, entry), entry.type, entry.shape[-1])
    return blocks.pack(blocks.Grid(codes[entry.name](), grid.scales, grid.offsets, grid.frame), entry.type)


def _write(descriptor: int, data: _Bytes, offset: int) -> None:
    left = memoryview(data.tobytes())
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def _check(before: GgufFile, after: GgufFile, codes: Codes, norms: Norms) -> None:
    """Read the copy: other codes where they were meant, and nothing else."""
    with before.path.open("rb") as first, after.path.open("rb") as second:
        same = first.read(before.data_offset) == second.read(before.data_offset)
    for name, entry in before.tensors.items():
        old, new = tensor_data(before, entry), tensor_data(after, after.tensors[name])
        if name in codes:
            was, found = (blocks.unpack(data, entry.type, entry.shape[-1]) for data in (old, new))
            same = same and np.array_equal(was.frame, found.frame) and np.array_equal(found.codes, codes[name]())
        elif name in norms:
            same = same and np.array_equal(new.reshape(-1).view("<f4"), norms[name].reshape(-1))
        else:
            same = same and np.array_equal(old, new)
        if not same:
            raise StepError(f"{after.path.name}: {name} was read back with other values than were written")
