from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from artifacts import exported, random_bert, with_weight

from edgepack.compare import compare
from edgepack.errors import ConformanceError, InputRefused, UsageError
from edgepack.events import Event
from edgepack.measure import bootstrap
from edgepack.text import default_evaluation_text, read_text
from edgepack.worker import run


@pytest.fixture(scope="module")
def files(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example model in three types, and a short text."""
    folder = tmp_path_factory.mktemp("files")
    text = folder / "text.txt"
    text.write_text(read_text(default_evaluation_text())[:20_000], encoding="utf-8")
    return {name: exported(example, name, folder) for name in ("F32", "Q8_0", "Q4_0")} | {"text": text}


def alone(files: dict[str, Path], name: str, windows: int) -> dict[str, float]:
    """Fidelity of one artifact, in a worker too: which kernels run may depend on what a process did before."""
    arguments = {"reference": str(files["F32"]), "candidate": str(files[name]), "text": str(files["text"])}
    settings = {"windows": windows, "window_tokens": 512, "threads": 2}
    found = run("edgepack.measure.fidelity:fidelity", arguments | settings, what="fidelity")
    return {row["name"]: row["value"] for row in found["rows"]}


def test_with_a_source_both_are_held_against_it(files: dict[str, Path], example: Path) -> None:
    found = compare(
        files["Q8_0"], files["Q4_0"], text=files["text"], source=str(example), windows=4, speed=False, threads=2
    )
    rows = {row["name"]: row for row in found["rows"]}
    for side, name in (("a", "Q8_0"), ("b", "Q4_0")):
        values = alone(files, name, windows=4)
        for measured in ("mean_kld", "top1_agreement", "perplexity"):
            assert rows[measured][side] == pytest.approx(values[measured], rel=1e-6)
        assert rows["artifact_bytes"][side] == files[name].stat().st_size
    difference = rows["mean_kld"]["difference"]
    assert difference["value"] == pytest.approx(rows["mean_kld"]["b"] - rows["mean_kld"]["a"])
    assert 0 < difference["ci95"][0] < difference["value"] < difference["ci95"][1]
    assert rows["artifact_bytes"]["ratio"] == files["Q4_0"].stat().st_size / files["Q8_0"].stat().st_size
    assert rows["bits_per_weight"]["a"] == pytest.approx(8.5, abs=0.05)
    assert found["a"]["types"]["Q8_0"] == 43 and found["b"]["types"]["Q4_0"] == 42
    assert json.loads(json.dumps(found)) == found


def test_without_a_source_b_is_held_against_a(files: dict[str, Path]) -> None:
    found = compare(files["F32"], files["Q4_0"], text=files["text"], windows=3, speed=False, threads=2)
    rows = {row["name"]: row for row in found["rows"]}
    values = alone(files, "Q4_0", windows=3)
    assert rows["mean_kld_b_from_a"]["b"] == pytest.approx(values["mean_kld"], rel=1e-6)
    assert rows["mean_kld_b_from_a"]["a"] is None and rows["mean_kld_b_from_a"]["ratio"] is None
    assert rows["top1_agreement_of_a_and_b"]["b"] == pytest.approx(values["top1_agreement"])
    assert rows["perplexity"]["a"] == pytest.approx(values["source_perplexity"], rel=1e-6)
    assert any("B is held against A" in note for note in found["notes"])


def test_speed_is_measured_in_turns(files: dict[str, Path]) -> None:
    events: list[Event] = []
    found = compare(files["Q8_0"], files["Q4_0"], text=files["text"], windows=2, threads=2, listener=events.append)
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("ttft_ms_p50", "prefill_tokens_per_s", "decode_tokens_per_s_p50"):
        assert rows[name]["a"] > 0 and rows[name]["b"] > 0
        assert rows[name]["ratio"] == pytest.approx(rows[name]["b"] / rows[name]["a"])
    assert [event.step for event in events if event.kind == "done"] == ["fidelity", "speed"]


def test_an_artifact_equals_itself(files: dict[str, Path]) -> None:
    found = compare(files["Q4_0"], files["Q4_0"], text=files["text"], windows=2, speed=False, threads=2)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["mean_kld_b_from_a"]["b"] == 0
    assert rows["perplexity"]["b_over_a"] == {"value": 1.0, "ci95": [1.0, 1.0]}


def test_two_different_models_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = exported(random_bert(tmp_path / "bert"), "F32", tmp_path)
    with pytest.raises(UsageError, match="not of one model: architecture llama and bert"):
        compare(files["F32"], other, text=files["text"])


def test_embedders_are_compared_by_cosines(files: dict[str, Path], tmp_path: Path) -> None:
    model = random_bert(tmp_path / "bert")
    a, b = exported(model, "F32", tmp_path), exported(model, "Q8_0", tmp_path)
    found = compare(a, b, text=files["text"], windows=4, threads=2)
    rows = {row["name"]: row for row in found["rows"]}
    assert 0.99 < rows["cosine_mean"]["b"] < 1.00001 and rows["cosine_mean"]["n"] == 20
    assert "ttft_ms_p50" not in rows


def test_nan_in_an_artifact_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    broken = with_weight(files["F32"], "blk.0.attn_q.weight", float("nan"), tmp_path / "nan.gguf")
    with pytest.raises(ConformanceError, match="NaN or infinite logits"):
        compare(files["F32"], broken, text=files["text"], windows=2, speed=False, threads=2)


def test_what_is_no_artifact_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    with pytest.raises(InputRefused, match=r"text\.gguf"):
        compare(files["F32"], text, text=files["text"])
    with pytest.raises(UsageError, match="does not exist"):
        compare(files["F32"], tmp_path / "none.gguf", text=files["text"])


def test_paired_intervals_are_narrower_than_separate_ones() -> None:
    random = np.random.default_rng(0)
    shared = random.standard_normal((50, 1)) * np.ones((50, 20))
    a, b = shared + 0.1 * random.standard_normal((50, 20)), shared + 0.1 * random.standard_normal((50, 20))
    paired, alone = bootstrap.mean(b - a), bootstrap.mean(b)
    assert paired.standard_error is not None and alone.standard_error is not None
    assert paired.standard_error < alone.standard_error / 10
