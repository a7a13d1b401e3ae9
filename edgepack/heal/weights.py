"""Which numbers an optimizer changes, and how they reach the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Weights(Protocol):
    """The masters of a student. `pull` and `push` stand around every step of the optimizer."""

    @property
    def masters(self) -> Mapping[str, torch.Tensor]:
        """What the optimizer changes, by name: tensors of their own, or the model's parameters themselves."""

    def pull(self) -> None:
        """Give every master the gradient that backward passes left in the model, and take it from there."""

    def push(self) -> None:
        """Write the masters into the model."""


class FullWeights:
    """The model's own parameters: those that ask for gradients.

    Args:
        student: Any module. A shared parameter (tied embedding) counts once.
    """

    def __init__(self, student: Any) -> None:
        self._masters = {name: value for name, value in student.named_parameters() if value.requires_grad}

    @property
    def masters(self) -> Mapping[str, torch.Tensor]:
        """See `Weights`."""
        return self._masters

    def pull(self) -> None:
        """Nothing: gradients are where they belong."""

    def push(self) -> None:
        """Nothing."""
