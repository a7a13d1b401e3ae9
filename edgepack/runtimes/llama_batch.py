"""What is handed to llama.cpp at once: a `llama_batch` filled by slices, and the cutting of sequences into batches."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import UsageError


class Batch:
    """A `llama_batch` over numpy arrays: filled by slices, not token by token."""

    def __init__(self, api: Any, capacity: int) -> None:
        self._token = np.zeros(capacity, dtype=np.int32)
        self._position = np.zeros(capacity, dtype=np.int32)
        self._owner = np.zeros(capacity, dtype=np.int32)
        self._count = np.ones(capacity, dtype=np.int32)
        self._wanted = np.zeros(capacity, dtype=np.int8)
        # seq_id is a pointer per token: each points at that token's place in _owner
        self._owners = self._owner.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        fields = dict(api.llama_batch._fields_)
        self.value = api.llama_batch(
            n_tokens=0,
            token=ctypes.cast(self._token.ctypes.data, fields["token"]),
            embd=None,
            pos=ctypes.cast(self._position.ctypes.data, fields["pos"]),
            n_seq_id=ctypes.cast(self._count.ctypes.data, fields["n_seq_id"]),
            seq_id=ctypes.cast(self._owners.ctypes.data, fields["seq_id"]),
            logits=ctypes.cast(self._wanted.ctypes.data, fields["logits"]),
        )

    def fill(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        owners: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.bool_],
    ) -> None:
        """Describe a batch: ids, positions, owning sequences, and where logits are wanted; each `[tokens]`."""
        count = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = positions
        self._owner[:count] = owners
        self._wanted[:count] = wanted
        self.value.n_tokens = count

    def fill_one(self, token: int, position: int) -> None:
        """One token of sequence 0: the step of a running answer, kept short because it is timed."""
        self._token[0] = token
        self._position[0] = position
        self._owner[0] = 0
        self._wanted[0] = 1
        self.value.n_tokens = 1


def groups(
    sequences: Sequence[Sequence[int]], most: int, batch: int, context: int
) -> Iterator[tuple[int, list[Sequence[int]]]]:
    """Consecutive sequences that fit in one batch, with the place of the first."""
    group: list[Sequence[int]] = []
    start = 0
    for place, ids in enumerate(sequences):
        if not 0 < len(ids) <= context:
            raise UsageError(f"embed: sequence {place} has {len(ids)} tokens, expected 1 to {context}")
        if group and (len(group) == most or sum(map(len, group)) + len(ids) > batch):
            yield start, group
            group, start = [], place
        group.append(ids)
    if group:
        yield start, group
