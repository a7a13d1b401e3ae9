"""How the rows of a GGUF tensor are made from the rows of a checkpoint's tensors.

A tensor is a stack of row ranges of one or several checkpoint tensors, turned into float32, with one transform. Every
reader is a closure over files and offsets: it may be called from several threads, in any order.

Knows nothing of architectures; which transform a tensor needs is data in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import TensorInfo, read_float32
from edgepack.gguf.model import ReadRows

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Transform:
    """A change of weights on their way into the file.

    Args:
        apply: Float32 rows [n, width] and the head dimension in, float32 rows out.
        block: Rows that must be read together, from (rows of the GGUF tensor, head dimension).
        transposed: The checkpoint's tensor is the transpose of the GGUF's.
    """

    apply: Callable[[Floats, int], Floats]
    block: Callable[[int, int], int] = lambda rows, head_dim: 1
    transposed: bool = False


def interleave_heads(rows: Floats, head_dim: int) -> Floats:
    """Reorder the rows of every head from the half-split RoPE order to pairs of neighbours.

    transformers rotates value j with value j + head_dim/2, the graphs with LLAMA_ROPE_TYPE_NORM value 2j with 2j + 1
    (llama.cpp src/llama-model.cpp, llama_model_rope_type). Source: llama.cpp conversion/llama.py, LlamaModel.permute.

    Args:
        rows: `[heads x head_dim, width]`, or a bias `[1, heads x head_dim]`.
        head_dim: Rows per head.
    """
    flat = rows.reshape(-1, rows.shape[-1]) if rows.shape[0] != 1 else rows.reshape(-1, 1)
    heads = flat.reshape(-1, 2, head_dim // 2, flat.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


# By the names `families.py` uses.
TRANSFORMS: Mapping[str, Transform] = {
    "copy": Transform(lambda rows, head_dim: rows),
    "rope": Transform(interleave_heads, block=lambda rows, head_dim: min(rows, head_dim)),
    # Gemma's norms multiply by 1 + weight (llama.cpp conversion/gemma.py, norm_shift).
    "plus one": Transform(lambda rows, head_dim: rows + np.float32(1)),
    # GPT-2's Conv1D keeps [in, out] (llama.cpp conversion/gpt2.py). Whole at once: a row here is a column there.
    "transpose": Transform(
        lambda rows, head_dim: np.ascontiguousarray(rows.T), block=lambda rows, head_dim: rows, transposed=True
    ),
}


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of the 2-D view of one checkpoint tensor."""

    info: TensorInfo
    start: int
    stop: int


def reader(spans: Sequence[Span], transform: Transform, head_dim: int) -> ReadRows:
    """The `read` of a TensorSpec: the spans stacked, as float32, transformed.

    Args:
        spans: In the order of their rows; one only for a transform that transposes.
        transform: One of `TRANSFORMS`.
        head_dim: Rows per attention head.
    """
    if transform.transposed:
        (whole,) = spans

        def read_transposed(start: int, stop: int) -> Floats:
            return transform.apply(read_float32(whole.info, whole.start, whole.stop), head_dim)[start:stop]

        return read_transposed

    def read(start: int, stop: int) -> Floats:
        parts, row = [], 0
        for span in spans:
            rows = span.stop - span.start
            first, last = max(start - row, 0), min(stop - row, rows)
            if first < last:
                parts.append(read_float32(span.info, span.start + first, span.start + last))
            row += rows
        return transform.apply(parts[0] if len(parts) == 1 else np.concatenate(parts), head_dim)

    return read


def computed(values: npt.NDArray[np.float32]) -> ReadRows:
    """The `read` of a tensor that no checkpoint holds: one row of values."""

    def read(start: int, stop: int) -> Floats:
        return values.reshape(1, -1)[start:stop]

    return read
