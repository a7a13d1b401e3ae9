"""The learning rate of every step: a linear rise, then a fall along a cosine or a line."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["cosine", "linear"]


def learning_rate(step: int, steps: int, *, peak: float, warmup: int, decay: Decay, final: float) -> float:
    """The learning rate of a step.

    Args:
        step: From 0.
        steps: Of the whole run.
        peak: Highest rate.
        warmup: Steps of the rise; the first has `peak / warmup`.
        decay: Form of the fall.
        final: Share of the peak that the fall tends to at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    fallen = (1 + math.cos(math.pi * part)) / 2 if decay == "cosine" else 1 - part
    return peak * (final + (1 - final) * fallen)
