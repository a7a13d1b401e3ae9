"""SIGTERM and SIGHUP as an exception that no library can swallow for good.

Python raises what a handler raises wherever the program happens to be: also inside a destructor, or under a bare
`except` of a library that is being imported, where it is lost. So the signal is remembered, and work that is about to
begin or goes on for long asks (`check`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_arrived: list[int] = []


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; unwinds like Ctrl-C does: workers are stopped, temporary folders removed.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise `Terminated`; afterwards handlers are what they were."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
            signal.signal(number, _terminate)
    try:
        yield
    finally:
        _arrived.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise `Terminated` again where a signal arrived whose exception was lost; not to be asked by clean-up code."""
    if _arrived:
        raise Terminated(_arrived[0])


def _terminate(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    raise Terminated(number)
