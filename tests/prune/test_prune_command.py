"""`edgepack prune` and `build --prune` as users run them, and what is left when they fail."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pruning_models import EXAMPLE, answers, bypass, load, make

import edgepack

Run = Callable[..., subprocess.CompletedProcess[str]]


def words(source: Path, output: Path, texts: tuple[Path, Path], *more: str) -> list[str]:
    small = ["--calibration", str(texts[0]), "--evaluation", str(texts[1]), "--windows", "2"]
    return ["prune", str(source), "-o", str(output), *small, *more]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_pruned_folder_with_its_report(edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    answer = edgepack_command(*words(source, tmp_path / "out", small_texts, "--depth", "1", "--json"))
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    gone = document["removed"]["depth"]["layers"]
    assert len(gone) == 1 and document["source"]["files"]["config.json"]
    assert str(tmp_path) not in (tmp_path / "out" / "edgepack-prune.json").read_text()
    expected = answers(bypass(load(source), gone))
    assert (answers(load(tmp_path / "out")) - expected).abs().max() < 1e-5
    again = edgepack_command(*words(tmp_path / "out", tmp_path / "twice", small_texts, "--layers", "0"))
    assert again.returncode == 0, again.stderr
    assert "MFLOP/token" in again.stdout and "next:  edgepack build" in again.stdout
    before = json.loads((tmp_path / "twice" / "edgepack-prune.json").read_text())["pruned_before"]
    assert before["removed"]["depth"]["layers"] == gone


def test_refit_on_the_command_line_says_what_it_brought(
    edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    answer = edgepack_command(*words(source, tmp_path / "out", small_texts, "--layers", "1", "--refit", "--json"))
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert [row["step"] for row in document["steps"]] == ["depth", "refit"] and document["scores"]["refit"]["kept"]
    assert "without layers 1 of 4; refit;" in answer.stderr
    refused = edgepack_command(*words(source, tmp_path / "not", small_texts, "--layers", "0", "--refit"))
    assert refused.returncode == 2 and "no layer is before them" in refused.stderr
    assert "Traceback" not in refused.stderr and left_in(tmp_path) == ["out", "source"]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--depth", "4"], 2, "would leave none"),
        (["--ffn", "100"], 2, "multiple of 32"),
        (["--depth", "1", "--layers", "2"], 2, "both given"),
        ([], 2, "nothing to prune"),
    ],
)
def test_what_can_not_be_done_is_said_at_once(
    more: list[str], status: int, message: str, edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    answer = edgepack_command(*words(source, tmp_path / "out", small_texts, *more))
    assert (answer.returncode, message in answer.stderr) == (status, True), answer.stderr
    assert left_in(tmp_path) == ["source"]


def test_an_output_that_exists_is_left_alone(
    edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    answer = edgepack_command(*words(EXAMPLE, tmp_path / "out", small_texts, "--depth", "1"))
    assert answer.returncode == 2 and "exists" in answer.stderr
    assert left_in(tmp_path / "out") == ["mine"]


def test_a_gguf_is_refused_with_what_to_do(
    edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    answer = edgepack_command(*words(tmp_path / "model.gguf", tmp_path / "out", small_texts, "--depth", "1"))
    assert answer.returncode == 5 and "Prune the Hugging Face folder" in answer.stderr


def test_evaluation_text_can_not_be_chosen_on(
    edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    answer = edgepack_command(*words(EXAMPLE, tmp_path / "out", (small_texts[1], small_texts[1]), "--depth", "1"))
    assert answer.returncode == 5 and "is the evaluation text" in answer.stderr
    assert left_in(tmp_path) == []


def test_a_full_disk_leaves_nothing(small_texts: tuple[Path, Path], tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    source = make("llama", tmp_path / "source")
    command = [sys.executable, "-m", "edgepack.cli", *words(source, tmp_path / "out", small_texts, "--layers", "1")]
    answer = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, timeout=120)
    assert answer.returncode == 1
    assert "model.safetensors" in answer.stderr or "out" in answer.stderr
    assert left_in(tmp_path) == ["source"]


def test_killed_half_way_nothing_half_written_stays(
    edgepack_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "source")
    arguments = words(source, tmp_path / "out", small_texts, "--layers", "1")
    command = [sys.executable, "-m", "edgepack.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.partial-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    answer = edgepack_command(*arguments)
    assert answer.returncode == 0, answer.stderr
    assert left_in(tmp_path) == ["out", "source"]


def test_a_build_prunes_first_and_measures_against_the_original(small_texts: tuple[Path, Path], tmp_path: Path) -> None:
    quick = ["measure.windows=2", "measure.latency=false"]
    built = {
        "evaluation": small_texts[1],
        "overrides": quick,
        "quantize": "Q8_0",
    }
    package = edgepack.build(EXAMPLE, "laptop", tmp_path / "out", prune="layers=2,ffn=512", **built)
    manifest = package.manifest
    assert manifest["recipe"]["prune"]["kept_layers"] == [0, 1, 3, 4, 5]
    steps = manifest["recipe"]["prune"]["steps"]
    assert [step["step"] for step in steps] == ["source", "depth", "ffn"]
    assert "model.safetensors" in manifest["source"]["files"]
    rows = {row.name: row.value for row in package.measurements}
    # llama.cpp's windows are not those of the report, and Q8_0 costs next to nothing
    assert rows["mean_kld"] == pytest.approx(steps[-1]["mean_kld"], rel=0.3)
    conformance = json.loads((package.path / "evidence" / "validation.json").read_text())["conformance"]
    assert conformance["logits"]["compared"] and conformance["logits"]["mean_kld"] < 1e-6
    assert edgepack.verify(package.path).problems == ()
    report = (package.path / "evidence" / "report.html").read_text()
    assert "Step by step" in report


def test_a_dry_run_can_not_say_what_pruning_would_choose(edgepack_command: Run) -> None:
    answer = edgepack_command("build", EXAMPLE, "-t", "laptop", "--prune", "depth=1", "--dry-run")
    assert answer.returncode == 2 and "edgepack plan DIR" in answer.stderr
