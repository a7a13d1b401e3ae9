"""`--size`, `--bpw` and `--calibration` as a user meets them: stdout, stderr, exit status."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("options", "name"),
    [(("--bpw", "4.5"), "4.50bpw"), (("--size", "3MB"), "3MB"), (("--size", "2900000"), "2900000B"),
     (("--size", "2.75 MiB"), "2.75MiB"), (("--quantize", "4.25bpw"), "4.25bpw"), (("--bpw", "4.5678"), "4.5678bpw"),
     (("--quantize", "q4_k_m"), "Q4_K_M")],
)  # fmt: skip
def test_a_size_may_be_given_in_any_way_people_write_it(
    edgepack_command: Run, example: Path, options: tuple[str, str], name: str
) -> None:
    done = edgepack_command("plan", example, "-t", "laptop", *options, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["quantize"] == name and document["chosen_by"] == "command line"
    bits = float(options[1]) if options[0] == "--bpw" else 9.0
    assert document["prediction"]["bits_per_weight"] <= bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "3MB", "--bpw", "4.5"), "--size and --bpw say different things"),
        (("--quantize", "Q4_K_M", "--size", "3MB"), "--quantize and --size say different things"),
        (("--size", "4.5bpw"), "Say --bpw 4.5"),
        (("--size", "Q4_K_M"), "size 'Q4_K_M': expected a number"),
        (("--size", "0MB"), "size '0MB': expected a number"),
        (("--size", "3TB"), "size '3TB': expected a number"),
        (("--bpw", "0"), "--bpw"),
        (("--bpw", "-2"), "--bpw"),
        (("--bpw", "nan"), "expected a number"),
        (("--bpw", "inf"), "expected a number"),
        (("--bpw", "4.5", "--calibration", "missing.txt"), "missing.txt: no such calibration text"),
    ],
)
def test_a_size_that_is_none_is_wrong_usage(
    edgepack_command: Run, example: Path, options: tuple[str, ...], message: str
) -> None:
    done = edgepack_command("plan", example, "-t", "laptop", *options)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [("--size", "100KB"), ("--bpw", "0.00001")])
def test_a_size_that_can_t_be_reached_exits_with_3_and_says_what_can(
    edgepack_command: Run, example: Path, options: tuple[str, str]
) -> None:
    done = edgepack_command("plan", example, "-t", "laptop", *options, "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert "are too few for this model" in error["message"] and "The least is" in error["hint"]


def test_a_plan_that_fills_a_budget_takes_no_longer_than_another(edgepack_command: Run, example: Path) -> None:
    before = os.times()
    done = edgepack_command("plan", example, "-t", "laptop", "--set", "budget.disk_mb=3.2")
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5
    assert done.returncode == 0
    assert "chosen by: budgets" in done.stdout and "windows of 512 tokens" in done.stdout
