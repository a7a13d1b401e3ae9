"""The command line as a user meets it: a process, its stdout, its stderr, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgepack.cli import cli

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "tiny-llama-5m"


def edgepack(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgepack.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def test_help_answers_in_under_0_3_seconds() -> None:
    def once() -> float:
        started = time.perf_counter()
        assert edgepack("--help").returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.3


def test_help_imports_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "transformers", "llama_cpp", "rich", "tokenizers", "huggingface_hub"}
    code = f"import sys, edgepack.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_python_m_edgepack_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "edgepack", "nonsense"], capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert done.stderr == edgepack("nonsense").stderr


def commands(group: click.Group, *before: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)
        else:
            yield [*before, name]


@pytest.mark.parametrize("command", list(commands(cli)), ids=" ".join)
def test_every_command_has_help_that_says_what_it_does(command: list[str]) -> None:
    answer = edgepack(*command, "--help")
    assert answer.returncode == 0
    assert len(answer.stdout.splitlines()[2].strip()) > 20


def test_a_mistyped_command_is_a_usage_error_with_a_suggestion() -> None:
    answer = edgepack("biuld", "x")
    assert answer.returncode == 2
    assert "build" in answer.stderr and "Traceback" not in answer.stderr


def test_a_mistyped_target_is_refused_with_the_nearest_name() -> None:
    answer = edgepack("plan", str(EXAMPLE), "-t", "labtop")
    assert answer.returncode == 2
    assert "laptop" in answer.stderr


def test_an_error_is_one_json_document_on_stdout_too() -> None:
    answer = edgepack("plan", str(EXAMPLE), "-t", "labtop", "--json")
    document = json.loads(answer.stdout)
    assert document["schema_version"] == 1
    assert document["error"]["exit_code"] == answer.returncode == 2


def test_a_usage_error_of_the_parser_is_a_json_document_too() -> None:
    answer = edgepack("plan", "--json")
    assert json.loads(answer.stdout)["error"]["type"] == "UsageError"
    assert answer.returncode == 2


def test_a_model_that_is_nowhere_is_named() -> None:
    answer = edgepack("plan", "./no-such-model", "-t", "laptop")
    assert answer.returncode == 2
    assert "no-such-model" in answer.stderr and "Traceback" not in answer.stderr


def test_a_plan_names_the_quantization_and_its_cost_without_writing_anything(tmp_path: Path) -> None:
    answer = edgepack("plan", str(EXAMPLE), "-t", "laptop", "--json", EDGEPACK_CACHE=str(tmp_path / "store"))
    document = json.loads(answer.stdout)
    assert answer.returncode == 0, answer.stderr
    assert document["feasible"] and document["prediction"]["artifact_bytes"] > 1_000_000
    assert document["quantize"] in {candidate["quantize"] for candidate in document["candidates"]}
    assert not (tmp_path / "store").exists()


def test_a_plan_that_can_not_fit_ends_with_status_3_and_says_by_how_much() -> None:
    answer = edgepack("plan", str(EXAMPLE), "-t", "laptop", "--set", "budget.disk_mb=1")
    assert answer.returncode == 3
    assert "Q2_K" in answer.stderr and "over the budget" in answer.stderr and "would fit" in answer.stderr


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    output = tmp_path / "package"
    answer = edgepack(
        "build", str(EXAMPLE), "-t", "laptop", "-o", str(output), "--dry-run", EDGEPACK_CACHE=str(tmp_path / "store")
    )
    assert answer.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_never_replaced_without_force(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.txt").write_text("precious")
    answer = edgepack("build", str(EXAMPLE), "-t", "laptop", "-o", str(tmp_path / "package"))
    assert answer.returncode == 2
    assert "--force" in answer.stderr
    assert (tmp_path / "package" / "mine.txt").read_text() == "precious"


def test_targets_show_prints_toml_that_loads_again(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_text(edgepack("targets", "show", "jetson").stdout)
    assert edgepack("plan", str(EXAMPLE), "-t", str(copy)).returncode == 0


def test_no_colour_codes_reach_a_pipe() -> None:
    assert "\x1b[" not in edgepack("targets", "list").stdout


def test_no_command_at_all_shows_the_help_with_its_examples_on_lines_of_their_own() -> None:
    answer = edgepack()
    assert answer.returncode == 2 and answer.stdout == ""
    lines = [line.strip() for line in answer.stderr.splitlines()]
    assert lines[0].startswith("Usage: edgepack")
    assert "edgepack build ./my-model -t laptop" in lines and "\\b" not in answer.stderr


@pytest.mark.parametrize("command", [["targets", "show", "laptop"], ["plan", str(EXAMPLE), "-t", "laptop", "--json"]])
def test_a_result_that_can_not_be_written_is_one_line_and_status_1(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgepack.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "edgepack: error: No space left on device"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_build_with_its_status_one_document_and_nothing_half_written(
    number: signal.Signals, tmp_path: Path
) -> None:
    build = subprocess.Popen(
        [sys.executable, "-m", "edgepack.cli", "build", str(EXAMPLE), "-t", "laptop", "-o", "out", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"EDGEPACK_CACHE": str(tmp_path / "store"), "PYTHONPATH": str(EXAMPLE.parents[2])},
    )
    assert build.stderr is not None
    while not list(tmp_path.glob("store/tmp/*/*.gguf")):
        assert build.poll() is None
        time.sleep(0.01)
    build.send_signal(number)
    stdout, stderr = build.communicate(timeout=60)
    assert build.returncode == 128 + number
    assert json.loads(stdout)["error"]["exit_code"] == 128 + number
    assert "run the same command to go on" in stderr and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_the_terminal_can_not_show_is_escaped_and_json_stays_json(encoding: str, tmp_path: Path) -> None:
    folder = tmp_path / "größe ≤ 1"
    folder.mkdir()
    for number, options in enumerate(([], ["--json"])):
        copy = folder / f"mine-{number}.toml"
        done = subprocess.run(
            [sys.executable, "-m", "edgepack.cli", "targets", "copy", "laptop", str(copy), *options],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        if options:
            assert json.loads(done.stdout.decode(encoding))["path"] == str(copy)
