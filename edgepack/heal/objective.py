"""What a student is trained towards: the predictions of a frozen teacher.

    loss = KL(teacher || student), T = 1, mean over all positions
           + weight x (1 - cosine of hidden states), mean over positions and pairs of layers

Forward KL on logits: Hinton et al., arXiv:1503.02531; against cross-entropy and other choices: Muralidharan et al.,
arXiv:2407.14679 (Minitron), section 4.3. The hidden-state term is that of DistilBERT (Sanh et al., arXiv:1910.01108).

The teacher runs beside the student, or once for each window with its `k` largest log-probabilities kept (float16, the
rest of the mass as one further event): worth it where windows are seen more than once. Knows nothing of how the student
is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

# Positions that have less context are not scored: their predictions are those of a model that knows nothing yet.
FIRST_SCORED = 32
_ROWS = 256  # positions whose probabilities are worked on at once: a few MB for a vocabulary of thousands
LEAST_K = 512  # as good as all logits (docs/refining.md); less of the vocabulary starts to bias the student


class Objective(Protocol):
    """What `distill` asks of an objective; windows are `[windows, tokens]` ids on the student's device."""

    def loss(self, student: Any, windows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """Mean loss over the positions of some training windows, to be differentiated.

        Args:
            student: The model.
            windows: Some of the training windows.
            places: Their numbers, which never change during a run.
        """

    def score(self, student: Any, windows: torch.Tensor) -> torch.Tensor:
        """What held-out windows are judged by, smaller is better: one value per window, float64."""


class TowardsTeacher:
    """Forward KL on logits, and optionally cosines of hidden states.

    Args:
        teacher: Frozen; gives logits `[windows, tokens, vocabulary]` (transformers' output, or the tensor itself).
        hidden: Student's hidden state -> the teacher's it should be like (0 is the embedding's output, n that of layer
            n); empty leaves the term out. Only for models of transformers.
        hidden_weight: Its weight.
        keep: How many log-probabilities of the teacher are kept per position, at least `LEAST_K` (or all); None runs
            the teacher beside the student every time.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        hidden: Mapping[int, int] | None = None,
        hidden_weight: float = 0.0,
        keep: int | None = None,
    ) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._hidden = dict(hidden or {}) if hidden_weight else {}
        self._weight = hidden_weight
        self._keep = None if keep is None or self._hidden else max(LEAST_K, keep)
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def loss(self, student: Any, windows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """See `Objective`."""
        with mixed_precision(windows.device):
            logits, states = forward(student, windows, hidden=bool(self._hidden))
        if self._keep is not None:
            indices, logs = self._of_teacher(windows, places)
            return kl_of_largest(logits.flatten(0, 1), indices, logs).mean()
        with torch.no_grad(), mixed_precision(windows.device):
            taught, wanted = forward(self._teacher, windows, hidden=bool(self._hidden))
        found = forward_kl(logits.flatten(0, 1), taught.flatten(0, 1)).mean()
        for ours, theirs in self._hidden.items():
            cosine = torch.cosine_similarity(states[ours].float(), wanted[theirs].float(), dim=-1)
            found = found + self._weight / len(self._hidden) * (1 - cosine).mean()
        return found

    def score(self, student: Any, windows: torch.Tensor) -> torch.Tensor:
        """Mean KL divergence of each window in nats per token, positions from `FIRST_SCORED` (half of a short one)."""
        first = min(FIRST_SCORED, windows.shape[1] // 2)
        found = []
        with torch.no_grad():
            for window in windows[:, None]:  # one by one: the same value whatever it is scored with
                with mixed_precision(windows.device):
                    logits, _ = forward(student, window)
                    taught, _ = forward(self._teacher, window)
                found.append(forward_kl(logits[0, first:], taught[0, first:]).double().mean())
        return torch.stack(found).cpu()

    def _of_teacher(self, windows: torch.Tensor, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and log-probabilities `[positions, k]`, from memory where they are."""
        for window, place in zip(windows[:, None], places, strict=True):
            if place not in self._kept:
                # One by one: a batch of other windows rounds differently, and a resumed run has other batches to fill.
                with torch.no_grad(), mixed_precision(windows.device):
                    taught, _ = forward(self._teacher, window)
                logs = torch.log_softmax(taught[0].float(), dim=-1)
                largest = logs.topk(min(self._keep or 0, logs.shape[-1]), dim=-1)
                self._kept[place] = largest.indices.int(), largest.values.half()
        kept = [self._kept[place] for place in places]
        return torch.cat([indices for indices, _ in kept]).long(), torch.cat([logs for _, logs in kept]).float()


def forward(model: Any, windows: torch.Tensor, *, hidden: bool = False) -> tuple[torch.Tensor, Any]:
    """Logits and hidden states (None unless asked for) of a model of transformers, or of a plain module."""
    if not hasattr(model, "config"):
        return model(windows), None
    found = model(windows, use_cache=False, output_hidden_states=hidden)
    return found.logits, found.hidden_states if hidden else None


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 products on a GPU; on a CPU, where most have no fast ones, float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def forward_kl(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of every position, nats, float32 `[positions]`; differentiable in `logits`.

    Args:
        logits: Of the student, `[positions, vocabulary]`.
        taught: Of the teacher, same shape.
    """
    found: torch.Tensor = _ForwardKl.apply(logits, taught)
    return found


class _ForwardKl(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Value and gradient (softmax of the student minus that of the teacher) in one pass, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if needed else None
        found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            theirs = torch.log_softmax(taught[rows].float(), dim=-1)
            ours = torch.log_softmax(logits[rows].float(), dim=-1)
            probability = theirs.exp()
            found[rows] = (probability * theirs.sub_(ours)).sum(-1)
            if gradient is not None:
                gradient[rows] = ours.exp_().sub_(probability)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0][:, None].to(gradient.dtype), None


def kl_of_largest(logits: torch.Tensor, indices: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the teacher's `k` likeliest tokens and one event that stands for all others.

    At most the divergence over the whole vocabulary, equal to it where `k` is all of it.

    Args:
        logits: Of the student, `[positions, vocabulary]`.
        indices: `[positions, k]`.
        logs: The teacher's log-probabilities of them.
    """
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, indices)
    probability = logs.exp()
    found = (probability * (logs - chosen)).sum(-1)
    if indices.shape[1] == logits.shape[1]:
        return found
    smallest = torch.finfo(torch.float32).eps
    rest = (1 - probability.sum(-1)).clamp(min=smallest)
    left = (1 - chosen.exp().sum(-1)).clamp(min=smallest)
    return found + rest * (rest.log() - left.log())


def kept_bytes(windows: int, tokens: int, vocabulary: int, keep: int = LEAST_K) -> int:
    """Memory the kept log-probabilities of so many windows take."""
    return windows * tokens * min(keep, vocabulary) * 6
