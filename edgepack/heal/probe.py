"""How long training will take, timed on its own passes before it starts: nothing of the run is changed by it.

    seconds = new windows x pass + seen windows x shorter pass + steps x optimizer + scored windows x score

The pass is one micro-batch forward and backward, gradients thrown away; it is shorter over windows of which the
teacher's answers are kept. The optimizer steps on a vector that stands for the masters. Each is timed after it was done
once, unless it takes so long that the first time tells enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edgepack.heal.objective import Objective
from edgepack.heal.weights import Weights

_LONG_SECONDS = 10.0  # first-time costs are a second or less
_MOST_VALUES = 1 << 22  # of the vector that stands for the masters


@dataclass(frozen=True)
class Pace:
    """Seconds.

    Args:
        new: Training on a window the teacher has not answered yet.
        seen: Training on one it has.
        optimizer: A step of the optimizer.
        scored: Scoring one held-out window.
    """

    new: float
    seen: float
    optimizer: float
    scored: float

    def seconds(self, new: int, seen: int, steps: int, scored: int) -> float:
        """Time for so many training windows, steps and scored windows."""
        return new * self.new + seen * self.seen + steps * self.optimizer + scored * self.scored


def timed(
    student: Any,
    objective: Objective,
    weights: Weights,
    training: torch.Tensor,
    held_out: torch.Tensor,
    *,
    micro_batch: int,
) -> Pace:
    """Time the parts of a step.

    Args:
        student: On its device, ready for training.
        objective: What it is trained towards.
        weights: Of the student.
        training: The first training windows: two micro-batches, or what there is.
        held_out: One window that was scored before.
        micro_batch: Windows of one pass.
    """
    device = training.device
    start = min(micro_batch, len(training) - 1)

    def train(first: int, last: int) -> Callable[[], None]:
        def work() -> None:
            with torch.enable_grad():
                objective.loss(student, training[first:last], range(first, last)).backward()
            for values in (*student.parameters(), *weights.masters.values()):
                values.grad = None

        return work

    windows = len(training) - start
    first = _seconds(train(0, start or 1), device) * windows / (start or 1)
    again = train(start, len(training))
    new, seen = (first, first) if first > _LONG_SECONDS else (_seconds(again, device), _seconds(again, device))
    scoring = _second_time(lambda: objective.score(student, held_out), device)
    return Pace(new / windows, seen / windows, _optimizer_seconds(weights, device), scoring)


def _optimizer_seconds(weights: Weights, device: Any) -> float:
    total = sum(values.numel() for values in weights.masters.values())
    standing = torch.zeros(min(total, _MOST_VALUES), device=device, requires_grad=True)
    standing.grad = torch.ones_like(standing)
    optimizer = torch.optim.AdamW([standing], fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([standing], 1.0)
        optimizer.step()

    return float(_second_time(step, device) * total / standing.numel())


def _second_time(work: Callable[[], Any], device: Any) -> float:
    first = _seconds(work, device)
    return first if first > _LONG_SECONDS else _seconds(work, device)


def _seconds(work: Callable[[], Any], device: Any) -> float:
    started = _now(device)
    work()
    return _now(device) - started


def _now(device: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
