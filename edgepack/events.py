"""What a long-running call tells whoever is watching: steps that start, progress, and finish.

The library emits events and never prints; `console.py` turns them into lines and bars on stderr.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from edgepack import interrupts


@dataclass(frozen=True)
class Event:
    """One thing that happened in a build.

    Args:
        kind: `start`, `progress`, `done` or `note` (something a person should know, such as a fallback).
        step: The step's name as users know it: `export`, `fidelity`.
        detail: One short phrase: what the step works on, or what came out.
        done: Work done so far, in `unit`.
        total: All the work, in `unit`; 0 when unknown.
        unit: `bytes`, `windows`, `runs`.
        seconds: Duration, on `done`.
        cached: True when the result was taken from the store.
    """

    kind: Literal["start", "progress", "done", "note"]
    step: str
    detail: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds: float = 0.0
    cached: bool = False


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing: the default of every library call."""


@dataclass
class StepHandle:
    """What the code inside `step` uses to report; `outcome` becomes the detail of the `done` event."""

    name: str
    unit: str
    listener: Listener
    outcome: str = ""
    cached: bool = False
    _last: float = field(default=0.0, repr=False)

    def progress(self, done: int, total: int) -> None:
        """Report progress at most ten times a second; the last report always passes."""
        now = time.monotonic()
        if done < total and now - self._last < 0.1:
            return
        self._last = now
        self.listener(Event("progress", self.name, done=done, total=total, unit=self.unit))


@contextmanager
def step(listener: Listener, name: str, detail: str = "", *, unit: str = "") -> Iterator[StepHandle]:
    """Announce a step, hand out its progress callback, and report how long it took.

    A step that raises reports no `done`: the error itself is the report.
    """
    interrupts.check()
    listener(Event("start", name, detail, unit=unit))
    started = time.monotonic()
    handle = StepHandle(name, unit, listener)
    yield handle
    listener(Event("done", name, handle.outcome, seconds=time.monotonic() - started, cached=handle.cached))
