"""A small model for tests of training text, as far as transformers' interface is used there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Talker(torch.nn.Module):
    """A model of transformers as far as `sampled` looks: token n is followed by n + 1 or, one time in four, n + 2."""

    def __init__(self, vocabulary: int = 50) -> None:
        super().__init__()
        ids = torch.arange(vocabulary)
        rows = torch.full((vocabulary, vocabulary), -torch.inf)
        rows[ids, (ids + 1) % vocabulary], rows[ids, (ids + 2) % vocabulary] = float(np.log(3)), 0.0
        self.rows = torch.nn.Parameter(rows)
        self.calls = 0

    def forward(self, ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.calls += 1

        class Output:
            logits = self.rows[ids]

        Output.past_key_values = past_key_values  # type: ignore[attr-defined]
        return Output
