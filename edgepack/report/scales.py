"""From values to places on a picture and back to round numbers on its axes. Knows nothing of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgepack.figures import significant


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis.

    Args:
        low: Value at `start`; above 0 for a logarithmic one.
        high: Value at `stop`; above `low`.
        start: Coordinate of `low`.
        stop: Coordinate of `high`; less than `start` for an axis that points up the screen.
        logarithmic: Equal ratios have equal lengths.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value; values beyond an end stand at the end."""
        inside = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values from end to end, at most `most`."""
        return _log_ticks(self.low, self.high, most) if self.logarithmic else _ticks(self.low, self.high, most)


def _ticks(low: float, high: float, most: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [significant(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in decades for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def spanning(values: Sequence[float], *, logarithmic: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """Ends of an axis that holds all values with a margin, and has a length even for one value or none.

    Args:
        values: Finite; those that a logarithmic axis can't show are left out.
        logarithmic: For a logarithmic axis.
        margin: Share of the length added at each end.
    """
    shown = [value for value in values if value > 0] if logarithmic else list(values)
    if not shown:
        return (0.001, 1.0) if logarithmic else (0.0, 1.0)
    low, high = min(shown), max(shown)
    if logarithmic:
        room = max((high / low) ** margin, 1.05)
        return (low / room, high * room) if high > 1.5 * low else (low / 2, high * 2)
    apart = high - low > 1e-9 * max(abs(low), abs(high))
    room = (high - low) * margin if apart else abs(high) * 0.1 or 1.0
    return low - room, high + room
