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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from edgepack.heal.cost import LEAST_K
from edgepack.heal.processor import fast_bfloat16
from edgepack.heal.renewal import drawn_anew, noise
from edgepack.heal.unembedding import Unembedding, blocks, take_apart

# Positions that have less context are not scored: their predictions are those of a model that knows nothing yet.
FIRST_SCORED = 32
_VALUES = 1 << 19  # probabilities that are worked on at once: 2 MB, which stay in a cache
_JUDGED_BYTES = 256 << 20  # of what the teacher said of held-out windows: hidden states of them, or logits


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
        self._teacher = _Model(teacher.eval().requires_grad_(False))
        self._student: _Model | None = None
        self._hidden = dict(hidden or {}) if hidden_weight else {}
        self._weight = hidden_weight
        self._keep = None if keep is None or self._hidden else max(LEAST_K, keep)
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._judged: dict[bytes, torch.Tensor] = {}
        self._judged_bytes = 0

    def loss(self, student: Any, windows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """See `Objective`."""
        ours = self._of(student)
        if self._keep is not None:
            indices, logs = self._largest(windows, places)
            with mixed_precision(windows.device):
                last, _ = ours.last(windows)
                return ours.mean(last, lambda some, logits: _largest_block(logits, indices[some], logs[some]))
        with mixed_precision(windows.device):
            with torch.no_grad():  # first: what its pass needs is free again before the student's pass keeps more
                taught, wanted = self._teacher.last(windows, hidden=bool(self._hidden))
            last, states = ours.last(windows, hidden=bool(self._hidden))
            theirs = taught.flatten(0, 1)
            found = ours.mean(last, lambda some, logits: _block(logits, self._teacher.logits(theirs[some])))
        for mine, other in self._hidden.items():
            cosine = torch.cosine_similarity(states[mine].float(), wanted[other].float(), dim=-1)
            found = found + self._weight / len(self._hidden) * (1 - cosine).mean()
        return found

    def score(self, student: Any, windows: torch.Tensor) -> torch.Tensor:
        """Mean KL divergence of each window in nats per token, positions from `FIRST_SCORED` (half of a short one).

        In float32 where the teacher is: what the best of a run is chosen by.
        """
        ours, found = self._of(student), []
        with torch.no_grad(), self._teacher.exact(windows.device):
            for window in windows[:, None]:  # one by one: the same value whatever it is scored with
                taught = self._verdict(window)
                last = ours.last(window)[0][0, -len(taught) :]
                total = torch.zeros((), dtype=torch.float64, device=windows.device)
                for rows in blocks(len(last), ours.vocabulary(last)):
                    values, _ = _block(ours.logits(last[rows]), self._teacher.logits(taught[rows]), derive=False)
                    total += values.sum(dtype=torch.float64)
                found.append(total / len(last))
        return torch.stack(found).cpu()

    def renewed(self, windows: torch.Tensor, version: int) -> torch.Tensor:
        """Training windows with tokens drawn anew from what the teacher expects in their places (`renewal.py`).

        Args:
            windows: All training windows `[windows, tokens]`, on the CPU; what was kept of them is forgotten.
            version: How often the text has been renewed with this.
        """
        generator, found = noise(version), []
        for place, window in enumerate(windows):
            kept = self._kept.pop(place) if place in self._kept else self._answer(window[None].to(self._device))
            found.append(drawn_anew(window, *kept, generator))
        return torch.stack(found)

    @property
    def _device(self) -> torch.device:
        found: torch.device = next(iter(self._teacher.model.parameters())).device
        return found

    def _of(self, student: Any) -> _Model:
        if self._student is None or self._student.model is not student:
            self._student = _Model(student)
        return self._student

    def _verdict(self, window: torch.Tensor) -> torch.Tensor:
        """What the teacher makes of the scored positions of a held-out window, from memory where it is."""
        key = window.cpu().numpy().tobytes()
        if (kept := self._judged.get(key)) is not None:
            return kept
        first = min(FIRST_SCORED, window.shape[1] // 2)
        taught = self._teacher.last(window)[0][0, first:].clone()
        if self._judged_bytes + taught.nbytes <= _JUDGED_BYTES:
            self._judged[key] = taught
            self._judged_bytes += taught.nbytes
        return taught

    def _largest(self, windows: torch.Tensor, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and log-probabilities `[positions, k]`, from memory where they are."""
        for window, place in zip(windows[:, None], places, strict=True):
            if place not in self._kept:
                self._kept[place] = self._answer(window)
        kept = [self._kept[place] for place in places]
        indices, logs = (torch.cat(values).to(windows.device) for values in zip(*kept, strict=True))
        return indices.long(), logs.float()

    def _answer(self, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's likeliest tokens after each of a window `[1, tokens]`, and their log-probabilities.

        One by one: a batch of other windows rounds differently, and a resumed run has other batches to fill. In the
        memory of the CPU, which is what `worth_keeping` looks at.
        """
        with torch.no_grad(), mixed_precision(window.device):
            return self._of_largest(self._teacher.last(window)[0][0])

    def _of_largest(self, taught: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices, logs = [], []
        for rows in blocks(len(taught), self._teacher.vocabulary(taught)):
            likely = torch.log_softmax(self._teacher.logits(taught[rows]).float(), dim=-1)
            largest = likely.topk(min(self._keep or LEAST_K, likely.shape[-1]), dim=-1)
            indices.append(largest.indices.int())
            logs.append(largest.values)
        return torch.cat(indices).cpu(), torch.cat(logs).half().cpu()


class _Model:
    """A model up to what its logits are made of: last hidden states, or, where it can't be taken apart, the logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._half = any(values.dtype == torch.bfloat16 for values in model.parameters())
        self._apart: Unembedding | None = None
        self._tried = False

    def exact(self, device: torch.device) -> AbstractContextManager[Any]:
        """Products as exact as the model allows: float32, unless its matrices are held in bfloat16."""
        return mixed_precision(device) if self._half else torch.autocast(device.type, enabled=False)

    def last(self, windows: torch.Tensor, *, hidden: bool = False) -> tuple[torch.Tensor, Any]:
        """`[windows, tokens, width or vocabulary]`, and the hidden states of all layers if asked for."""
        if not self._tried:
            with self.exact(windows.device):
                self._apart, self._tried = take_apart(self.model, windows), True
        if self._apart is None:
            return forward(self.model, windows, hidden=hidden)
        return self._apart.states(windows, hidden=hidden)

    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """Of some positions of what `last` gave."""
        return last if self._apart is None else self._apart.logits(last)

    def vocabulary(self, last: torch.Tensor) -> int:
        """Length of a row of logits."""
        return last.shape[-1] if self._apart is None else len(self._apart.weight)

    def mean(self, last: torch.Tensor, block: Any) -> torch.Tensor:
        """Mean over positions of a loss on logits, see `unembedding.Block`."""
        if self._apart is not None:
            return self._apart.mean(last.flatten(0, 1), block)
        found: torch.Tensor = _OfLogits.apply(last.flatten(0, 1), block)
        return found.mean()


def forward(model: Any, windows: torch.Tensor, *, hidden: bool = False) -> tuple[torch.Tensor, Any]:
    """Logits and hidden states (None unless asked for) of a model of transformers, or of a plain module."""
    if not hasattr(model, "config"):
        return model(windows), None
    found = model(windows, use_cache=False, output_hidden_states=hidden)
    return found.logits, found.hidden_states if hidden else None


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 products where the device has fast ones, else float32.

    A GPU has; a CPU with AVX512-BF16 or AMX has: there they take a half to two thirds of the time (docs/healing.md).
    """
    if device.type == "cuda" or (device.type == "cpu" and fast_bfloat16()):
        found: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16)
        return found
    return nullcontext()


def _rows(positions: int, vocabulary: int) -> Iterator[slice]:
    """Positions whose probabilities are worked on at once."""
    count = max(16, _VALUES // vocabulary)
    return (slice(start, start + count) for start in range(0, positions, count))


def forward_kl(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of every position, nats, float32 `[positions]`; differentiable in `logits`.

    Args:
        logits: Of the student, `[positions, vocabulary]`.
        taught: Of the teacher, same shape.
    """
    found: torch.Tensor = _OfLogits.apply(logits, lambda some, values: _block(values, taught[some]))
    return found


def kl_of_largest(logits: torch.Tensor, indices: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the teacher's `k` likeliest tokens and one event that stands for all others.

    At most the divergence over the whole vocabulary, equal to it where `k` is all of it.

    Args:
        logits: Of the student, `[positions, vocabulary]`.
        indices: `[positions, k]`.
        logs: The teacher's log-probabilities of them.
    """
    found: torch.Tensor = _OfLogits.apply(
        logits, lambda some, values: _largest_block(values, indices[some], logs[some])
    )
    return found


class _OfLogits(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """A loss of every position: value and gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, block: Any) -> torch.Tensor:
        values, gradient = block(slice(0, len(logits)), logits)
        ctx.save_for_backward(gradient)
        found: torch.Tensor = values
        return found

    @staticmethod
    def backward(ctx: Any, *above: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0][:, None].to(gradient.dtype), None


def _block(
    logits: torch.Tensor, taught: torch.Tensor, *, derive: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divergence of every position, and its derivative: softmax of the student minus that of the teacher."""
    gradient = torch.empty_like(logits) if derive else None
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _rows(*logits.shape):
        theirs = torch.log_softmax(taught[rows].float(), dim=-1)
        ours = torch.log_softmax(logits[rows].float(), dim=-1)
        probability = theirs.exp()
        found[rows] = (probability * theirs.sub_(ours)).sum(-1)
        if gradient is not None:
            gradient[rows] = ours.exp_().sub_(probability)
    return found, gradient


def _largest_block(
    logits: torch.Tensor, indices: torch.Tensor, logs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence over `k` tokens and a rest, and its derivative with respect to the logits.

    With p and r the teacher's probabilities of the tokens and of the rest, q and s the student's: q - p for one of the
    `k`, and q (1 - r / s) for every other.
    """
    gradient = torch.empty_like(logits)
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    smallest = torch.finfo(torch.float32).eps
    whole = indices.shape[1] == logits.shape[1]
    for rows in _rows(*logits.shape):
        some, theirs = indices[rows], logs[rows]
        likely = torch.log_softmax(logits[rows].float(), dim=-1)
        chosen, probability = likely.gather(1, some), theirs.exp()
        value = (probability * (theirs - chosen)).sum(-1)
        rest = (1 - probability.sum(-1)).clamp(min=smallest)
        left = (1 - chosen.exp().sum(-1)).clamp(min=smallest)
        found[rows] = value if whole else value + rest * (rest.log() - left.log())
        likely.exp_().mul_((1 - rest / left)[:, None])
        gradient[rows] = likely.scatter_(1, some, chosen.exp_().sub_(probability))
    return found, gradient
