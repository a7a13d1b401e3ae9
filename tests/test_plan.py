"""Plans: exact sizes, honest refusals, and the choice among candidates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import exported

from edgepack import pipeline, worker
from edgepack.errors import BudgetError, UsageError
from edgepack.planning import Plan
from edgepack.targets import load_target

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "tiny-llama-5m"


def plan(*overrides: str, target: str = "laptop", quantize: str | None = None, model: Path = EXAMPLE) -> Plan:
    return pipeline.plan(model, target, quantize=quantize, overrides=overrides)


def test_with_room_for_the_best_candidate_it_is_chosen_without_calibration() -> None:
    free = plan()
    assert free.quantize == free.target.quantize.candidates[0] == "Q8_0"
    assert free.notes == ()
    exact = free.prediction.artifact_bytes
    assert plan(f"budget.disk_mb={exact / 1e6}").quantize == "Q8_0"


@pytest.mark.parametrize("budget", ["budget.disk_mb=3.2", "budget.disk_mb=2.3", "budget.ram_mb=58"])
def test_a_smaller_budget_is_filled_with_calibrated_types(budget: str) -> None:
    made = plan(budget)
    assert made.quantize.endswith("bpw") and made.chosen_by == "budgets"
    assert made.chosen.misses == () and not made.prediction.exact
    fitting = [candidate for candidate in made.candidates[1:] if not candidate.misses]
    assert all(candidate.prediction.artifact_bytes <= made.prediction.artifact_bytes for candidate in fitting)
    assert any("windows of 512 tokens" in note for note in made.notes)
    larger = plan(budget, quantize=f"{float(made.quantize[:-3]) + 0.01:.2f}bpw")
    assert larger.chosen.misses  # to a hundredth of a bit


def test_one_byte_less_than_the_best_candidate_needs_is_filled_to_the_hundredth() -> None:
    size = plan(quantize="Q8_0").prediction.artifact_bytes
    assert plan(f"budget.disk_mb={(size - 1) / 1e6}").prediction.artifact_bytes > 0.99 * size


def without_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.gguf.calibrated.available_memory_bytes", lambda: 1_000_000)


def test_a_model_that_can_t_be_calibrated_gets_the_best_preset_and_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = plan()
    without_calibration(monkeypatch)
    smaller = free.candidates[3].prediction.artifact_bytes
    bounded = plan(f"budget.disk_mb={smaller / 1e6}")
    assert bounded.quantize == free.candidates[3].quantize
    assert bounded.chosen_by == "budgets"
    assert any("types can't be chosen by calibration: calibration needs" in note for note in bounded.notes)


def test_one_byte_less_than_a_preset_needs_excludes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without_calibration(monkeypatch)
    size = plan(quantize="Q4_K_M").prediction.artifact_bytes
    assert plan("quantize.candidates=Q4_K_M,Q2_K", f"budget.disk_mb={size / 1e6}").quantize == "Q4_K_M"
    assert plan("quantize.candidates=Q4_K_M,Q2_K", f"budget.disk_mb={(size - 1) / 1e6}").quantize == "Q2_K"


def test_a_calibration_of_hours_is_left_to_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepack.gguf.calibrated.CORE_FLOPS", 1e6)  # a machine 30,000 times as slow
    made = plan("budget.disk_mb=3.2")
    assert made.quantize in made.target.quantize.candidates
    (note,) = made.notes
    assert "a preset was chosen, because calibration" in note and "min on this machine" in note and "--bpw N" in note
    asked = plan("budget.disk_mb=3.2", quantize="4.5bpw")
    assert asked.quantize == "4.50bpw" and "min on this machine" in asked.notes[0]


def test_a_gguf_gets_a_preset_without_a_word(tmp_path: Path) -> None:
    made = plan("budget.disk_mb=3.2", model=exported(EXAMPLE, "BF16", tmp_path))
    assert made.quantize in made.target.quantize.candidates and made.notes == ()


def test_a_size_is_planned_as_it_was_asked_for() -> None:
    for asked, name in (("4.5bpw", "4.50bpw"), ("3.0MB", "3MB"), ("2900000", "2900000B"), ("4.456bpw", "4.456bpw")):
        made = plan(quantize=asked)
        assert made.quantize == name and made.chosen_by == "command line"
        assert made.as_json()["prediction"]["artifact_bytes_exact"] is False
    assert plan(quantize="3.0MB").prediction.artifact_bytes <= 3_000_000
    assert plan("quantize.default=4.5bpw").chosen_by == "profile"


def test_when_nothing_fits_the_refusal_says_by_how_much_and_what_would() -> None:
    with pytest.raises(BudgetError, match=r"Q2_K, needs .* over the budget") as refused:
        plan("budget.disk_mb=1")
    assert "parameters would fit" in str(refused.value.hint)


def test_a_memory_budget_the_cache_breaks_is_met_by_the_context_that_is_advised() -> None:
    full = plan(quantize="Q2_K").prediction
    limit = full.ram_mb - 0.4 * full.kv_mb
    with pytest.raises(BudgetError) as refused:
        plan(f"budget.ram_mb={limit}")
    advised = str(refused.value.hint).split("--set ")[1].split(" ")[0]
    assert advised.startswith("runtime.context=")
    assert plan(f"budget.ram_mb={limit}", advised, quantize="Q2_K").chosen.misses == ()


def test_a_preset_the_user_asks_for_is_planned_with_its_misses() -> None:
    made = plan("budget.disk_mb=1", quantize="Q8_0")
    assert [miss.budget for miss in made.chosen.misses] == ["artifact_bytes"]
    assert made.as_json()["feasible"] is False


def test_a_preset_is_known_in_any_case() -> None:
    assert plan(quantize="q4_k_m").quantize == "Q4_K_M"


def test_an_unknown_preset_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Q4_K_X"):
        plan(quantize="Q4_K_X")


def test_a_format_nobody_writes_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there is no format 'onx'"):
        pipeline.plan(EXAMPLE, load_target("laptop"), format="onx")


def test_the_plan_reads_no_weight(tmp_path: Path) -> None:
    model = tmp_path / EXAMPLE.name  # the name is part of the file
    model.mkdir()
    for file in EXAMPLE.iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            start = 8 + int.from_bytes(data[:8], "little")
            data[start:] = b"\xff" * (len(data) - start)  # every weight is NaN
        (model / file.name).write_bytes(bytes(data))
    assert plan(quantize="Q4_K_M", model=model).prediction == plan(quantize="Q4_K_M").prediction


def test_a_longer_context_costs_memory_and_speed_but_no_disk() -> None:
    short, long = (plan(f"runtime.context={n}", quantize="Q4_K_M").prediction for n in (256, 512))
    assert long.kv_mb == pytest.approx(2 * short.kv_mb)
    assert long.ram_mb > short.ram_mb
    assert long.artifact_bytes == short.artifact_bytes
    assert (long.decode_tokens_per_s or 0) < (short.decode_tokens_per_s or 0)


def test_the_plan_as_json_holds_no_machine_path() -> None:
    assert str(EXAMPLE.parent) not in json.dumps(plan().as_json())


def test_the_key_value_cache_is_that_of_the_shapes_in_the_config() -> None:
    config = json.loads((EXAMPLE / "config.json").read_text())
    width = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    keys_and_values = 2 * config["num_hidden_layers"] * width
    assert plan("runtime.context=256").prediction.kv_mb * 1e6 == keys_and_values * 2 * 256  # float16


@pytest.mark.parametrize("preset", ["Q8_0", "Q4_K_M"])
def test_predicted_memory_is_what_llama_cpp_takes_within_15_percent(preset: str, tmp_path: Path) -> None:
    settings = {
        "prompt_tokens": 8, "decode_tokens": 4, "repetitions": 1, "warmups": 0, "pause_seconds": 0.0, "threads": 2,
        "context": 512, "gpu_layers": 0,
    }  # fmt: skip
    artifact = exported(EXAMPLE, preset, tmp_path)
    found = worker.run("edgepack.measure.latency:latency", settings | {"artifact": str(artifact)}, what="latency")
    (measured,) = (row["value"] for row in found["rows"] if row["name"] == "peak_rss_mb")
    assert plan(quantize=preset).prediction.ram_mb == pytest.approx(measured, rel=0.15)
