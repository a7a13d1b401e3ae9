"""The last product of a language model, from hidden states to logits, worked on a few positions at a time.

Logits are what takes most memory in distillation: 4 bytes x vocabulary for every position, for teacher and student, and
again for their gradient. Here they exist for one block of positions only; value and gradient of a loss that is a mean
over positions are computed block by block, as Liger Kernel does (Hsu et al., arXiv:2410.10989, section 3.2).

Works for models whose logits are that product and nothing else, which is tried out, not assumed: some scale or cap
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Values of logits worked on at once. A block of fewer rows adds up the gradient of the matrix too often.
_BLOCK_VALUES = 1 << 25
_LEAST_ROWS = 64
_TRIED_TOKENS = 8  # of the window that tells whether a model can be taken apart

# Logits `[rows, vocabulary]` of some positions -> loss of each, and its derivative with respect to them or None.
Block = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Unembedding:
    """A model taken apart.

    Args:
        trunk: All of it but the last product.
        weight: Matrix of that, `[vocabulary, width]`; the model's own parameter.
        bias: `[vocabulary]`, or None.
    """

    trunk: Any
    weight: Any
    bias: Any

    def states(self, windows: torch.Tensor, *, hidden: bool = False) -> tuple[torch.Tensor, Any]:
        """Last hidden states `[windows, tokens, width]`, and those of all layers if asked for."""
        found = self.trunk(windows, use_cache=False, output_hidden_states=hidden)
        return found.last_hidden_state, found.hidden_states if hidden else None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of states `[positions, width]`."""
        return torch.nn.functional.linear(states, self.weight, self.bias)

    def mean(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Mean over positions of a loss on logits; differentiable in `states`, the matrix and its bias.

        Args:
            states: `[positions, width]`.
            block: The loss, see `Block`.
        """
        found: torch.Tensor = _Mean.apply(states, self.weight, self.bias, block)
        return found


def take_apart(model: Any, windows: torch.Tensor) -> Unembedding | None:
    """A model of transformers as trunk and last product; None where its logits are not exactly that.

    Args:
        model: Any model; plain modules are not taken apart.
        windows: Token ids `[windows, tokens]` to try it on.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    trunk = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if head is None or type(head) is not torch.nn.Linear or trunk is None:
        return None
    found = Unembedding(trunk, head.weight, head.bias)
    few = windows[:1, :_TRIED_TOKENS]
    with torch.no_grad():
        last = trunk(few, use_cache=False)
        states = getattr(last, "last_hidden_state", None)
        if states is None or states.shape[-1] != head.in_features:
            return None
        ours, theirs = found.logits(states), model(few, use_cache=False).logits
    return found if ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) else None


def blocks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Positions that are worked on together."""
    rows = max(_LEAST_ROWS, _BLOCK_VALUES // vocabulary)
    return (slice(start, min(start + rows, positions)) for start in range(0, positions, rows))


class _Mean(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Gradients are ready before they are asked for, but for one factor: that is why it is a mean."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: Any, bias: Any, block: Block) -> torch.Tensor:
        kind = states.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.kinds = states.dtype, weight.dtype
        with torch.autocast(kind, enabled=False):
            rows, matrix = states.to(precision), weight.to(precision)
            offset = None if bias is None else bias.to(precision)
            to_states = torch.empty_like(rows)
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            to_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
            total = torch.zeros((), dtype=torch.float64, device=states.device)
            for some in blocks(len(rows), len(weight)):
                values, gradient = block(some, torch.nn.functional.linear(rows[some], matrix, offset))
                total += values.sum(dtype=torch.float64)
                if gradient is None:
                    continue
                torch.mm(gradient, matrix, out=to_states[some])
                if to_weight is not None:
                    to_weight += gradient.t() @ rows[some]
                if to_bias is not None:
                    to_bias += gradient.sum(0, dtype=torch.float32)
        ctx.share = 1 / len(rows)
        ctx.save_for_backward(to_states, to_weight, to_bias)
        return (total * ctx.share).float()

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        factor = above[0] * ctx.share
        to_states, to_weight, to_bias = ctx.saved_tensors
        states = (to_states * factor).to(ctx.kinds[0])
        weight = None if to_weight is None else to_weight.mul_(factor).to(ctx.kinds[1])
        bias = None if to_bias is None else to_bias.mul_(factor).to(ctx.kinds[1])
        return states, weight, bias, None
