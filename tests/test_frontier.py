"""The curve of sizes: a few measured files of a small model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from artifacts import exported

from edgepack import pipeline
from edgepack.errors import BudgetError, UsageError
from edgepack.events import Event
from edgepack.frontier import DEFAULT_BITS, default_sizes
from edgepack.source import resolve
from edgepack.targets import load_target, with_overrides

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "tiny-llama-5m"
FAST = ("quantize.calibration_windows=8", "measure.windows=4")


class Stopped(BaseException):
    """Stands for Ctrl-C between two files."""


def test_a_stopped_frontier_goes_on_and_its_document_is_that_of_the_files(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "done" and event.step == "fidelity":
            raise Stopped

    with pytest.raises(Stopped):
        pipeline.frontier(
            EXAMPLE, "laptop", tmp_path / "f", sizes=["3.0MB"], presets=["Q3_K_M"], overrides=FAST,
            listener=stop,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    events: list[Event] = []
    folder, document = pipeline.frontier(
        EXAMPLE, "laptop", tmp_path / "f", sizes=["3.0MB"], presets=["Q3_K_M"], overrides=FAST,
        listener=events.append,
    )  # fmt: skip
    made = [(event.step, event.cached) for event in events if event.kind == "done"]
    assert ("calibrate", False) not in made and ("sensitivity", False) not in made
    assert [cached for step, cached in made if step == "fidelity"] == [True, False]
    assert folder == tmp_path / "f"
    assert json.loads((folder / "frontier.json").read_text(encoding="utf-8")) == document
    check_document(document)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and "3MB" in page and "Q3_K_M" in page


def check_document(document: dict[str, Any]) -> None:
    assert document["schema_version"] == 1
    assert document["model"] == EXAMPLE.name and document["target"] == "laptop" and document["windows"] == 4
    assert document["reference_perplexity"] > 1
    points = {point["label"]: point for point in document["points"]}
    assert [point["kind"] for point in document["points"]] == ["allocated", "preset"]
    assert set(points) == {"3MB", "Q3_K_M"}
    for point in points.values():
        low, high = point["ci95"]
        assert 0 < low <= point["mean_kld"] <= high
        assert 0 < point["top1_agreement"] < 1 and point["perplexity"] > 1
    assert 4 < points["3MB"]["bits_per_weight"] < 4.6
    assert 0.97 * 3_000_000 < points["3MB"]["bytes"] <= 3_000_000
    assert points["Q3_K_M"]["predicted_kld"] is None
    assert 0.5 < points["3MB"]["predicted_kld"] / points["3MB"]["mean_kld"] < 2
    assert points["3MB"]["mean_kld"] < points["Q3_K_M"]["mean_kld"]


def test_sizes_without_a_choice_lie_within_what_the_types_can_make() -> None:
    source = resolve(str(EXAMPLE))
    assert default_sizes(source, load_target("laptop")) == [f"{bits:.2f}bpw" for bits in DEFAULT_BITS]
    few = with_overrides(load_target("laptop"), ["quantize.types=Q4_K,Q5_K"])
    found = [float(size[:-3]) for size in default_sizes(source, few)]
    assert len(found) == 5 and found == sorted(set(found))
    assert found[0] < 4.6 and found[-1] < 5.6
    for size in found:  # each can be planned
        assert pipeline.plan(EXAMPLE, few, quantize=f"{size:.2f}bpw").prediction.bits_per_weight <= size


def test_a_folder_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    events: list[Event] = []
    (tmp_path / "f").mkdir()
    with pytest.raises(UsageError, match="exists"):
        pipeline.frontier(EXAMPLE, "laptop", tmp_path / "f", listener=events.append)
    assert events == []


def test_models_and_sizes_that_can_t_be_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no frontier: its source is a GGUF"):
        pipeline.frontier(exported(EXAMPLE, "BF16", tmp_path), "laptop", tmp_path / "f")
    steps: list[str] = []
    with pytest.raises(BudgetError, match=r"1bpw|1\.00bpw"):
        pipeline.frontier(
            EXAMPLE, "laptop", tmp_path / "f", sizes=["4bpw", "1bpw"], overrides=FAST,
            listener=lambda event: steps.append(event.step),
        )  # fmt: skip
    assert "calibrate" not in steps and "export" not in steps
    with pytest.raises(UsageError, match="size 'Q4_K_M'"):
        pipeline.frontier(EXAMPLE, "laptop", tmp_path / "f", sizes=["Q4_K_M"], overrides=FAST)
    with pytest.raises(UsageError, match="unknown quantization 'Q4_K_X'"):
        pipeline.frontier(EXAMPLE, "laptop", tmp_path / "f", sizes=["4bpw"], presets=["Q4_K_X"], overrides=FAST)
    assert not (tmp_path / "f").exists()
