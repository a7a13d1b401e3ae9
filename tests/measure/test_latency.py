from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import exported

from edgepack import worker
from edgepack.errors import StepError, UsageError
from edgepack.measure import latency as module
from edgepack.measure.latency import Run, latency

SETTINGS: dict[str, Any] = {
    "prompt_tokens": 40,
    "decode_tokens": 10,
    "repetitions": 3,
    "warmups": 1,
    "pause_seconds": 0.0,
    "threads": 2,
    "context": 64,
    "gpu_layers": 0,
}


@pytest.fixture(scope="module")
def rows(q4: Path) -> dict[str, dict[str, Any]]:
    """Rows by name, measured in a worker as a build does."""
    found = worker.run("edgepack.measure.latency:latency", SETTINGS | {"artifact": str(q4)}, what="latency")
    return {row["name"]: row for row in found["rows"]}


def test_rows_carry_the_names_and_counts_of_the_contract(rows: dict[str, dict[str, Any]]) -> None:
    counts = {
        "ttft_ms_p50": 3,
        "ttft_ms_p90": 3,
        "prefill_tokens_per_s": 3,
        "decode_tokens_per_s_p50": 30,
        "decode_tokens_per_s_p10": 30,
        "decode_tokens_per_s_p90": 30,
        "load_ms": 1,
        "peak_rss_mb": 1,
    }
    assert {name: row["n"] for name, row in rows.items()} == counts
    assert all(row["value"] > 0 for row in rows.values())


def test_rates_and_times_tell_one_story(rows: dict[str, dict[str, Any]]) -> None:
    value = {name: row["value"] for name, row in rows.items()}
    assert value["decode_tokens_per_s_p10"] <= value["decode_tokens_per_s_p50"] <= value["decode_tokens_per_s_p90"]
    assert value["ttft_ms_p50"] <= value["ttft_ms_p90"]
    # the first token is there when the prompt is computed and its likeliest successor is found
    slowest_prefill = 1000 * SETTINGS["prompt_tokens"] / rows["prefill_tokens_per_s"]["min"]
    fastest_prefill = 1000 * SETTINGS["prompt_tokens"] / rows["prefill_tokens_per_s"]["max"]
    assert fastest_prefill <= value["ttft_ms_p50"] <= value["ttft_ms_p90"] <= slowest_prefill + 50


def test_quantiles_of_few_samples_say_so(rows: dict[str, dict[str, Any]]) -> None:
    assert "few samples: 3" in rows["ttft_ms_p90"]["note"]
    assert "few samples: 30" in rows["decode_tokens_per_s_p10"]["note"]
    assert "note" not in rows["ttft_ms_p50"]
    many = module.speed_rows([Run(10.0, 11.0, (2.0,) * 60)] * 50, 100)
    assert [row.note for row in many] == [None] * len(many)


def test_peak_memory_holds_the_model_and_states_pythons_share(rows: dict[str, dict[str, Any]], q4: Path) -> None:
    peak = rows["peak_rss_mb"]
    assert peak["value"] > peak["before_load"] + q4.stat().st_size / 1e6
    stated = re.search(r"(\d+) MB of it are Python", peak["note"])
    assert stated is not None
    assert abs(int(stated[1]) - peak["before_load"]) <= 0.6  # the row keeps a decimal more than the sentence
    assert peak["value"] < 400  # a 5M model in a fresh process; this test process is larger


def test_decode_speed_leaves_the_first_token_out_and_slow_tokens_show() -> None:
    runs = [Run(prefill_ms=100.0, ttft_ms=101.0, token_ms=(2.0,) * 8 + (10.0,) * 2) for _ in range(3)]
    values = {row.name: row.value for row in module.speed_rows(runs, 50)}
    assert values["prefill_tokens_per_s"] == 500
    assert values["ttft_ms_p50"] == values["ttft_ms_p90"] == 101
    assert values["decode_tokens_per_s_p50"] == 500
    assert values["decode_tokens_per_s_p10"] == 100
    row = next(row for row in module.speed_rows(runs, 50) if row.name == "decode_tokens_per_s_p50")
    assert row.extra["mean"] == row.extra["median_of_runs"] == pytest.approx(1000 / 3.6, rel=1e-4)


def test_quantiles_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    runs = [
        Run(float(a), float(b), tuple(c)) for a, b, c in zip(*random.gamma(9, 1, (2, 60)), random.gamma(9, 1, (60, 4)))
    ]
    values = {row.name: row.value for row in module.speed_rows(runs, 10)}
    times = np.concatenate([run.token_ms for run in runs])
    assert values["ttft_ms_p90"] == pytest.approx(np.quantile([run.ttft_ms for run in runs], 0.9), abs=1e-4)
    assert values["decode_tokens_per_s_p10"] == pytest.approx(1000 / np.quantile(times, 0.9), rel=1e-5)


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(q4: Path) -> None:
    with pytest.raises(UsageError, match="a prompt of 60 tokens and 10 decoded ones do not fit in a context of 64"):
        latency(**SETTINGS | {"artifact": str(q4), "prompt_tokens": 60})


def test_prompt_and_answer_may_fill_the_context_to_the_last_token(q4: Path) -> None:
    found = latency(**SETTINGS | {"artifact": str(q4), "prompt_tokens": 54, "repetitions": 1})
    assert found["settings"]["prompt_tokens"] == 54


def test_warm_ups_are_run_and_not_counted() -> None:
    made, seen = iter(range(99)), []
    kept = module.repeat(lambda: next(made), 2, 3, 0.0, lambda done, total: seen.append((done, total)))
    assert kept == [2, 3, 4]
    assert seen == [(i, 5) for i in range(1, 6)]


def test_pauses_come_before_counted_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    module.repeat(lambda: 0, 2, 3, 1.5, lambda done, total: None)
    assert slept == [1.5] * 3


class Counted:
    """A model that remembers which positions it was fed."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def clear(self) -> None:
        self.positions.clear()

    def feed(self, ids: list[int], position: int) -> None:
        self.positions += range(position, position + len(ids))

    def greedy(self) -> int:
        return 1  # an end-of-text token, to this model: decoding goes on


def test_exactly_the_asked_tokens_are_decoded_whatever_they_are() -> None:
    model = Counted()
    run = module.answer(model, [5, 6, 7], 9)  # type: ignore[arg-type]
    assert len(run.token_ms) == 9
    assert model.positions == list(range(12))


def test_the_prompt_has_exactly_the_asked_length(q4: Path) -> None:
    from edgepack.runtimes.llama_cpp import Model

    with Model(q4, threads=1, vocab_only=True) as model:
        for count in (1, 17, 3000):
            assert len(module.prompt_of(model, count)) == count


def test_an_embedder_is_timed_by_whole_queries(bert: Path, tmp_path: Path) -> None:
    found = latency(**SETTINGS | {"artifact": str(exported(bert, "F32", tmp_path)), "repetitions": 1})
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["latency_ms_p50", "latency_ms_p90", "load_ms", "peak_rss_mb"]
    assert rows["latency_ms_p50"]["n"] == 20 and rows["latency_ms_p50"]["tokens"] == 40
    assert "few samples" in rows["latency_ms_p90"]["note"]
    assert json.dumps(found)


def test_a_damaged_artifact_is_a_step_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(StepError, match=r"damaged.gguf: llama.cpp can't load it: bad GGUF version: 0"):
        latency(**SETTINGS | {"artifact": str(path)})
