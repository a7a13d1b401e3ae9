"""Measure a package on a board over ssh: `ssh://[user@]host[:port]`.

The board runs edgepack itself (`pip install edgepack` there once; its llama-cpp-python may be a CUDA build). This side
copies the package into a private temporary folder, asks the board to validate it against its own clock and memory,
reads one JSON document back, and removes the folder. OpenSSH does the talking: keys, agents and host-key checks are the
user's own; there is no switch that turns the host-key check off, and no password is ever asked for.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import MissingError, StepError, UsageError
from edgepack.events import Listener, step
from edgepack.judgement import SPEED

# The board's answer is a table of a few dozen rows (knowledge of a hostile board: it may send anything).
ANSWER_BYTES = 16 << 20
# ssh's own status for "could not connect", ssh(1).
SSH_FAILED = 255
MEASURE_SECONDS = 3600
COPY_SECONDS = 3600
SHORT_SECONDS = 30

_DEVICE = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]{0,31})@)?(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:]+\])(?::(?P<port>\d{1,5}))?"
)
_OPTIONS = [
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "StrictHostKeyChecking=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
]


@dataclass(frozen=True)
class Board:
    """Where to connect: parsed from the device URL, so that no part of it can be taken for an option."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def url(self) -> str:
        """The device as it stands in `measured_on`."""
        return f"ssh://{self.host}"

    def command(self, remote: str) -> list[str]:
        """Arguments that run one shell line on the board."""
        login = [item for flag, value in (("-l", self.user), ("-p", self.port)) if value for item in (flag, str(value))]
        return ["ssh", *_OPTIONS, *login, "--", self.host.strip("[]"), remote]


def parse(device: str) -> Board:
    """Read `ssh://[user@]host[:port]`.

    Raises:
        UsageError: Anything else.
    """
    found = _DEVICE.fullmatch(device)
    if found is None or not 0 < int(found["port"] or 22) < 65536:
        raise UsageError(
            f"--device {device!r} is not a device",
            hint="Expected local, or ssh://[user@]host[:port] as in ssh://jetson.local.",
        )
    return Board(found["host"], found["user"], int(found["port"]) if found["port"] else None)


def measure(
    package: Path, device: str, *, overrides: Sequence[str], listener: Listener
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Speed and memory of `package` on a board.

    Args:
        package: A whole package folder.
        device: `ssh://[user@]host[:port]`.
        overrides: `key=value` pairs on the package's profile.
        listener: Told about the copy and the measurement.

    Returns:
        Rows of the board with `measured_on` set to it, and the board's facts about itself.

    Raises:
        MissingError: ssh is not installed, the board does not answer, or has no edgepack.
        StepError: The measurement failed there, or its answer is not a validation.
    """
    board = parse(device)
    with step(listener, "connect", board.url) as handle:
        version = _run(board, "edgepack --version", SHORT_SECONDS).decode("utf-8", "replace").strip()
        folder = _run(board, "mktemp -d", SHORT_SECONDS).decode("utf-8", "replace").strip()
        if not re.fullmatch(r"/[A-Za-z0-9._/-]+", folder):
            raise StepError(f"{board.url}: mktemp -d answered {folder[:80]!r}, expected a folder")
        handle.outcome = version[:80]
    try:
        with step(listener, "copy", f"{package.name} to {board.url}"):
            _copy(board, package, folder)
        with step(listener, "latency", f"on {board.url}"):
            answer = _validate(board, folder, overrides)
    finally:
        _run(board, f"rm -rf -- {shlex.quote(folder)}", SHORT_SECONDS)
    rows = [
        row | {"measured_on": board.url}
        for row in answer["measurements"]
        if row["name"] in SPEED and row["value"] is not None
    ]
    return [{key: row[key] for key in row if key not in ("budget", "verdict", "predicted")} for row in rows], answer[
        "measured_on"
    ]


def _copy(board: Board, package: Path, folder: str) -> None:
    archive = ["tar", "-C", str(package.parent.resolve()), "-cf", "-", "--", package.resolve().name]
    with subprocess.Popen(archive, stdout=subprocess.PIPE) as sender:
        try:
            _run(
                board,
                f"tar -C {shlex.quote(folder)} -xf - && mv -- {shlex.quote(folder)}/* {shlex.quote(folder)}/package",
                COPY_SECONDS,
                stdin=sender.stdout,
            )
        finally:
            sender.kill()


def _validate(board: Board, folder: str, overrides: Sequence[str]) -> dict[str, Any]:
    settings = [
        word
        for pair in (*overrides, "measure.fidelity=false", "device.is_this_machine=true")
        for word in ("--set", pair)
    ]
    remote = shlex.join(["edgepack", "validate", f"{folder}/package", "--on-target", "--json", "--quiet", *settings])
    return _checked(board, _run(board, remote, MEASURE_SECONDS, accept=(0, 3)))


def _checked(board: Board, answer: bytes) -> dict[str, Any]:
    """The board's document, or an error: it is input like any other."""
    try:
        document = json.loads(answer)
        rows = document["measurements"]
        sound = (
            document["schema_version"] == 1 and isinstance(document["measured_on"], Mapping) and all(map(_is_row, rows))
        )
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise StepError(f"{board.url}: edgepack there answered {answer[:80]!r}, expected a validation document")
    return dict(document)


def _is_row(row: Any) -> bool:
    number = (
        isinstance(row["value"], int | float) and not isinstance(row["value"], bool) and row["value"] == row["value"]
    )
    return isinstance(row["name"], str) and isinstance(row["unit"], str) and (row["value"] is None or number)


def _run(
    board: Board, remote: str, seconds: float, *, accept: Sequence[int] = (0,), stdin: Any = subprocess.DEVNULL
) -> bytes:
    """Run one shell line on the board and return its stdout."""
    try:
        done = subprocess.run(board.command(remote), stdin=stdin, capture_output=True, timeout=seconds)
    except FileNotFoundError:
        raise MissingError("ssh is not installed", hint="Install the OpenSSH client.") from None
    except subprocess.TimeoutExpired:
        raise StepError(f"{board.url}: no answer within {seconds:.0f} s to: {remote[:60]}") from None
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    last = words[-1][:200] if words else "no message"
    if done.returncode == SSH_FAILED:
        raise MissingError(f"{board.url} does not answer: {last}", hint=f"Try: ssh {board.host} true")
    if done.returncode == 127:
        raise MissingError(
            f"{board.url}: {last}", hint="Install edgepack on the board and put it on the PATH of its login shell."
        )
    if done.returncode not in accept:
        raise StepError(f"{board.url}: {remote.split()[0]} ended with status {done.returncode}: {last}")
    if len(done.stdout) > ANSWER_BYTES:
        raise StepError(f"{board.url}: an answer of {len(done.stdout)} bytes, expected at most {ANSWER_BYTES}")
    return done.stdout
