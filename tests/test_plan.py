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


def test_without_a_preset_the_best_candidate_that_fits_is_chosen() -> None:
    free = plan()
    assert free.quantize == free.target.quantize.candidates[0]
    smaller = free.candidates[3].prediction.artifact_bytes
    bounded = plan(f"budget.disk_mb={smaller / 1e6}")
    assert bounded.quantize == free.candidates[3].quantize
    assert bounded.chosen_by == "budgets"


def test_one_byte_less_than_a_candidate_needs_excludes_it() -> None:
    size = plan(quantize="Q4_K_M").prediction.artifact_bytes
    assert plan("quantize.candidates=Q4_K_M,Q2_K", f"budget.disk_mb={size / 1e6}").quantize == "Q4_K_M"
    assert plan("quantize.candidates=Q4_K_M,Q2_K", f"budget.disk_mb={(size - 1) / 1e6}").quantize == "Q2_K"


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
