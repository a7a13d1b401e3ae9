"""Measuring on a board over ssh, against a stand-in for `ssh` that runs the board's side on this machine."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from edgepack.devices import ssh
from edgepack.errors import MissingError, StepError, UsageError
from edgepack.events import silent

ROW = {"name": "ttft_ms_p90", "value": 12.5, "unit": "ms", "measured_on": "local", "n": 5, "verdict": "pass"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "my package-jetson"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "x.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A board: its `ssh` notes its arguments and runs the last one in a shell; its `edgepack` answers from a file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    log, answer = tmp_path / "ssh.log", tmp_path / "answer"
    document = {"schema_version": 1, "measured_on": {"cpu": "board"}, "measurements": [ROW]}
    answer.write_text(json.dumps(document))
    _script(tools / "ssh", f'printf "%s\\n" "$@" >> {shlex.quote(str(log))}\nfor last; do :; done\nexec sh -c "$last"')
    _script(
        tools / "edgepack",
        'if [ "$1" = --version ]; then echo "edgepack 0.1.0"; exit 0; fi\n'
        f'[ -f "$2/model/x.gguf" ] || exit 9\ncat {answer}',
    )
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def _script(path: Path, body: str) -> None:
    path.write_text("#!/bin/sh\n" + body + "\n")
    path.chmod(0o755)


def measure(
    package: Path, device: str = "ssh://ann@jetson.local:2222"
) -> tuple[list[dict[str, object]], dict[str, object]]:
    return ssh.measure(package, device, overrides=["runtime.threads=6"], listener=silent)


def test_rows_of_the_board_say_where_they_were_measured(board: Path, package: Path) -> None:
    rows, facts = measure(package)
    assert rows == [{"name": "ttft_ms_p90", "value": 12.5, "unit": "ms", "measured_on": "ssh://jetson.local", "n": 5}]
    assert facts == {"cpu": "board"}


def test_host_keys_are_checked_and_no_password_is_asked(board: Path, package: Path) -> None:
    measure(package)
    said = (board / "ssh.log").read_text().splitlines()
    assert {"StrictHostKeyChecking=yes", "BatchMode=yes"} <= set(said)
    assert said[said.index("--") + 1] == "jetson.local"
    assert (said[said.index("-p") + 1], said[said.index("-l") + 1]) == ("2222", "ann")


def test_the_folder_on_the_board_is_removed(board: Path, package: Path) -> None:
    before = set(board.iterdir())
    measure(package)
    assert {path.name for path in set(board.iterdir()) - before} <= {"ssh.log"}


def test_the_folder_is_removed_when_the_measurement_fails(board: Path, package: Path) -> None:
    (board / "answer").unlink()
    before = set(board.iterdir())
    with pytest.raises(StepError, match="status 1"):
        measure(package)
    assert {path.name for path in set(board.iterdir()) - before} <= {"ssh.log"}


@pytest.mark.parametrize(
    "device",
    [
        "ssh://-oProxyCommand=touch${IFS}canary", "ssh://host name", "ssh://a@b@c", "ssh://", "adb://1", "http://host",
        "ssh://host:99999", "ssh://host;true", "ssh://$(true)", "ssh://host/path", "local ",
    ],
)  # fmt: skip
def test_what_is_no_host_never_reaches_ssh(board: Path, package: Path, device: str) -> None:
    with pytest.raises(UsageError, match="is not a device"):
        measure(package, device)
    assert not (board / "ssh.log").exists()


@pytest.mark.parametrize(
    "answer",
    [
        "", "EXIT:0", "[]", '{"schema_version": 1}', '{"schema_version": 2, "measured_on": {}, "measurements": []}',
        '{"schema_version": 1, "measured_on": {}, "measurements": [{"name": "load_ms", "value": "x", "unit": "ms"}]}',
        '{"schema_version": 1, "measured_on": {}, "measurements": [{"name": "load_ms", "value": NaN, "unit": "ms"}]}',
        '\x1b[2J{"schema_version": 1}',
    ],
)  # fmt: skip
def test_an_answer_that_is_no_validation_is_an_error(board: Path, package: Path, answer: str) -> None:
    (board / "answer").write_text(answer)
    with pytest.raises(StepError, match="expected a validation document"):
        measure(package)


def test_a_board_that_does_not_answer_is_a_missing_device(board: Path, package: Path) -> None:
    _script(board / "tools" / "ssh", 'echo "ssh: connect to host jetson.local port 22: No route to host" >&2; exit 255')
    with pytest.raises(MissingError, match="No route to host"):
        measure(package)


def test_a_board_without_edgepack_is_told_apart_from_one_that_does_not_answer(board: Path, package: Path) -> None:
    (board / "tools" / "edgepack").unlink()
    interpreter = Path(sys.executable).parent
    path = [entry for entry in os.environ["PATH"].split(":") if Path(entry) != interpreter]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", ":".join(path))
        with pytest.raises(MissingError, match="not found"):
            measure(package)
