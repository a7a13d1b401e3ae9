"""Write a GGUF file in one pass: read some rows, quantize them, put them where they belong.

Every tensor is cut into chunks of rows; each worker thread takes the next chunk, reads it (pread, so that mapped pages
never count as memory), checks it, quantizes it with ggml (which releases the interpreter lock) and writes it at its
final offset. No intermediate file; memory is a few chunks per thread whatever the size of the model. Rows are quantized
independently of one another, so the bytes do not depend on the number of threads.

Files are allocated in full before the work starts (a full disk is found at once), their headers are written last (a
file that is not finished is no GGUF), and on any failure or interrupt they are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, StepError, StorageError, UsageError
from edgepack.gguf.file import TensorEntry
from edgepack.gguf.ggml import quantize_rows, valid_rows
from edgepack.gguf.imatrix import Imatrix
from edgepack.gguf.layout import Layout, Shard
from edgepack.gguf.model import ModelSpec, TensorSpec
from edgepack.gguf.types import GgmlType, row_bytes
from edgepack.worker import Progress, no_progress

# Weights per chunk: 1 MB of float32, which stays in a core's second-level cache from reading to quantizing, while the
# interpreter's share (about 0.1 ms a chunk) stays below 1 % of the work.
CHUNK_WEIGHTS = 1 << 18
CHUNK_ROWS = 64  # at least: encoders that look across rows work on so many at once
_PROGRESS_SECONDS = 0.1
# Float types: how a weight is stored, and the exponent bits that are all set in NaN and infinity (IEEE 754; bfloat16).
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


class Encoder(Protocol):
    """Something that quantizes some tensors better than ggml does; see `edgepack/gguf/tuned.py`."""

    def takes(self, name: str, kind: GgmlType) -> bool:
        """Whether it has what it needs for this tensor and type."""

    def quantize(self, name: str, rows: npt.NDArray[np.float32], kind: GgmlType, out: npt.NDArray[np.uint8]) -> None:
        """Quantize whole rows into `out`; rows must not depend on one another. Called from several threads."""


@dataclass(frozen=True)
class Written:
    """What `stream` did.

    Args:
        paths: The files, in order.
        nonfinite: Tensor name -> weights that are NaN or infinite; empty unless they were allowed.
    """

    paths: tuple[Path, ...]
    nonfinite: dict[str, int]


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, stop) of a tensor and the file they go to; `index` counts chunks in file order."""

    index: int
    tensor: TensorSpec
    entry: TensorEntry
    path: Path
    descriptor: int
    data_start: int
    start: int
    stop: int

    @property
    def source_bytes(self) -> int:
        total = _source_bytes(self.tensor)
        return total * self.stop // self.tensor.rows - total * self.start // self.tensor.rows


