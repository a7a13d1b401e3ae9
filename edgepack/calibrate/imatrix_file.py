"""Writes importance matrices as llama-imatrix does, and says when one belongs to another model.

The bytes are those that `llama-imatrix --in-file ours --out-file theirs` gives back: same keys, order, shapes, padding
(llama.cpp tools/imatrix/imatrix.cpp, save_imatrix). The reader is `edgepack/gguf/imatrix.py`. Knows nothing of how the
sums were gathered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, StepError
from edgepack.files import write_atomic
from edgepack.gguf.file import ValueType, array, encode_header, pad, string, u32
from edgepack.gguf.header import ALIGNMENT
from edgepack.gguf.imatrix import Imatrix
from edgepack.gguf.types import TYPES
from edgepack.text import WINDOW_TOKENS

# Gathered by llama-imatrix on request (--process-output), under a name that a model with tied embeddings does not have.
_OPTIONAL = frozenset({"output.weight", "token_embd.weight"})
_BLOCK = re.compile(r"(blk\.\d+)\..+")
_SHOWN = 3

Floats = npt.NDArray[np.floating]


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[Floats, int | Sequence[int]]],
    *,
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int = WINDOW_TOKENS,
) -> None:
    """Write a GGUF file of llama-imatrix. The same values give the same bytes; a crash leaves the old file or none.

    Args:
        path: The file; what is there is replaced.
        sums: GGUF name of the matrix -> (sums of the squared inputs of each column, float32 or float64 `[width]`, or
            `[experts, width]`; inputs seen: one number, or one for each expert). An expert that saw none may stay.
        datasets: Names of the calibration texts.
        chunks: Windows of text that went in; llama-imatrix goes on counting from it.
        chunk_size: Tokens per window.

    Raises:
        StepError: A sum is negative or not finite (the model overflowed), counts don't fit, or no matrix is there.
        StorageError: The file system refused.
    """
    if not sums:
        raise StepError("the importance matrix would be empty: calibration has seen no matrix of the model")
    tensors, data = [], []
    for name in sorted(sums):  # str and UTF-8 sort alike, and std::sort compares bytes
        columns, counts = _entry(name, *sums[name])
        for suffix, values in ((".in_sum2", columns), (".counts", counts)):
            # ggml drops outer dimensions of 1 (ggml_n_dims), so an ordinary matrix has a 1-D entry
            shape = values.shape if len(values) > 1 else values.shape[1:]
            tensors.append((name + suffix, shape, TYPES["F32"]))
            content = values.tobytes()
            data.append(content.ljust(pad(len(content), ALIGNMENT), b"\0"))
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array(ValueType.STRING, list(datasets)),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(chunk_size),
    }
    header, _ = encode_header(metadata, tensors)
    write_atomic(path, header + b"".join(data))


def _entry(
    name: str, columns: Floats, counts: int | Sequence[int]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Sums `[experts, width]` and counts `[experts, 1]` as the file holds them."""
    seen = np.asarray(counts, dtype=np.float32).reshape(-1, 1)
    with np.errstate(over="ignore"):  # an infinite sum is refused below
        values = np.ascontiguousarray(np.atleast_2d(columns), dtype="<f4")
    if values.ndim != 2 or len(seen) not in (1, len(values)):
        raise StepError(f"{name}: {len(seen)} counts for sums of shape {np.shape(columns)}, expected one per expert")
    if not np.isfinite(values).all() or not np.isfinite(seen).all():
        raise StepError(
            f"{name}: the sum of squares of an input column is not finite",
            hint="The model overflows on this text; check its weights with `edgepack inspect`.",
        )
    if values.min(initial=0) < 0 or seen.min(initial=0) < 0:
        raise StepError(f"{name}: a sum of squares or a count is negative")
    return values, seen.astype("<f4")


def refuse_other_model(imatrix: Imatrix, tensors: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise if an importance matrix was made for another model.

    Stricter than llama-quantize, which drops names it does not know without a word, so that the matrix of a deeper
    model passes: refused are names the model does not have, other widths or numbers of experts, and a block without any
    values. Single matrices may be missing (experts that no token reached).

    Args:
        imatrix: From `read_imatrix`.
        tensors: GGUF names and shapes (numpy order) of every tensor of the model.
        where: The file, for messages.

    Raises:
        InputRefused: Naming up to three tensors and their widths.
    """
    unknown = sorted(imatrix.values.keys() - tensors.keys() - _OPTIONAL)
    known = sorted(imatrix.values.keys() & tensors.keys())
    widths = [
        f"{name} has {imatrix.values[name].size} values, expected {_columns(tensors[name])}"
        for name in known
        if imatrix.values[name].size != _columns(tensors[name])
    ]
    blocks = {match[1] for name in tensors if len(tensors[name]) > 1 and (match := _BLOCK.fullmatch(name))}
    empty = sorted(blocks - {match[1] for name in known if (match := _BLOCK.fullmatch(name))}, key=_number)
    problems = [
        *([f"the model has no {_listed(unknown)}"] if unknown else []),
        *([_listed(widths)] if widths else []),
        *([f"it has no values for {_listed(empty)}"] if empty else []),
    ]
    if problems:
        raise InputRefused(
            f"{where}: an importance matrix of another model: {'; '.join(problems)}",
            hint="Leave it out, and one is made for this model; or make one with llama-imatrix on this model.",
        )


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-2]) * shape[-1]


def _number(block: str) -> int:
    return int(block.removeprefix("blk."))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
