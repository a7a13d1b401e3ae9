"""A draft model in a package: where it lies, what covers it, and what the card says of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from making import ARTIFACT, make

from edgepack.package import read_package, verify
from edgepack.package.speculation import speculation

DRAFT = b"GGUF" + bytes(reversed(range(256)))
# Alphabetically before the artifact: nothing may take the first file for it.
NAME = "model/draft/a-draft-Q4_0.gguf"
RUNTIME: dict[str, Any] = {
    "engine": "llama.cpp",
    "min_version": "2026-08-14 (commit 6fed9f6f)",
    "threads": 4,
    "context": 512,
    "gpu_layers": 0,
}
WITH_DRAFT = RUNTIME | {"draft": {"model": NAME, "length": 4, "type": "draft-simple"}}


def measured(**changes: Any) -> dict[str, Any]:
    return {
        "length": 4,
        "n": 12,
        "drafted": 640,
        "acceptance": {"value": 0.81, "ci95": [0.76, 0.86]},
        "token_acceptance": 0.86,
        "tokens_per_pass": 3.52,
        "speed_up": {"value": 1.61, "ci95": [1.52, 1.7]},
        "alone_tokens_per_s": 20.5,
        "together_tokens_per_s": 33.0,
        "pass_cost": 1.3,
        "draft_cost": 0.16,
        "prompt_ms": 120.0,
        "prompt_with_draft_ms": 140.0,
        "identical": 12,
        "differences": [],
        "tried": [],
        "draft_memory_mb": 210.4,
        "settings": {"prompt_tokens": 64, "tokens": 64, "tuning_prompts": 0},
    } | changes


def record(*, worth: bool, reason: str, **changes: Any) -> dict[str, Any]:
    return {
        "request": {"heal": 200_000, "quantize": "Q4_0", "length": None},
        "prune": {"request": {"depth": 4, "ffn": 512}, "kept_layers": [0, 1, 5, 7]},
        "parameters": 2_000_000,
        "heal": {"tokens": 200_000},
        "bytes": len(DRAFT),
        "measured": measured(),
        "worth_it": worth,
        "basis": "measured",
        "reason": reason,
    } | changes


def fill(model: Path, draft: bytes = DRAFT) -> None:
    (model / "tiny-llama-5m-Q4_K_M.gguf").write_bytes(ARTIFACT)
    (model.parent / NAME).parent.mkdir()
    (model.parent / NAME).write_bytes(draft)


def with_draft(folder: Path, **changes: Any) -> Any:
    recipe = {"quantize": "Q4_K_M", "draft": record(worth=True, reason="worth it: 1.61 times")}
    return make(folder, **({"artifact": fill, "runtime": WITH_DRAFT, "recipe": recipe} | changes))


def test_the_artifact_stays_the_artifact(tmp_path: Path) -> None:
    package = with_draft(tmp_path / "p")
    assert package.manifest["artifact"] == "model/tiny-llama-5m-Q4_K_M.gguf"
    assert read_package(tmp_path / "p").artifact.read_bytes() == ARTIFACT
    assert (tmp_path / "p" / "Modelfile").read_text().startswith("FROM ./model/tiny-llama-5m-Q4_K_M.gguf\n")


def test_the_first_shard_stays_the_artifact(tmp_path: Path) -> None:
    def shards(model: Path) -> None:
        fill(model)
        (model / "tiny-llama-5m-Q4_K_M.gguf").rename(model / "t-00001-of-00002.gguf")
        (model / "t-00002-of-00002.gguf").write_bytes(ARTIFACT)

    package = with_draft(tmp_path / "p", artifact=shards)
    assert package.manifest["artifact"] == "model/t-00001-of-00002.gguf"
    assert verify(tmp_path / "p").whole


def test_every_byte_of_the_draft_is_covered(tmp_path: Path) -> None:
    with_draft(tmp_path / "p")
    assert verify(tmp_path / "p").problems == ()
    (listed,) = [f for f in json.loads((tmp_path / "p/edgepack.json").read_text())["files"] if f["path"] == NAME]
    assert listed == {"path": NAME, "size": len(DRAFT), "sha256": hashlib.sha256(DRAFT).hexdigest()}
    summed = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "p", capture_output=True, text=True)
    assert f"{NAME}: OK" in summed.stdout
    (tmp_path / "p" / NAME).write_bytes(DRAFT[:-1] + b"!")
    assert any(problem.startswith(f"{NAME}: changed") for problem in verify(tmp_path / "p").problems)


def test_the_draft_is_part_of_what_a_device_runs(tmp_path: Path) -> None:
    first, again = with_draft(tmp_path / "a"), with_draft(tmp_path / "b")
    other = with_draft(tmp_path / "c", artifact=lambda model: fill(model, DRAFT + b"."))
    without = make(tmp_path / "d", runtime=RUNTIME)
    assert first.artifact_digest == again.artifact_digest
    assert len({first.artifact_digest, other.artifact_digest, without.artifact_digest}) == 3


def test_a_draft_alone_is_no_package(tmp_path: Path) -> None:
    def only_draft(model: Path) -> None:
        fill(model)
        (model / "tiny-llama-5m-Q4_K_M.gguf").unlink()

    from edgepack.errors import StepError

    with pytest.raises(StepError, match="nothing to package"):
        with_draft(tmp_path / "p", artifact=only_draft)


def test_runtime_names_draft_length_and_kind(tmp_path: Path) -> None:
    with_draft(tmp_path / "p")
    assert json.loads((tmp_path / "p" / "runtime.json").read_text())["draft"] == {
        "model": NAME,
        "length": 4,
        "type": "draft-simple",
    }


def test_the_card_shows_the_figures_and_the_command(tmp_path: Path) -> None:
    with_draft(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_text()
    section = card.split("## Speculative decoding\n")[1].split("\n## ")[0]
    assert section.startswith("\nWorth it: 1.61 times. The draft is the source with 4 layers of 512 neurons, healed on")
    assert "| 4 | 81.0 % (76.0 to 86.0) | 3.52 | 1.61 (1.52 to 1.70) | 20.5 | 33 |" in section
    assert "All 12 answers were the same tokens as without it." in section
    assert (
        "llama-server -m model/tiny-llama-5m-Q4_K_M.gguf -c 512 -t 4 \\\n"
        f"  -md {NAME} --spec-type draft-simple --spec-draft-n-max 4\n"
    ) in section
    made = card.split("## How it was made")[1]
    assert "speed_up" not in made


def section(draft: Mapping[str, Any], runtime: Mapping[str, Any] = RUNTIME) -> str:
    return speculation({"draft": draft}, "model/m.gguf", runtime)


def test_what_is_not_worth_it_says_why_and_names_no_file(tmp_path: Path) -> None:
    draft = record(worth=False, reason="not worth it: 0.80 times the speed without it")
    make(tmp_path / "p", recipe={"quantize": "Q4_K_M", "draft": draft}, runtime=RUNTIME)
    card = (tmp_path / "p" / "README.md").read_text()
    assert "\nNot worth it: 0.80 times the speed without it. " in card
    assert "No draft model is in this package." in card
    assert "spec-draft" not in card
    assert verify(tmp_path / "p").whole
    assert json.loads((tmp_path / "p/edgepack.json").read_text())["recipe"]["draft"] == draft


def test_times_of_another_machine_are_not_measured() -> None:
    times = ("speed_up", "alone_tokens_per_s", "together_tokens_per_s", "draft_cost")
    found = measured(**dict.fromkeys(times))
    text = section(record(worth=True, reason="worth it: predicted", measured=found), WITH_DRAFT)
    assert "| 3.52 | not measured | not measured | not measured |" in text
    assert "a token in the draft" not in text


def test_a_budget_that_is_broken_needs_no_measurement() -> None:
    draft = record(worth=False, reason="not worth it: artifact and draft take 12 MB on disk, the budget is 10")
    for name in ("measured", "bytes", "heal"):
        del draft[name]
    text = section(draft)
    assert "Not worth it: artifact and draft take 12 MB on disk, the budget is 10." in text
    assert "not healed, Q4_0." in text
    assert "|" not in text


def test_answers_that_part_are_counted_with_how_close_it_was() -> None:
    differences = [{"prompt": 1, "token": 7, "ids": [4, 5], "margin": margin} for margin in (0.003, 0.12)]
    text = section(record(worth=False, reason="no", measured=measured(identical=10, differences=differences)))
    assert "10 of 12 answers were the same tokens as without it; the others part" in text
    assert "within 0.12 nats" in text


def test_lengths_that_were_tried_are_shown() -> None:
    tried = [measured(length=length, n=4) for length in (2, 8)]
    text = section(record(worth=True, reason="yes", measured=measured(tried=tried)), WITH_DRAFT)
    assert [line[:4] for line in text.splitlines() if line.startswith("| ") and "%" in line] == ["| 4 ", "| 2 ", "| 8 "]
    assert text.count("4 prompts to choose by") == 2


def test_layers_on_the_accelerator_are_those_of_both_models() -> None:
    text = section(record(worth=True, reason="yes"), WITH_DRAFT | {"gpu_layers": -1})
    assert "-ngl 999" in text
    assert "-ngld 999 --spec-type draft-simple" in text


def test_a_package_without_a_draft_has_no_such_section(tmp_path: Path) -> None:
    make(tmp_path / "p")
    assert "Speculative" not in (tmp_path / "p" / "README.md").read_text()
