"""Healing a damaged model of the example's own architecture by the example."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "prune"))
from pruning_models import cut, make

from edgepack.calibrate.texts import calibration_text, resolve
from edgepack.errors import InputRefused, UsageError
from edgepack.heal import command, worker
from edgepack.heal.distill import distill
from edgepack.heal.written import write_model
from edgepack.text import default_evaluation_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with noise on the matrices of two layers."""
    folder = tmp_path_factory.mktemp("damaged") / "student"
    shutil.copytree(EXAMPLE, folder)
    generator = torch.Generator().manual_seed(3)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, values in tensors.items():
            if ".layers.2." in name or ".layers.3." in name:
                noise = torch.randn(values.shape, generator=generator) * values.float().std()
                tensors[name] = (values.float() + 0.6 * noise).to(values.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def healed(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPACK_CACHE", str(tmp_path_factory.mktemp("store")))
        return command.heal(damaged, EXAMPLE, tmp_path_factory.mktemp("out") / "healed", "8k")


def perplexity(folder: Path) -> float:
    """Of transformers, on the first evaluation windows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(default_evaluation_text().read_text(encoding="utf-8")[:12_000])
    windows = torch.tensor(ids["input_ids"][: 4 * 512]).reshape(4, 512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(windows, labels=windows).loss.exp())


def test_a_healed_model_is_nearer_to_its_teacher_by_transformers_own_word(damaged: Path, healed: tuple) -> None:
    folder, report = healed
    assert report["after"]["kld"] < 0.9 * report["before"]["kld"]
    assert report["difference"]["ci95"][1] < 0
    before, after, teacher = (perplexity(path) for path in (damaged, folder, EXAMPLE))
    assert teacher < after < 0.95 * before


def test_the_report_says_what_came_back_on_text_that_nothing_was_tuned_on(damaged: Path, healed: tuple) -> None:
    folder, report = healed
    found = report["evaluation"]
    # perplexities of transformers' own loss, over other positions of the same text
    for key, path in (("teacher", EXAMPLE), ("before", damaged), ("after", folder)):
        assert found[key]["perplexity"] == pytest.approx(perplexity(path), rel=0.35)
    assert found["before"]["mean_kld"] > found["after"]["mean_kld"] > 0
    lost, left = (math.log(found[key]["perplexity"] / found["teacher"]["perplexity"]) for key in ("before", "after"))
    assert found["recovered"]["log_likelihood"] == pytest.approx(1 - left / lost, abs=1e-3)
    share = 1 - found["after"]["mean_kld"] / found["before"]["mean_kld"]
    assert found["recovered"]["kld"] == pytest.approx(share, abs=1e-3)
    assert found["text"] == default_evaluation_text().name


def test_the_healed_folder_has_the_students_files_names_and_formats(damaged: Path, healed: tuple) -> None:
    folder, report = healed
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*(path.name for path in damaged.iterdir()), command.SIDECAR])
    assert json.loads((folder / command.SIDECAR).read_text()) == report
    ours, theirs = (
        {k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (folder, damaged)
    )
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}


def test_a_short_text_is_passed_often_and_renewed_from_the_teacher_each_time(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions: list[torch.Tensor] = []

    def watched(student: Any, objective: Any, training: torch.Tensor, *others: Any, **options: Any) -> Any:
        renewed = options.pop("renewed")

        def watch(windows: torch.Tensor, version: int) -> torch.Tensor:
            found: torch.Tensor = renewed(windows, version)
            if len(windows) == len(training):  # not the one window that is timed before the start
                versions.append(found)
            return found

        versions.append(training)
        return distill(student, objective, training, *others, renewed=watch, **options)

    monkeypatch.setattr(worker, "distill", watched)
    (tmp_path / "text.txt").write_text(calibration_text(None, EXAMPLE).text[:8000], encoding="utf-8")
    for name in ("out", "journal"):
        (tmp_path / name).mkdir()
    report = worker.heal(
        model=str(damaged), teacher=str(EXAMPLE), folder=str(tmp_path / "out"), tokens=10_000,
        text=resolve(str(tmp_path / "text.txt")).as_json(), evaluation=str(default_evaluation_text()), threads=1,
        journal=str(tmp_path / "journal"),
    )  # fmt: skip
    assert report["passes"] == pytest.approx(report["tokens"] / versions[0].numel(), abs=0.01)
    assert len(versions) == math.ceil(report["passes"]) > 2
    for old, new in itertools.pairwise(versions):
        assert 0.2 < float((old != new).float().mean()) < 0.6  # half of them, less those drawn again


def test_an_untrained_model_is_written_as_it_was(tmp_path: Path) -> None:
    from edgepack.calibrate.layers import load_model
    from edgepack.checkpoint import open_checkpoint

    write_model(open_checkpoint(EXAMPLE), load_model(EXAMPLE), tmp_path)
    for file in EXAMPLE.glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_can_not_be_healed_is_refused_before_any_work(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a number of tokens"):
        command.heal(damaged, EXAMPLE, tmp_path / "a", "many")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    with pytest.raises(UsageError, match="there"):
        command.heal(damaged, EXAMPLE, tmp_path / "there", "8k")
    other = tmp_path / "other"
    shutil.copytree(EXAMPLE, other)
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 4096}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match="vocabulary of 4096"):
        command.heal(other, EXAMPLE, tmp_path / "b", "8k")


def test_text_that_is_measured_on_is_refused(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "store"))
    with pytest.raises(InputRefused, match="evaluation text"):
        command.heal(damaged, EXAMPLE, tmp_path / "a", "8k", options=command.Options(str(default_evaluation_text())))
    assert not (tmp_path / "a").exists()


def test_killed_half_way_the_same_command_ends_with_the_same_bytes(damaged: Path, tmp_path: Path) -> None:
    def command_line(name: str) -> tuple[list[str], dict[str, str]]:
        words = ["heal", damaged, "--teacher", EXAMPLE, "--tokens", "4k", "-o", tmp_path / name, "-q"]
        store = {"EDGEPACK_CACHE": str(tmp_path / f"store-{name}")}
        return [sys.executable, "-m", "edgepack.cli", *map(str, words)], os.environ | store

    whole, environment = command_line("whole")
    assert subprocess.run(whole, env=environment, capture_output=True).returncode == 0
    arguments, environment = command_line("killed")
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "store-killed").glob("journals/*/state.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    assert subprocess.run(arguments, env=environment, capture_output=True).returncode == 0
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def test_an_encoder_is_healed_by_its_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "store"))
    teacher = make("bert", tmp_path / "teacher")
    student = cut(teacher, tmp_path / "student", layers=(0, 1, 3))
    folder, report = command.heal(student, teacher, tmp_path / "healed", "8k")
    rows = report["evaluation"]
    assert rows["after"]["cosine_mean"] > rows["before"]["cosine_mean"]
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    with pytest.raises(InputRefused, match="is an encoder"):
        command.heal(student, EXAMPLE, tmp_path / "mixed", "20k")
