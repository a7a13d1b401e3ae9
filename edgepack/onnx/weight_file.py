"""The file beside an ONNX graph that holds its weights: every tensor at an offset known before the first is written.

The file is allocated in full at the start (a full disk is found at once) and removed on any failure or interrupt.
Tensors are aligned to 64 bytes, a cache line and the widest vector register; onnxruntime maps the file at any offset.
Small tensors stay inside the graph, where shape inference and constant folding find them without opening a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgepack.errors import InputRefused, StorageError
from edgepack.files import storage_errors
from edgepack.onnx.decoder_graph import Stored
from edgepack.onnx.deferred import materialize, not_finite

ALIGNMENT = 64
INLINE_BYTES = 1024  # the limit onnx's own `save_as_external_data` and torch's exporter use


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies; offset None: inside the graph."""

    stored: Stored
    offset: int | None


def lay_out(tensors: Sequence[Stored]) -> tuple[list[Slot], int]:
    """Offsets of all tensors, in their order, and the size of the file."""
    slots, end = [], 0
    for stored in tensors:
        if stored.nbytes <= INLINE_BYTES and stored.values is not None:
            slots.append(Slot(stored, None))
            continue
        start = -(-end // ALIGNMENT) * ALIGNMENT
        slots.append(Slot(stored, start))
        end = start + stored.nbytes
    return slots, end


class WeightFile:
    """An open data file.

    Args:
        path: Must not exist.
        descriptor: Open for writing.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def write(self, values: torch.Tensor, offset: int) -> None:
        """Write a contiguous tensor's bytes."""
        data = _bytes(values)
        with storage_errors(self._path):
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count


@contextlib.contextmanager
def create(path: Path, nbytes: int) -> Iterator[WeightFile]:
    """Make the file, allocated in full; it is gone again if the block raises.

    Raises:
        StorageError: No room, the file exists, or the file system refused.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _allocate(path, descriptor, nbytes)
        yield WeightFile(path, descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _allocate(path: Path, descriptor: int, nbytes: int) -> None:
    if not nbytes:
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            raise StorageError(f"{path}: {nbytes:,} bytes needed, {free:,} free on that disk") from error
        with storage_errors(path):  # a file system without allocation: EINVAL, EOPNOTSUPP
            os.ftruncate(descriptor, nbytes)


def save_graph(proto: Any, slots: Sequence[Slot], path: Path, data_name: str) -> int:
    """Write the graph with its initializers: small ones inside, the others by their place in the data file.

    Args:
        proto: ModelProto without initializers; gets them.
        slots: From `lay_out`.
        path: Of the .onnx file.
        data_name: Plain name of the data file beside it.

    Returns:
        Bytes of the graph file.

    Raises:
        InputRefused: NaN or infinite weights.
    """
    for slot in slots:
        tensor = proto.graph.initializer.add()
        tensor.name, tensor.data_type = slot.stored.name, slot.stored.kind
        tensor.dims.extend(slot.stored.shape)
        if slot.offset is None:
            tensor.raw_data = bytes(_bytes(stored_values(materialize(slot.stored.values), slot.stored)))
            continue
        tensor.data_location = 1  # TensorProto.EXTERNAL
        for key, value in (("location", data_name), ("offset", slot.offset), ("length", slot.stored.nbytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    data = proto.SerializeToString(deterministic=True)
    with storage_errors(path):
        path.write_bytes(data)
    return len(data)


def stored_values(values: torch.Tensor, stored: Stored) -> torch.Tensor:
    """Values in the type an initializer has.

    Raises:
        InputRefused: NaN or infinite ones, with their number.
    """
    wanted = {1: torch.float32, 10: torch.float16}.get(stored.kind)
    if wanted is None:
        return values.detach()
    values = values.detach().to(wanted)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        named = not_finite(stored.values, stored.name)
        raise InputRefused(f"{named}: {bad} weights are NaN or infinite, or too large for the type they are stored in")
    return values


def _bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor, little endian as ONNX wants them (every platform torch runs on is)."""
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
