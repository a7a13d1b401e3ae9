"""Low-rank adapters: a student is trained through two thin matrices beside every matrix of its layers.

    y = W x + (alpha / r) B A x        A [r, in] random, B [out, r] zero: the student starts as it is

Hu et al., arXiv:2106.09685, section 4.1. W stays as it is and gets neither gradient nor moments; what is left to hold
grows with r (in + out) instead of in x out. `merge` adds the product to W: the model that is written knows nothing of
adapters. Embeddings, norms and the output matrix are not changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from edgepack.heal.means import DEFAULT_RANK

ALPHA = 16.0  # of the paper; with Adam it only scales the learning rate
_SEED = 20260303


class LoraWeights:
    """The `Weights` (edgepack/heal/weights.py) of a student with adapters.

    Args:
        student: A model of transformers; its own parameters are frozen.
        rank: Of an adapter, at most the smaller side of its matrix.

    Raises:
        ValueError: No matrix to adapt.
    """

    def __init__(self, student: Any, *, rank: int = DEFAULT_RANK) -> None:
        student.requires_grad_(False)
        generator = torch.Generator().manual_seed(_SEED)
        self._adapters = {name: _Adapter(module, rank, generator) for name, module in adapted(student)}
        if not self._adapters:
            raise ValueError("the student has no matrices in layers")
        self._masters = {
            f"{name}.{side}": values
            for name, adapter in self._adapters.items()
            for side, values in (("lora_A", adapter.down), ("lora_B", adapter.up))
        }

    @property
    def masters(self) -> Mapping[str, torch.Tensor]:
        """See `Weights`."""
        return self._masters

    def pull(self) -> None:
        """Nothing: gradients are where they belong."""

    def push(self) -> None:
        """Nothing."""

    def merge(self) -> None:
        """Add every adapter to its matrix and take it off; to be called once, after training."""
        for adapter in self._adapters.values():
            adapter.merge()


def adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of every matrix inside a layer: `nn.Linear`, and `Conv1D` of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        numbered = any(part.isdigit() for part in name.split("."))
        if numbered and type(module) in (torch.nn.Linear, Conv1D):
            yield name, module


class _Adapter:
    """The thin matrices of one module, added to its output by a hook."""

    def __init__(self, module: Any, rank: int, generator: torch.Generator) -> None:
        self._module = module
        self._transposed = not isinstance(module, torch.nn.Linear)
        rows, columns = module.weight.shape[::-1] if self._transposed else module.weight.shape
        rank = min(rank, rows, columns)
        device = module.weight.device
        self._scale = ALPHA / rank
        bound = 1 / math.sqrt(columns)  # as torch.nn.Linear starts (He et al., arXiv:1502.01852)
        start = (2 * torch.rand(rank, columns, generator=generator) - 1) * bound
        self.down = start.to(device).requires_grad_(True)
        self.up = torch.zeros(rows, rank, device=device, requires_grad=True)
        self._handle = module.register_forward_hook(self._add)

    def _add(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        thin = torch.nn.functional.linear(inputs[0], self.down)
        return output + self._scale * torch.nn.functional.linear(thin, self.up)

    def merge(self) -> None:
        """Add the product to the module's weight."""
        self._handle.remove()
        with torch.no_grad():
            product = self._scale * (self.up @ self.down)
            self._module.weight += product.t() if self._transposed else product
