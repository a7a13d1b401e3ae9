"""The only module that prints: results on stdout, steps and progress and errors on stderr.

Progress bars appear only when stderr is a terminal. Colour obeys NO_COLOR and TERM=dumb (rich's own rules).
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Any

from edgepack.errors import EdgepackError
from edgepack.events import Event

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

SCHEMA_VERSION = 1


def accept_any_text() -> None:
    """Let stdout and stderr take every character: what their encoding lacks is shown as an escape, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout, `schema_version` first."""
    body = {"schema_version": SCHEMA_VERSION} | dict(document)
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    emit_text(json.dumps(body, ensure_ascii=escaped, indent=2, allow_nan=False))


def emit_text(text: str) -> None:
    """Print text on stdout as it is, at once: a full disk or a closed pipe is an error here, not at exit."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except OSError:
        # Python flushes again at exit, and would complain of the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def emit_error(error: EdgepackError, *, as_json: bool, status: int) -> None:
    """Print an error: one line and its hint on stderr; with `as_json` also one document on stdout.

    Args:
        error: What went wrong.
        as_json: Whether stdout gets a document.
        status: The exit status that the command ends with.
    """
    if as_json:
        emit_json({"error": error.as_json() | {"exit_code": status}})
    sys.stderr.write(f"edgepack: error: {one_line(error.message)}\n")
    if error.hint:
        sys.stderr.write(f"  {one_line(error.hint)}\n")


def emit_note(text: str) -> None:
    """Print a line for people on stderr."""
    sys.stderr.write(text + "\n")


def one_line(text: str) -> str:
    """Text from files and tools, made safe for a terminal: one line, control characters shown as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip().replace("\n", "; ")
    )


def emit_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table on stdout; columns whose every cell starts with a digit or sign are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index] not in ("", "-")]
        numeric = bool(cells) and all(cell[:1].isdigit() or cell[:1] in "+-±~≤≥" for cell in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    _fill(table, rows)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    with console.capture() as printed:
        console.print(table)
    emit_text(printed.get())


def _fill(table: Table, rows: Sequence[Sequence[str]]) -> None:
    from rich.text import Text

    styles = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "not measured": "yellow"}
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))


class StepPrinter:
    """A listener that shows events on stderr: a bar while a step works, a line when it is done.

    Args:
        quiet: Show nothing.
        verbose: Show starts too, with their details.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._lock = RLock()  # steps may run side by side
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if not self.quiet:
            with self._lock:
                self._show(event)

    def _show(self, event: Event) -> None:
        if event.kind == "start":
            self._start(event)
        elif event.kind == "progress" and self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=event.done, total=event.total or None)
        elif event.kind == "done":
            self.close()
            timing = "from the store" if event.cached else f"{event.seconds:.1f} s"
            emit_note(f"  {event.step:<10} {one_line(event.detail)}  ({timing})")
        elif event.kind == "note":
            emit_note(f"  {event.step:<10} {one_line(event.detail)}")

    def close(self) -> None:
        """Take the bar off the screen; safe to call at any time."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
        self._bar = self._task = None

    def _start(self, event: Event) -> None:
        self.close()
        if self.verbose:
            emit_note(f"  {event.step:<10} {one_line(event.detail)} ...")
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        amount = (DownloadColumn(), TransferSpeedColumn()) if event.unit == "bytes" else (MofNCompleteColumn(),)
        self._bar = Progress(
            TextColumn("  {task.description:<10}"),
            BarColumn(bar_width=30),
            *amount,
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(event.step, total=None)
        self._bar.start()
