"""Text that a model writes itself, many windows side by side."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from edgepack.errors import StepError
from edgepack.worker import Progress, no_progress

_MOST_ROWS = 32  # more at once take no less time for each on a CPU: keys and values are what is read
_CACHE_BYTES = 512 << 20  # for keys and values: less than training takes later for a model this is little for
_SEED = 20260302


def sampled(
    teacher: Any, starts: torch.Tensor, count: int, tokens: int, progress: Progress = no_progress
) -> torch.Tensor:
    """Text the teacher writes, at temperature 1, ends of documents included.

    Args:
        teacher: A causal language model of transformers.
        starts: First tokens to choose from: BOS where windows begin with it.
        count: Windows.
        tokens: Of each.
        progress: In tokens.

    Returns:
        `[count, tokens]` on the CPU; the same for the same model, machine and threads.

    Raises:
        StepError: The teacher gives NaN or infinite logits.
    """
    generator = torch.Generator().manual_seed(_SEED)
    rows = _at_once(teacher, starts, tokens)
    found = []
    for first in range(0, count, rows):
        picked = torch.randint(len(starts), (min(rows, count - first),), generator=generator)
        found.append(_written(teacher, starts[picked], tokens, generator))
        progress(sum(map(len, found)) * tokens, count * tokens)
    return torch.cat(found)


def _at_once(teacher: Any, starts: torch.Tensor, tokens: int) -> int:
    """Windows whose keys and values have room: as many times as much as after the first token."""
    memory = _answer(teacher, starts[:1, None], None).past_key_values
    kept = [getattr(layer, name, None) for layer in getattr(memory, "layers", ()) for name in ("keys", "values")]
    each: int = tokens * sum(states.nbytes for states in kept if isinstance(states, torch.Tensor))
    return max(1, min(_MOST_ROWS, _CACHE_BYTES // max(1, each)))


def _written(teacher: Any, starts: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Windows `[rows, tokens]` that begin with `starts`."""
    written, memory = [starts[:, None]], None
    for _ in range(1, tokens):
        out = _answer(teacher, written[-1], memory)
        if memory is None:
            make_room(out.past_key_values, tokens)
        memory = out.past_key_values
        written.append(drawn(out.logits[:, -1].float().cpu(), generator))
    return torch.cat(written, dim=1)


def _answer(teacher: Any, ids: torch.Tensor, memory: Any) -> Any:
    """Output of the model for one more token of each row."""
    # transformers 5.24 renamed it, and warns of the old name
    name = "cache" if "cache" in inspect.signature(teacher.forward).parameters else "past_key_values"
    device = next(teacher.parameters()).device
    with torch.no_grad():
        return teacher(ids.to(device), use_cache=True, **{name: memory})


def drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of logits `[rows, vocabulary]`, at temperature 1: `[rows, 1]`.

    By the inverse of the cumulative distribution, with one random number for each row; torch.multinomial draws one for
    each entry of the vocabulary, which takes longer than a small model does.

    Raises:
        StepError: Logits are NaN or infinite.
    """
    sums = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    if not torch.isfinite(sums[:, -1]).all():
        raise StepError("training: the source model gives NaN or infinite logits on its own text")
    # < the last sum, and never a token of no likelihood: the first whose sum is greater
    places = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp_(max=logits.shape[-1] - 1)


class _Preallocated(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer in memory that has room for the whole window.

    `DynamicLayer` copies all of them for every token: half the time of writing a window.
    """

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._room = [self._of(states, tokens) for states in (layer.keys, layer.values)]
        self.keys, self.values = self._filled(layer.keys.shape[-2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = self._filled(end)
        return self.keys, self.values

    @staticmethod
    def _of(states: torch.Tensor, tokens: int) -> torch.Tensor:
        room = states.new_empty(*states.shape[:2], tokens, states.shape[-1])
        room[:, :, : states.shape[-2]] = states
        return room

    def _filled(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._room
        return keys[:, :, :end], values[:, :, :end]


def make_room(memory: Any, tokens: int) -> None:
    """Let layers that attend to everything keep their states in place; others (sliding, recurrent) stay as they are.

    Args:
        memory: What a model returned after its first token.
        tokens: The most there will be.
    """
    layers = getattr(memory, "layers", None)
    if isinstance(layers, list):
        memory.layers = [_Preallocated(layer, tokens) if type(layer) is DynamicLayer else layer for layer in layers]
