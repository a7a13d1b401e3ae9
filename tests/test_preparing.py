"""Pruning and healing before a build: the order, what is refused, and the record of every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgepack
from edgepack.errors import UsageError
from edgepack.preparing import Wish, _in_order, check
from edgepack.prune.request import Request, parse

EXAMPLE = Path(__file__).parents[1] / "examples" / "models" / "tiny-llama-5m"


def test_healing_without_pruning_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(UsageError, match="nothing is pruned") as refused:
        check(Wish(None, 2048))
    assert "edgepack heal" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="nothing to heal"):
        check(Wish(Request(vocabulary=("text.txt",)), 2048))


def test_a_smaller_vocabulary_comes_first_and_alone() -> None:
    both = Request(depth=2, ffn=512, vocabulary=("a.txt",))
    assert _in_order(both) == [Request(vocabulary=("a.txt",)), Request(depth=2, ffn=512)]
    assert _in_order(Request(depth=2)) == [Request(depth=2)]
    assert _in_order(None) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heal", "2k"], "nothing is pruned"),
        (["--prune", "depth=1", "--heal", "soon"], "not a number of tokens"),
        (["--prune", "depth=1", "--data", "text.txt"], "--heal is not given"),
        (["--prune", "depth=1", "--auto"], "--auto chooses what to prune"),
        (["--auto", "--format", "onnx"], "compared as GGUF"),
        (["--auto", "--set", "measure.fidelity=false"], "measure.fidelity is off"),
    ],
)
def test_wishes_that_can_not_be_met_are_refused_before_any_work(edgepack_command, words, message, tmp_path) -> None:
    answer = edgepack_command("build", EXAMPLE, "-t", "laptop", "-o", tmp_path / "out", *words)
    assert answer.returncode == 2 and message in answer.stderr
    assert answer.stderr.count("\n") <= 5 and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> edgepack.Package:
    """The example without one layer and a third of its neurons, healed a little."""
    return edgepack.build(
        EXAMPLE,
        "laptop",
        tmp_path_factory.mktemp("packages") / "out",
        prune="layers=2,ffn=512",
        heal="6k",
        quantize="Q8_0",
        overrides=["measure.windows=2", "measure.latency=false"],
    )


def test_a_build_heals_what_it_pruned_and_measures_against_the_original(package: edgepack.Package) -> None:
    recipe = package.manifest["recipe"]
    healed = recipe["heal"]
    assert healed["evaluation"]["after"]["mean_kld"] < healed["evaluation"]["before"]["mean_kld"]
    assert 0 < healed["evaluation"]["recovered"]["kld"] < 1
    steps = recipe["prune"]["steps"]
    assert [row["step"] for row in steps] == ["source", "depth", "ffn", "heal"]
    assert steps[-1]["bytes"] == steps[-2]["bytes"] and steps[-1]["mean_kld"] < steps[-2]["mean_kld"]
    # pruning and healing measure the pruned model apart from each other, on the same windows
    assert healed["evaluation"]["before"]["mean_kld"] == pytest.approx(steps[-2]["mean_kld"], rel=1e-3)
    rows = {row.name: row.value for row in package.measurements}
    assert rows["mean_kld"] == pytest.approx(steps[-1]["mean_kld"], rel=0.4)  # two other windows, in llama.cpp
    assert edgepack.verify(package.path).problems == ()


def test_plan_card_and_report_show_every_step_from_source_to_artifact(package: edgepack.Package) -> None:
    plan = json.loads((package.path / "evidence" / "plan.json").read_text())
    assert plan["steps"][:3] == ["prune", "heal", "export"] and plan["steps"][-1] == "package"
    steps = plan["waterfall"]
    assert [row["step"] for row in steps] == ["source", "depth", "ffn", "heal", "Q8_0"]
    sizes = [row["bytes"] for row in steps]
    assert sizes == sorted(sizes, reverse=True) and steps[-1]["bytes"] == package.artifact.stat().st_size
    speeds = [row["predicted_decode_tokens_per_s"] for row in steps]
    assert speeds == sorted(speeds)
    card = (package.path / "README.md").read_text()
    section = card[card.index("## Step by step") : card.index("## Checked against the source")]
    assert "| Q8_0 |" in section and "Healing trained on" in section and "of the KL divergence" in section
    assert "Step by step" in (package.path / "evidence" / "report.html").read_text()


def test_the_prune_words_of_a_build_are_those_of_the_request() -> None:
    assert parse("layers=2,ffn=512") == Request(layers=(2,), ffn=512)
