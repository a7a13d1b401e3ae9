"""What a teacher says of training rows: computed once and kept in float16 where memory allows, else every time.

Kept are answers and the hidden states of the layers that a student's are compared with. Rows are read in fixed groups
of similar lengths, a group when the first of its rows is asked for: a batch of other rows rounds differently, and a
resumed run asks in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgepack.heal.encoder_model import Batch, Encoder
from edgepack.heal.encoder_rows import unpack
from edgepack.heal.objective import mixed_precision

_TOGETHER = 32  # rows read at once
_HALF = 2  # bytes of a kept value

Said = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


class Teacher:
    """A frozen encoder on training rows.

    Args:
        encoder: The teacher.
        rows: Training rows, from `encoder_rows.pack`.
        layers: Whose hidden states are wanted, from 1.
        keep: Keep what it says; for answers that are not a whole vocabulary for each token.
    """

    def __init__(self, encoder: Encoder, rows: torch.Tensor, layers: Sequence[int], *, keep: bool) -> None:
        self.encoder = encoder
        self._rows, self._layers, self._keep = rows, tuple(layers), keep
        self._padding = int(encoder.model.config.pad_token_id or 0)
        self._types = encoder.types
        self._order = (rows >= 0).sum(dim=1).argsort(stable=True).tolist() if keep else []
        self._group = {place: number // _TOGETHER for number, place in enumerate(self._order)}
        self._kept: dict[int, Said] = {}

    def batch(self, windows: torch.Tensor) -> Batch:
        """Inputs of transformers for some rows."""
        return unpack(windows, padding=self._padding, types=self._types)

    def __call__(self, windows: torch.Tensor, places: Sequence[int]) -> Said:
        """Answers, and hidden states `[rows, tokens, width]` of the wanted layers, of some training rows.

        Args:
            windows: The rows.
            places: Their numbers.
        """
        if not self._keep:
            return self._read(windows)
        for place in places:
            if place not in self._kept:
                self._read_group(self._group[place], windows.device)
        length = int((windows >= 0).sum(dim=1).max())
        said = [self._kept[place] for place in places]
        answers = tuple(_padded(parts, length) for parts in zip(*(answer for answer, _ in said), strict=True))
        states = tuple(_padded(parts, length) for parts in zip(*(state for _, state in said), strict=True))
        return answers, states

    def _read(self, windows: torch.Tensor) -> Said:
        with torch.no_grad(), mixed_precision(windows.device):
            answers, states = self.encoder.read(self.batch(windows), hidden=True)
        return answers, tuple(states[layer] for layer in self._layers)

    def _read_group(self, number: int, device: torch.device) -> None:
        places = self._order[number * _TOGETHER : (number + 1) * _TOGETHER]
        answers, states = self._read(self._rows[places].to(device))
        per_token = self.encoder.task.name in ("token-classification", "question-answering")
        for row, place in enumerate(places):
            own = int((self._rows[place] >= 0).sum())
            self._kept[place] = (
                tuple((answer[row, :own] if per_token else answer[row]).half().clone() for answer in answers),
                tuple(state[row, :own].half().clone() for state in states),
            )


def kept_bytes(encoder: Encoder, rows: torch.Tensor, layers: int) -> int:
    """Memory that keeping takes, answers (small beside hidden states) left out.

    Args:
        encoder: The teacher.
        rows: Training rows.
        layers: Whose hidden states are kept.
    """
    return _HALF * int((rows >= 0).sum()) * layers * int(encoder.model.config.hidden_size)


def _padded(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Values of rows as one float32 tensor; zeros behind the end of a row where there is one value for each token."""
    if len({part.shape for part in parts}) == 1:
        return torch.stack(list(parts)).float()
    found = torch.zeros(len(parts), length, *parts[0].shape[1:], device=parts[0].device)
    for row, part in enumerate(parts):
        found[row, : len(part)] = part
    return found
