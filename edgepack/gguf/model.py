"""What a GGUF file will hold, described before any weight is read.

A `ModelSpec` is the one value between an input (a Hugging Face checkpoint, a float GGUF) and the writer: metadata, and
for every tensor its GGUF name, its shape and a function that reads some of its rows. The plan sizes files from it, the
writer streams from it. Knows nothing of quantization types, targets or files on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack.gguf.file import Metadata
from edgepack.gguf.header import packed

MICRO_BATCH = 512  # llama.cpp's default n_ubatch
CACHE_PAD = 256  # cells are allocated in multiples of it (llama-context.cpp)

ReadRows = Callable[[int, int], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file to be written.

    Args:
        name: GGUF name, for example `blk.0.attn_q.weight`.
        shape: numpy order, outermost dimension first, the width (ggml's `ne[0]`) last.
        read: `read(start, stop)` gives rows [start, stop) of the 2-D view [prod(shape[:-1]), shape[-1]] as float32,
            with every transform of the architecture applied. Safe to call from several threads.
        row_block: `start` and `stop` must be multiples of it; a transform that mixes rows (the RoPE permutation of one
            head, a transposition of the whole tensor) says so here. The row count is always an allowed `stop`.
        keep_f32: Written as float32 whatever the preset (norms, biases, everything one-dimensional).
        source: Where it comes from, for messages: Hugging Face tensor names or `computed`.
        source_bytes: Bytes read for it, for progress.
    """

    name: str
    shape: tuple[int, ...]
    read: ReadRows
    row_block: int = 1
    keep_f32: bool = False
    source: str = ""
    source_bytes: int = 0

    @property
    def width(self) -> int:
        """Weights per row: the dimension that is quantized in blocks."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of the 2-D view."""
        return math.prod(self.shape[:-1])

    @property
    def parameters(self) -> int:
        """Weights in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Attention:
    """What the key-value cache of one layer costs.

    Args:
        key_width: Key values kept per token: kv heads x key head dimension.
        value_width: Value values kept per token.
        window: Sliding window in tokens; None where the layer sees the whole context.
    """

    key_width: int
    value_width: int
    window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A whole model, ready to be laid out and written.

    Args:
        architecture: llama.cpp's name, `general.architecture`.
        metadata: Every key but `general.file_type` and `general.quantization_version`, which the writer adds.
        tensors: In file order.
        heads: Attention heads (a recipe looks at heads / kv_heads).
        kv_heads: Key-value heads.
        context_length: Longest context the model was made for, in tokens.
        embedding: True for an embedder: it has a pooling type and gives vectors, not logits.
        attention: One entry per layer that keeps a key-value cache.
        experts: Experts per layer; 0 for a dense model.
    """

    architecture: str
    metadata: Metadata
    tensors: tuple[TensorSpec, ...]
    heads: int
    kv_heads: int
    context_length: int
    embedding: bool
    attention: tuple[Attention, ...]
    experts: int = 0

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return len(self.attention)

    @property
    def parameters(self) -> int:
        """Weights in all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def tied(self) -> bool:
        """True when the token embedding serves as the output matrix too."""
        return not any(tensor.name == "output.weight" for tensor in self.tensors)

    def kv_bytes(self, context: int, bytes_per_value: float = 2.0) -> int:
        """Bytes of the key-value cache at `context` tokens (f16 by default, as llama.cpp keeps it)."""
        return int(
            sum((a.key_width + a.value_width) * cache_cells(context, a.window) for a in self.attention)
            * bytes_per_value
        )


def cache_cells(context: int, window: int | None) -> int:
    """Tokens llama.cpp keeps room for: the context, or a window and one micro-batch (llama-kv-cache-iswa.cpp)."""
    needed = context if window is None else min(context, window + MICRO_BATCH)
    return -(-needed // CACHE_PAD) * CACHE_PAD


def describe(path: Path) -> ModelSpec:
    """Describe a Hugging Face folder or a float GGUF without reading a weight.

    Args:
        path: A checkpoint folder, or a `.gguf` whose tensors are F32, F16 or BF16 (first shard of a split file too).

    Returns:
        The model as it will be written.

    Raises:
        InputRefused: The checkpoint is unsafe, malformed, or of an architecture or tokenizer that is not supported.
    """
    if path.is_file():
        from edgepack.gguf.gguf_input import describe_gguf

        return describe_gguf(path)
    from edgepack.checkpoint import open_checkpoint
    from edgepack.gguf.architectures import describe_checkpoint

    model = describe_checkpoint(open_checkpoint(path))
    return replace(model, metadata=packed(model.metadata))  # a plan makes a dozen headers of one vocabulary


def names(tensors: Sequence[TensorSpec]) -> list[str]:
    """GGUF names in file order."""
    return [tensor.name for tensor in tensors]
