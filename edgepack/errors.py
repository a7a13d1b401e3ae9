"""Every error edgepack raises on purpose, and the exit code each one ends with.

    EdgepackError            1   a step failed
    ├── StepError            1   a step of a build, a measurement, a worker process
    │   ├── ConformanceError 1   the artifact does not say what its source says
    │   ├── StorageError     1   disk full, not writable, file system error
    │   └── FetchError       1   network, hub, offline
    ├── UsageError           2   wrong arguments, existing output
    │   └── ProfileError     2   a target profile or an override that is not valid
    ├── BudgetError          3   the budgets can't be met; raised before any work
    ├── MissingError         4   a dependency is missing, a device does not answer
    └── InputRefused         5   unsafe, malformed or unsupported input

The library raises these and never exits; only `cli.py` turns one into a line on stderr and an exit status.
"""

from __future__ import annotations

from typing import Any


class EdgepackError(Exception):
    """Root of every error a user may see: one line that says what, where, and what was expected.

    Args:
        message: One line: what is wrong, where (file, tensor, table, key), the value found, what was expected.
        hint: What to do next, as a sentence; printed after the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def as_json(self) -> dict[str, Any]:
        """The `error` object of `--json`; `from_json` reads it back."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class StepError(EdgepackError):
    """A step of a build failed."""


class ConformanceError(StepError):
    """The artifact differs from its source where it must not: token ids, chat rendering, logits."""


class StorageError(StepError):
    """The file system refused: full, read-only, input/output error."""


class FetchError(StepError):
    """A download failed: network, missing revision, offline without a cached copy."""


class UsageError(EdgepackError):
    """The command was given wrong arguments, or an output that exists."""

    exit_code = 2


class ProfileError(UsageError):
    """A target profile, or an override of one of its keys, is not valid."""


class BudgetError(EdgepackError):
    """No build can meet the budgets; raised before any work is done."""

    exit_code = 3


class MissingError(EdgepackError):
    """A dependency is missing or a device can't be reached."""

    exit_code = 4


class InputRefused(EdgepackError):
    """The input is unsafe, malformed or not supported."""

    exit_code = 5


def from_json(document: dict[str, Any]) -> EdgepackError:
    """Rebuild the error that `as_json` described: how a worker process hands its error to the parent."""
    for kind in _descendants(EdgepackError):
        if kind.__name__ == document.get("type"):
            return kind(str(document.get("message", "")), hint=document.get("hint"))
    return StepError(str(document.get("message", document)), hint=document.get("hint"))


def _descendants(kind: type[EdgepackError]) -> list[type[EdgepackError]]:
    return [kind] + [c for child in kind.__subclasses__() for c in _descendants(child)]
