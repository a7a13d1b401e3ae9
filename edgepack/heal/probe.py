"""How long training will take, timed on its own passes before it starts: nothing of the run is changed by it.

    seconds = steps x (windows x pass + optimizer) + evaluations x held-out windows x score

The pass is one micro-batch forward and backward, gradients thrown away; the optimizer steps on a vector that stands for
the masters. Each is timed the second time it is done, unless it takes so long that the first time tells enough.
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
        window: Training on one window.
        optimizer: A step of the optimizer.
        scored: Scoring one held-out window.
    """

    window: float
    optimizer: float
    scored: float

    def seconds(self, windows: int, steps: int, scored: int) -> float:
        """Time for so many training windows, steps and scored windows."""
        return windows * self.window + steps * self.optimizer + scored * self.scored


def timed(student: Any, objective: Objective, weights: Weights, training: torch.Tensor, held_out: torch.Tensor) -> Pace:
    """Time the parts of a step.

    Args:
        student: On its device, ready for training.
        objective: What it is trained towards.
        weights: Of the student.
        training: One micro-batch, the first training windows.
        held_out: One window that was scored before.
    """

    def train() -> None:
        with torch.enable_grad():
            objective.loss(student, training, range(len(training))).backward()
        for values in (*student.parameters(), *weights.masters.values()):
            values.grad = None

    passing = _second_time(train, training.device) / len(training)
    scoring = _second_time(lambda: objective.score(student, held_out), training.device)
    return Pace(passing, _optimizer_seconds(weights, training.device), scoring)


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
    started = _now(device)
    work()
    again = _now(device)
    if again - started > _LONG_SECONDS:
        return again - started
    work()
    return _now(device) - again


def _now(device: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
