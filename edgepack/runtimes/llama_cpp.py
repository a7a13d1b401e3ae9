"""llama.cpp through llama-cpp-python's bindings: load a GGUF, tokenize, get logits, embeddings and single decode steps.

The low-level calls are used, not the high-level `Llama` class, so that the settings are those of llama.cpp's own tools:
batch 2048, micro-batch 512, flash attention chosen by llama.cpp, key-value cache in float16, no full-size cache for
sliding windows (llama.cpp common/common.h, tools/llama-bench, tools/perplexity). Only ever imported and used inside a
worker process: a fatal condition in ggml aborts the process.

llama.cpp's log is kept quiet; what it calls an error becomes part of the exception's message. Knows nothing of targets,
texts or measurements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgepack.errors import StepError, UsageError
from edgepack.runtimes import amx
from edgepack.runtimes.llama_batch import Batch, groups
from edgepack.runtimes.llama_bindings import (
    BATCH,
    KV_TYPES,
    MICRO_BATCH,
    bindings,
    forget_errors,
    reason,
    toolchain,
)

__all__ = ["BATCH", "MICRO_BATCH", "Artifact", "Model", "bindings", "describe_artifact", "toolchain"]

_POOLING_NONE, _POOLING_RANK = 0, 4  # llama.h, enum llama_pooling_type

Floats = npt.NDArray[np.float32]


class Model:
    """A loaded GGUF with, unless `vocab_only`, one llama.cpp context. Close it, or use it in a `with` block.

    One thread at a time may use a model; while llama.cpp computes, Python's lock is released.

    Args:
        path: The `.gguf`, or the first shard of a split file.
        context: Tokens each sequence can hold; 0 takes what the model was trained with.
        threads: Threads for prompts and for single tokens alike.
        batch: Most tokens handed over at once.
        ubatch: Most tokens computed at once.
        sequences: Independent sequences decoded side by side, each with its own cache of `context` tokens.
        gpu_layers: Layers on the accelerator; 0 keeps everything on the CPU, -1 moves all.
        embeddings: The model is an embedder: `embed` works, `logits` does not. Whole sequences are computed in one
            micro-batch, as llama.cpp demands of bidirectional attention.
        vocab_only: Load the vocabulary and the metadata only: `tokenize`, `detokenize`, `meta`.
        kv_type: Type of the key-value cache; `f32` for exact comparisons with other engines.
        flash_attention: True, False, or None to let llama.cpp choose (its tools' default). False for exact comparisons.
        pooling: llama.cpp's number of the pooling of an embedder; None takes the model's own.

    Raises:
        MissingError: llama-cpp-python is missing or unfit.
        StepError: llama.cpp can't load the file or make the context; the message carries its reason.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 0,
        threads: int,
        batch: int = BATCH,
        ubatch: int = MICRO_BATCH,
        sequences: int = 1,
        gpu_layers: int = 0,
        embeddings: bool = False,
        vocab_only: bool = False,
        kv_type: Literal["f16", "f32"] = "f16",
        flash_attention: bool | None = None,
        pooling: int | None = None,
    ) -> None:
        self._api: Any = bindings()
        self.path = Path(path)
        self._model: Any = None
        self._context: Any = None
        self.sequences = sequences
        self._load(gpu_layers, vocab_only)
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._api.llama_vocab_n_tokens(self._vocab))
        self.add_bos = bool(self._api.llama_vocab_get_add_bos(self._vocab))
        self.bos = int(self._api.llama_vocab_bos(self._vocab))
        self.eos = int(self._api.llama_vocab_eos(self._vocab))
        if vocab_only:
            return
        self.trained_context = int(self._api.llama_model_n_ctx_train(self._model))
        self.context = context or self.trained_context
        self.batch = min(batch, self.context * sequences) if not embeddings else max(batch, self.context)
        params = self._api.llama_context_default_params()
        params.n_ctx = self.context * sequences
        params.n_seq_max = sequences
        params.n_batch = self.batch
        params.n_ubatch = self.batch if embeddings else min(ubatch, self.batch)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        params.embeddings = embeddings
        params.swa_full = False  # what llama.cpp's tools use: the cache of a sliding window holds the window only
        params.offload_kqv = params.op_offload = gpu_layers != 0
        if pooling is not None:
            params.pooling_type = pooling
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            words = reason()
            self.close()
            raise StepError(f"{self.path}: llama.cpp can't make a context of {params.n_ctx} tokens: {words}")
        self._arrays = Batch(self._api, max(self.batch, sequences))

    def _load(self, gpu_layers: int, vocab_only: bool) -> None:
        if not self.path.is_file():
            raise StepError(f"{self.path}: no such file; expected a GGUF")
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocab_only
        forget_errors()
        params.use_extra_bufts = not amx.granted()
        with amx.refused():
            self._model = self._api.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            raise StepError(
                f"{self.path}: llama.cpp can't load it: {reason()}",
                hint="`edgepack inspect` shows what the file holds",
            )

    def close(self) -> None:
        """Free the context and the model; safe to call twice."""
        if self._context:
            self._api.llama_free(self._context)
            self._context = None
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text` by the GGUF's own vocabulary.

        Args:
            text: Any text; NUL characters are ordinary.
            add_special: Add BOS/EOS where the vocabulary says so.
            parse_special: Read `<|im_start|>` and the like as one token instead of plain text.
        """
        data = text.encode("utf-8")
        capacity = len(data) + 8
        while True:
            out = (self._api.llama_token * capacity)()
            count = self._api.llama_tokenize(self._vocab, data, len(data), out, capacity, add_special, parse_special)
            if count >= 0:
                return list(out[:count])
            if -count <= capacity:  # INT32_MIN: more tokens than llama.cpp can count
                raise StepError(f"{self.path}: llama.cpp can't tokenize a text of {len(data)} bytes: {reason()}")
            capacity = -count

    def detokenize(self, ids: Sequence[int]) -> bytes:
        """The bytes of the tokens, special ones written out; not always valid UTF-8: a token may end in mid-letter.

        Piece by piece, as a text streams from a running model. llama.cpp's own `llama_detokenize` also drops spaces
        in front of punctuation, which would not give the text back.
        """
        return b"".join(map(self._piece, ids))

    def _piece(self, token: int) -> bytes:
        capacity = 64
        while True:
            out = ctypes.create_string_buffer(capacity)
            count = self._api.llama_token_to_piece(self._vocab, token, out, capacity, 0, True)
            if count >= 0:
                return out.raw[:count]
            capacity = -count

    def meta(self, key: str) -> str | None:
        """The metadata value of `key` as llama.cpp prints it; None where the file has no such key."""
        capacity = 4096
        while True:
            out = ctypes.create_string_buffer(capacity)
            length = self._api.llama_model_meta_val_str(self._model, key.encode(), out, capacity)
            if length < 0:
                return None
            if length < capacity:
                return out.value.decode("utf-8", "replace")
            capacity = length + 1

    # --- numbers ------------------------------------------------------------------------------------------------

    def logits(self, sequences: Sequence[Sequence[int]], first: int = 0, *, stop: int | None = None) -> Floats:
        """Logits at positions [first, stop) of every sequence, each from an empty cache.

        Sequences are packed side by side as far as `batch` and `sequences` allow; only the asked positions are computed
        in the output layer.

        Args:
            sequences: Token ids, all of one length, at most `context`.
            first: First position wanted; the logits at position i are those for the token at i + 1.
            stop: One past the last position wanted; None for the length.

        Returns:
            float32 `[len(sequences), stop - first, vocab_size]`, a fresh array.

        Raises:
            UsageError: Lengths differ, or are longer than the context.
            StepError: llama.cpp could not decode.
        """
        length = len(sequences[0]) if len(sequences) else 0
        stop = length if stop is None else stop
        if any(len(ids) != length for ids in sequences) or not 0 <= first < stop <= length <= self.context:
            raise UsageError(
                f"logits: {len(sequences)} sequences of {sorted({len(ids) for ids in sequences})} tokens, positions "
                f"{first} to {stop}: expected one length of at most {self.context}, and positions inside it"
            )
        out = np.empty((len(sequences), stop - first, self.vocab_size), dtype=np.float32)
        tokens = np.asarray(sequences, dtype=np.int32)
        side_by_side = max(1, min(self.sequences, self.batch // length))
        for start in range(0, len(sequences), side_by_side):
            block = tokens[start : start + side_by_side]
            self._logits_of_block(block, first, stop, out[start : start + len(block)])
        return out

    def _logits_of_block(self, tokens: npt.NDArray[np.int32], first: int, stop: int, out: Floats) -> None:
        """Decode sequences that fit in one batch, or one sequence longer than a batch in pieces."""
        self.clear()
        count, length = tokens.shape
        for begin in range(0, length, self.batch):
            end = min(length, begin + self.batch)
            positions = np.arange(begin, end, dtype=np.int32)
            wanted = (positions >= first) & (positions < stop)
            self._arrays.fill(
                tokens[:, begin:end].ravel(),
                np.tile(positions, count),
                np.repeat(np.arange(count, dtype=np.int32), end - begin),
                np.tile(wanted, count),
            )
            self._decode()
            rows = int(wanted.sum())
            if rows:
                place = max(0, begin - first)
                out[:, place : place + rows] = self._output(count * rows).reshape(count, rows, self.vocab_size)

    def clear(self) -> None:
        """Empty the key-value cache."""
        memory = self._api.llama_get_memory(self._context)
        if memory:
            self._api.llama_memory_clear(memory, True)

    def feed(self, ids: Sequence[int], position: int) -> None:
        """Decode tokens of sequence 0 from `position` on, and wait; logits are made for the last one only.

        A prompt longer than `batch` is decoded in pieces, as llama.cpp's tools do.
        """
        if len(ids) == 1:
            self._arrays.fill_one(ids[0], position)
            self._decode()
            self._api.llama_synchronize(self._context)
            return
        tokens = np.asarray(ids, dtype=np.int32)
        for begin in range(0, len(tokens), self.batch):
            piece = tokens[begin : begin + self.batch]
            wanted = np.zeros(len(piece), dtype=bool)
            wanted[-1] = begin + len(piece) == len(tokens)
            places = np.arange(position + begin, position + begin + len(piece), dtype=np.int32)
            self._arrays.fill(piece, places, np.zeros(len(piece), dtype=np.int32), wanted)
            self._decode()
        self._api.llama_synchronize(self._context)

    def greedy(self) -> int:
        """The likeliest next token after `feed`."""
        return int(np.argmax(self._output(1)))

    def read(self, ids: Sequence[int], position: int) -> Floats:
        """Decode tokens of sequence 0 from `position` on in one pass, with logits for every one of them.

        Args:
            ids: At most `batch` tokens.
            position: Of the first; what the cache holds from there on must have been forgotten.

        Returns:
            float32 `[len(ids), vocab_size]`, a view that the next call overwrites; row i is for the token after ids[i].
        """
        count = len(ids)
        places = np.arange(position, position + count, dtype=np.int32)
        tokens = np.asarray(ids, dtype=np.int32)
        self._arrays.fill(tokens, places, np.zeros(count, dtype=np.int32), np.ones(count, dtype=bool))
        self._decode()
        return self._output(count)

    def forget(self, position: int) -> None:
        """Take the tokens of sequence 0 from `position` on out of the cache.

        Raises:
            StepError: The model keeps a running state instead of a token by token cache (Mamba and its like).
        """
        memory = self._api.llama_get_memory(self._context)
        if not memory or not self._api.llama_memory_seq_rm(memory, 0, position, -1):
            raise StepError(f"{self.path}: llama.cpp can't take tokens out of this model's cache")

    def _decode(self) -> None:
        forget_errors()
        status = self._api.llama_decode(self._context, self._arrays.value)
        if status:
            raise StepError(f"{self.path}: llama.cpp could not decode (status {status}): {reason()}")

    def _output(self, rows: int) -> Floats:
        """A view of llama.cpp's logits buffer [rows, vocab_size]; the next decode overwrites it."""
        pointer = self._api.llama_get_logits(self._context)  # waits for the computation
        if not pointer:
            raise StepError(f"{self.path}: llama.cpp gives no logits; is it an embedder?")
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))

    def embed(self, sequences: Sequence[Sequence[int]]) -> Floats:
        """Pooled embeddings, not normalised, by the pooling the GGUF names.

        Args:
            sequences: Token ids with their special tokens, each at most `context` long.

        Returns:
            float32 `[len(sequences), width]`.

        Raises:
            StepError: The model has no pooling, or llama.cpp failed.
        """
        if self._api.llama_pooling_type(self._context) in (_POOLING_NONE, _POOLING_RANK):
            raise StepError(
                f"{self.path}: the model names no pooling (mean, cls, last), so it has no embeddings to compare"
            )
        width = int(self._api.llama_model_n_embd_out(self._model))
        out = np.empty((len(sequences), width), dtype=np.float32)
        step = self._api.llama_decode if self._api.llama_get_memory(self._context) else self._api.llama_encode
        for place, group in groups(sequences, self.sequences, self.batch, self.context):
            self.clear()
            ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in group])
            positions = np.concatenate([np.arange(len(ids), dtype=np.int32) for ids in group])
            owner = np.repeat(np.arange(len(group), dtype=np.int32), [len(ids) for ids in group])
            self._arrays.fill(ids, positions, owner, np.ones(len(ids), dtype=bool))
            forget_errors()
            status = step(self._context, self._arrays.value)
            if status:
                raise StepError(f"{self.path}: llama.cpp could not encode (status {status}): {reason()}")
            self._api.llama_synchronize(self._context)
            for number in range(len(group)):
                pointer = self._api.llama_get_embeddings_seq(self._context, number)
                out[place + number] = np.ctypeslib.as_array(pointer, shape=(width,))
        return out


@dataclass(frozen=True)
class Artifact:
    """What a GGUF says about itself, read by llama.cpp without its weights.

    Args:
        architecture: `general.architecture`.
        file_type: Name of `general.file_type` (`F32`, `BF16`, `Q4_K - Medium`), or `unknown`.
        vocab_size: Tokens in the vocabulary.
        trained_context: Longest context the model was made for, in tokens.
        pooled: True for an embedder: the model names a pooling.
    """

    architecture: str
    file_type: str
    vocab_size: int
    trained_context: int
    pooled: bool


def describe_artifact(path: str | Path) -> Artifact:
    """Read vocabulary and metadata of a GGUF.

    Raises:
        StepError: llama.cpp can't load it.
    """
    with Model(path, threads=1, vocab_only=True) as model:
        architecture = model.meta("general.architecture") or "unknown"
        kind = model.meta("general.file_type")
        name = bindings().llama_ftype_name(int(kind)) if kind and kind.isdigit() else None
        return Artifact(
            architecture=architecture,
            file_type=name.decode().removeprefix("all ") if name else "unknown",
            vocab_size=model.vocab_size,
            trained_context=int(model.meta(f"{architecture}.context_length") or 0),
            pooled=int(model.meta(f"{architecture}.pooling_type") or 0) not in (_POOLING_NONE, _POOLING_RANK),
        )