def stream(
    model: ModelSpec,
    layout: Layout,
    folder: Path,
    *,
    stem: str,
    threads: int,
    imatrix: Imatrix | None = None,
    encoder: Encoder | None = None,
    allow_nonfinite: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write every file of `layout` into `folder`.

    Args:
        model: Where the rows come from.
        layout: Made from the same model by `plan_layout`.
        folder: Exists; the files must not.
        stem: File name without suffix.
        threads: Worker threads, at least 1. Changes the time, never a byte.
        imatrix: The one the layout was planned with.
        encoder: Quantizes what it takes, in place of ggml.
        allow_nonfinite: Write tensors with NaN or infinite weights: float types hold them as they are (llama.cpp loads
            such a file unless told to check tensors), quantized types where ggml's own validation accepts the result.
        progress: Called with (source bytes done, all source bytes).

    Returns:
        The files and what was found in them.

    Raises:
        InputRefused: NaN or infinite weights (tensor and count), or weights that a type can't hold.
        StorageError: Disk full, file exists or can't be written.
        UsageError: `threads` below 1.
    """
    if threads < 1:
        raise UsageError(f"threads is {threads}, expected at least 1")
    specs = {tensor.name: tensor for tensor in model.tensors}
    paths = [folder / f"{stem}{shard.suffix}" for shard in layout.shards]
    made: list[tuple[Path, int]] = []
    try:
        _allocate(paths, layout.shards, made)
        total = sum(_source_bytes(tensor) for tensor in model.tensors)
        run = _Run(_chunks(layout.shards, made, specs), total, imatrix, encoder, allow_nonfinite)
        run.work(threads, progress)
        for (path, descriptor), shard in zip(made, layout.shards, strict=True):
            with _storage(path):
                _write_all(descriptor, shard.header, 0)
    except BaseException:
        for path, descriptor in made:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            path.unlink(missing_ok=True)
        raise
    for _, descriptor in made:
        os.close(descriptor)
    return Written(tuple(paths), dict(sorted(run.nonfinite.items())))


def _source_bytes(tensor: TensorSpec) -> int:
    return tensor.source_bytes or tensor.parameters * 4


def _chunks(
    shards: Sequence[Shard], files: Sequence[tuple[Path, int]], specs: dict[str, TensorSpec]
) -> Iterator[_Chunk]:
    """All work, in file order, in units that respect each tensor's `row_block`."""
    index = 0
    for shard, (path, descriptor) in zip(shards, files, strict=True):
        for entry in shard.entries:
            tensor = specs[entry.name]
            block = min(max(tensor.row_block, 1), tensor.rows)
            step = max(max(CHUNK_WEIGHTS // tensor.width, CHUNK_ROWS) // block, 1) * block
            for start in range(0, tensor.rows, step):
                stop = min(start + step, tensor.rows)
                yield _Chunk(index, tensor, entry, path, descriptor, len(shard.header), start, stop)
                index += 1


@dataclass
class _Run:
    """The state the threads share: which chunk is next, what was found, whether to stop."""

    chunks: Iterator[_Chunk]
    total_bytes: int
    imatrix: Imatrix | None
    encoder: Encoder | None
    allow_nonfinite: bool
    nonfinite: dict[str, int] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    done_bytes: int = 0
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, threads: int, progress: Progress) -> None:
        """Run all chunks; raise the failure of the earliest chunk, which does not depend on how threads were scheduled.

        Chunks are handed out in order and the ones under way are finished, so every chunk before the first that failed
        was looked at too.
        """
        pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
        try:
            pending = {pool.submit(self._worker) for _ in range(threads)}
            while pending:
                done, pending = wait(pending, timeout=_PROGRESS_SECONDS)
                for future in done:
                    future.result()
                progress(self.done_bytes, self.total_bytes)
        finally:
            self.stop = True
            pool.shutdown(wait=True)
        if self.failures:
            raise self.failures[min(self.failures)]

    def _worker(self) -> None:
        out = np.empty(0, dtype=np.uint8)
        while True:
            with self.lock:
                chunk = None if self.stop else next(self.chunks, None)
            if chunk is None:
                return
            try:
                out = self._convert(chunk, out)
            except BaseException as error:  # handed to the thread that waits, whatever it is
                with self.lock:
                    self.failures[chunk.index] = error
                    self.stop = True
                return
            with self.lock:
                self.done_bytes += chunk.source_bytes

    def _convert(self, chunk: _Chunk, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Read, check, quantize, write; returns the buffer to use again."""
        tensor, kind = chunk.tensor, chunk.entry.type
        rows = np.ascontiguousarray(tensor.read(chunk.start, chunk.stop), dtype=np.float32)
        if rows.shape != (chunk.stop - chunk.start, tensor.width):
            raise StepError(
                f"{tensor.name}: rows {chunk.start} to {chunk.stop} of {tensor.source} came as {rows.shape}, "
                f"expected width {tensor.width}"
            )
        bad = count_nonfinite(rows)
        if bad and not self.allow_nonfinite:
            raise _nonfinite_error(tensor)
        if bad:
            with self.lock:
                self.nonfinite[tensor.name] = self.nonfinite.get(tensor.name, 0) + bad
        row = row_bytes(kind, tensor.width)
        size = row * len(rows)
        if kind.name == "F32":
            data = rows.reshape(-1).view(np.uint8)
        else:
            out = out if out.nbytes >= size else np.empty(size, dtype=np.uint8)
            data = out[:size]
            self._quantize(chunk, rows, data)
        if not valid_rows(kind, data) and not (bad and bad == _stored_nonfinite(kind, data)):
            raise InputRefused(
                f"{tensor.name} ({tensor.source}) can't be {kind.name}: the result holds a value that is not finite",
                hint="Weights beyond the range of the type need BF16 or F32, and so does a NaN that spoils a scale.",
            )
        with _storage(chunk.path):
            _write_all(chunk.descriptor, data.data, chunk.data_start + chunk.entry.offset + chunk.start * row)
        return out

    def _quantize(self, chunk: _Chunk, rows: npt.NDArray[np.float32], data: npt.NDArray[np.uint8]) -> None:
        """Quantize, expert by expert where each has importance values of its own."""
        tensor, kind = chunk.tensor, chunk.entry.type
        if self.encoder is not None and self.encoder.takes(tensor.name, kind):
            self.encoder.quantize(tensor.name, rows, kind, data)
            return
        values = self.imatrix.of(tensor.name, tensor.shape) if self.imatrix else None
        if values is None:
            quantize_rows(rows, kind, data)
            return
        row, per_expert = row_bytes(kind, tensor.width), tensor.rows // len(values)
        start = chunk.start
        while start < chunk.stop:
            expert = start // per_expert
            stop = min(chunk.stop, (expert + 1) * per_expert)
            here = slice(start - chunk.start, stop - chunk.start)
            quantize_rows(rows[here], kind, data[here.start * row : here.stop * row], values[expert])
            start = stop


def count_nonfinite(rows: npt.NDArray[np.float32]) -> int:
    """How many of `rows` (float32, any shape) are NaN or infinite.

    A sum is not finite as soon as one of them is, and costs a tenth of testing each; only where it is not (which large
    finite values can cause as well) are they counted.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = rows.sum(dtype=np.float32)
    return 0 if np.isfinite(total) else int(rows.size - np.count_nonzero(np.isfinite(rows)))


def _stored_nonfinite(kind: GgmlType, data: npt.NDArray[np.uint8]) -> int:
    """How many weights of `data` (uint8, whole rows) are NaN or infinite in a float type; 0 for a quantized one."""
    if kind.name not in _EXPONENTS:
        return 0
    dtype, exponent = _EXPONENTS[kind.name]
    return int(np.count_nonzero(data.view(dtype) & exponent == exponent))


def _nonfinite_error(tensor: TensorSpec) -> InputRefused:
    """Count over the whole tensor, so that the message does not depend on where it was cut."""
    block = min(max(tensor.row_block, 1), tensor.rows)
    step = max(CHUNK_WEIGHTS // tensor.width // block, 1) * block
    starts = range(0, tensor.rows, step)
    bad = sum(count_nonfinite(tensor.read(start, min(start + step, tensor.rows))) for start in starts)
    return InputRefused(
        f"{tensor.name} ({tensor.source}): {bad} of {tensor.parameters} weights are NaN or infinite",
        hint="The checkpoint is damaged or diverged; --set quantize.allow_nonfinite=true builds from it all the same.",
    )


def _allocate(paths: Sequence[Path], shards: Sequence[Shard], made: list[tuple[Path, int]]) -> None:
    """Create every file at its full size; `made` holds what has to be closed, and removed on failure."""
    for path, shard in zip(paths, shards, strict=True):
        with _storage(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        made.append((path, descriptor))
        with _storage(path, shard.file_bytes):
            _reserve(descriptor, shard.file_bytes, path.parent)


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Take `size` bytes of the disk now; where a file system can't promise them, look whether they are free."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, some network file systems no such service
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def _storage(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError on `path` into one line; `needed` is the size it was to have, in bytes."""
    try:
        yield
    except FileExistsError as error:
        raise UsageError(f"{path} exists", hint="Choose another name, or remove it.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        what = f"{path}: {reason[:1].lower()}{reason[1:]}"
        if needed is not None:
            what += f" (needs {needed:,} bytes, {shutil.disk_usage(path.parent).free:,} free)"
        raise StorageError(what, hint="Free space there, or set EDGEPACK_CACHE to a folder that has more.") from error
