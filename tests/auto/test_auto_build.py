"""`build --auto` from end to end: the model itself where nothing binds, a smaller one where it must be, a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgepack
from edgepack.auto import decide, trials
from edgepack.prune import command

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
QUICK = ["measure.windows=2", "measure.latency=false"]


def candidates(package: edgepack.Package) -> dict[str, dict]:
    plan = json.loads((package.path / "evidence" / "plan.json").read_text())
    assert plan["auto"] == package.manifest["recipe"]["auto"]
    return {row["variant"]: row for row in plan["auto"]["candidates"]}


def test_where_every_budget_is_met_the_model_stays_whole(tmp_path: Path) -> None:
    package = edgepack.build(EXAMPLE, "laptop", tmp_path / "out", auto=True, overrides=QUICK)
    found = candidates(package)
    assert list(found) == ["bits alone"] and found["bits alone"]["outcome"].startswith("chosen")
    assert "prune" not in package.manifest["recipe"] and package.manifest["recipe"]["quantize"] == "Q8_0"


def test_where_bits_alone_do_not_fit_the_best_of_the_smaller_ones_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, few in (
        (command, "WINDOWS", 2),
        (command, "EVALUATION_WINDOWS", 2),
        (trials, "_PRICED_WINDOWS", 4),
        (decide, "MOST_TRIALS", 2),
    ):
        monkeypatch.setattr(module, name, few)
    limits = ["budget.disk_mb=4.1", "budget.mean_kld=20"]
    package = edgepack.build(
        EXAMPLE, "laptop", tmp_path / "out", auto=True, quantize="Q8_0", heal="2k", overrides=[*QUICK, *limits]
    )
    found = candidates(package)
    chosen = package.manifest["recipe"]["auto"]["chosen"]
    assert "on disk" in found["bits alone"]["outcome"] and "on disk" in found["depth=1"]["outcome"]
    tried = {name: row["measured"]["mean_kld"] for name, row in found.items() if row["measured"]}
    assert chosen == min(tried, key=tried.__getitem__) and len(tried) >= 2
    assert package.artifact.stat().st_size <= 4.1e6
    assert package.manifest["recipe"]["prune"]["removed"]["depth"]["of"] == 6
    card = (package.path / "README.md").read_text()
    assert "## Bits, depth or width" in card and "## Step by step" in card
    assert edgepack.verify(package.path).problems == ()


def test_budgets_out_of_reach_are_refused_with_every_reason_and_nothing_is_written(edgepack_command, tmp_path) -> None:
    answer = edgepack_command(
        "build", EXAMPLE, "-t", "laptop", "-o", tmp_path / "out", "--auto", "--set", "budget.disk_mb=1.2", "--json"
    )
    assert answer.returncode == 3 and not (tmp_path / "out").exists()
    error = json.loads(answer.stdout)["error"]
    assert error["exit_code"] == 3 and "bits alone: the smallest candidate" in error["message"]
    assert "depth=1" in error["message"] and "Raise the budget" in error["hint"]
