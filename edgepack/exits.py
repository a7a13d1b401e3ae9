"""How a run of the command line ends: every error as one line, with the exit status that scripts rely on."""

from __future__ import annotations

import os
import signal

import click

from edgepack import console
from edgepack.errors import EdgepackError, StepError, UsageError
from edgepack.interrupts import Terminated, termination_raises


def run(command: click.Command, argv: list[str]) -> int:
    """Run a command; every error becomes one line on stderr (and a document on stdout with `--json`).

    Args:
        command: The whole command line.
        argv: Arguments without the program name.

    Returns:
        The exit status.
    """
    console.accept_any_text()
    as_json = "--json" in argv
    debug = bool(os.environ.get("EDGEPACK_DEBUG"))
    try:
        with termination_raises():
            status = command.main(args=argv, prog_name="edgepack", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else 1
    except click.exceptions.NoArgsIsHelpError as error:
        console.emit_note(error.ctx.get_help())
        return UsageError.exit_code
    except click.ClickException as error:
        return _fail(_usage_error(error), as_json)
    except EdgepackError as error:
        if debug:
            raise
        return _fail(error, as_json)
    except click.Abort:  # what click makes of Ctrl-C
        return _fail(_interrupted("interrupted"), as_json, 128 + signal.SIGINT)
    except Terminated as stop:
        return _fail(_interrupted("terminated"), as_json, 128 + stop.number)
    except Exception as error:
        if debug:
            raise
        return _fail(_unexpected(error), as_json)


def _fail(error: EdgepackError, as_json: bool, status: int | None = None) -> int:
    status = error.exit_code if status is None else status
    console.emit_error(error, as_json=as_json, status=status)
    return status


def _interrupted(how: str) -> EdgepackError:
    return EdgepackError(how, hint="Finished steps are kept: run the same command to go on.")


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    hint = f"See {context.command_path} --help." if context else None
    return UsageError(error.format_message(), hint=hint)


def _unexpected(error: Exception) -> EdgepackError:
    if isinstance(error, OSError):
        from edgepack.files import storage_error

        return storage_error(error)
    if isinstance(error, MemoryError):
        return StepError(
            "out of memory", hint="Close other programs, or lower runtime.context and measure.windows with --set."
        )
    hint = "This is a defect in edgepack; run again with EDGEPACK_DEBUG=1 and report the traceback."
    return StepError(f"{type(error).__name__}: {error}", hint=hint)
