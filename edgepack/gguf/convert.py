"""From a model to finished GGUF files: plan the layout, stream the weights.

`plan_layout` (layout.py) decides every type and offset without reading a weight; `write` (stream.py) reads, quantizes
and writes them in one pass. `export` is both for a worker process: ggml aborts the process it runs in when it finds
something wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import UsageError
from edgepack.gguf import ggml
from edgepack.gguf.file import Metadata, Value, boolean, f32, string, u32, u64
from edgepack.gguf.imatrix import Imatrix, read_imatrix
from edgepack.gguf.layout import Layout, Shard, plan_layout
from edgepack.gguf.model import ModelSpec, describe
from edgepack.gguf.stream import Written, stream
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.gguf.tuned import FeedbackEncoder

__all__ = ["Layout", "Shard", "Written", "export", "plan_layout", "stream", "write"]


def write(
    model: ModelSpec,
    layout: Layout,
    folder: Path,
    *,
    stem: str,
    threads: int,
    imatrix: Imatrix | None = None,
    allow_nonfinite: bool = False,
    progress: Progress = no_progress,
) -> list[Path]:
    """`stream`, when only the files matter: same arguments, same errors."""
    written = stream(
        model,
        layout,
        folder,
        stem=stem,
        threads=threads,
        imatrix=imatrix,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )
    return list(written.paths)


def export(
    *,
    model: str,
    preset: str,
    overrides: Mapping[str, str],
    imatrix: str | None,
    shard_mb: int | None,
    folder: str,
    stem: str,
    threads: int,
    allow_nonfinite: bool,
    extra_metadata: Mapping[str, Any],
    statistics: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Convert and quantize one model; everything in and out can be JSON (see `edgepack.worker.run`).

    Args:
        model: Path of a checkpoint folder or a float GGUF.
        preset: Name of a preset of llama-quantize.
        overrides: Pattern -> type.
        imatrix: Path of a llama-imatrix file, or None.
        shard_mb: Largest file in megabytes (10^6 bytes), or None for one file.
        folder: Where the files go; exists.
        stem: File name without suffix.
        threads: Worker threads.
        allow_nonfinite: See `stream`.
        extra_metadata: Further GGUF keys: strings, truth values, whole numbers from 0, floats.
        statistics: Folder of calibration statistics (`edgepack/calibrate/collect.py`): what column feedback can write
            is written with it. None has every byte from ggml, as llama-quantize writes it.
        progress: Called with (source bytes done, all source bytes).

    Returns:
        `files` (names, in order), `bytes`, `types` (tensor -> type name), `parameters`, `bits_per_weight`,
        `tensor_bytes_by_type`, `nonfinite` (tensor -> count), `without_importance` (tensors that the importance matrix
        has nothing for), `feedback` (tensor -> part of its weighted error that column feedback left), `ggml` (what
        quantized).

    Raises:
        EdgepackError: As `describe`, `read_imatrix`, `plan_layout` and `stream`.
    """
    spec = describe(Path(model))
    importance = read_imatrix(Path(imatrix)) if imatrix else None
    layout = plan_layout(
        spec,
        preset,
        overrides=overrides,
        imatrix=importance,
        shard_bytes=shard_mb * 1_000_000 if shard_mb else None,
        extra_metadata=_values(extra_metadata),
    )
    encoder = _encoder(statistics)
    written = stream(
        spec,
        layout,
        Path(folder),
        stem=stem,
        threads=threads,
        imatrix=importance,
        encoder=encoder,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )
    return {
        "files": [path.name for path in written.paths],
        "bytes": layout.total_bytes,
        "types": {name: kind.name for name, kind in layout.types.items()},
        "parameters": layout.parameters,
        "bits_per_weight": layout.bits_per_weight,
        "tensor_bytes_by_type": dict(layout.tensor_bytes_by_type),
        "nonfinite": written.nonfinite,
        "without_importance": list(layout.without_importance),
        "feedback": encoder.saved() if encoder else {},
        "ggml": ggml.build(),
    }


def _encoder(statistics: str | None) -> FeedbackEncoder | None:
    if statistics is None:
        return None
    from edgepack.calibrate.moments import open_moments
    from edgepack.gguf.tuned import FeedbackEncoder

    return FeedbackEncoder(open_moments(Path(statistics)))


def _values(plain: Mapping[str, Any]) -> Metadata:
    """Metadata values of plain JSON ones."""
    return {key: _value(key, value) for key, value in plain.items()}


def _value(key: str, value: Any) -> Value:
    if isinstance(value, bool):
        return boolean(value)
    if isinstance(value, str):
        return string(value)
    if isinstance(value, float):
        return f32(value)
    if isinstance(value, int) and 0 <= value < 1 << 64:
        return u32(value) if value < 1 << 32 else u64(value)
    raise UsageError(f"metadata {key}: {value!r} is not a string, a truth value, a float or a whole number from 0")
