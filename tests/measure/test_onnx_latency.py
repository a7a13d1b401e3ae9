from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import MissingError, UsageError
from edgepack.measure import onnx_latency as module
from edgepack.measure.onnx_latency import answer, decoder_latency, encoder_latency
from edgepack.runtimes.genai import Decoder

DECODER_NAMES = [
    "ttft_ms_p50", "ttft_ms_p90", "prefill_tokens_per_s", "decode_tokens_per_s_p50", "decode_tokens_per_s_p10",
    "decode_tokens_per_s_p90", "load_ms", "peak_rss_mb",
]  # fmt: skip


def encoder(folder: Path, shape: Sequence[int | str] = ("batch", "sequence")) -> Path:
    """An embedding, a mask and a matrix: as much of an encoder as a clock needs."""
    tables = {
        "table": np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32),
        "weight": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["a"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "axis"], ["n"]),
        helper.make_node("Mul", ["a", "n"], ["b"]),
        helper.make_node("MatMul", ["b", "weight"], ["last_hidden_state"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, 64])]
    stored = [numpy_helper.from_array(value, name) for name, value in tables.items()]
    stored.append(numpy_helper.from_array(np.array([2]), "axis"))
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return folder


def rows(**settings: Any) -> dict[str, dict[str, Any]]:
    found = encoder_latency(**{"repetitions": 1, "threads": 1, "lengths": [16]} | settings)
    return {row["name"]: row for row in found["rows"]}


def test_rows_per_batch_and_length_the_first_without_a_mark(tmp_path: Path) -> None:
    found = rows(artifact=str(encoder(tmp_path)), lengths=[32, 16, 64], more_batches=[4])
    marks = ["", "_b1_t16", "_b1_t64", "_b4_t32", "_b4_t16", "_b4_t64"]
    quantiles = [f"latency_ms_{q}{mark}" for mark in marks for q in ("p50", "p90", "p99")]
    assert list(found) == [*quantiles, "load_ms", "peak_rss_mb"]
    for mark in marks:
        low, middle, high = (found[f"latency_ms_{q}{mark}"]["value"] for q in ("p50", "p90", "p99"))
        assert 0 < low <= middle <= high
    main = found["latency_ms_p50"]
    assert (main["n"], main["unit"], main["tokens"], main["batch"]) == (20, "ms", 32, 1)
    assert "a 1 % tail wants 500" in found["latency_ms_p99"]["note"]
    assert found["load_ms"]["value"] > 0
    assert found["peak_rss_mb"]["value"] > found["peak_rss_mb"]["before_load"]


def test_each_run_has_exactly_the_batch_and_length_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = module.Session.run

    def remember(self: Any, feeds: dict[str, np.ndarray], names: Any = None) -> Any:
        seen.append(feeds["input_ids"].shape)
        assert feeds["attention_mask"].all()
        return original(self, feeds, names)

    monkeypatch.setattr(module.Session, "run", remember)
    rows(artifact=str(encoder(tmp_path)), batch=2, lengths=[8, 24], warmups=10)
    assert seen == [(2, 8)] * 30 + [(2, 24)] * 30


def test_quantiles_are_those_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes 2 ms, and 12 ms every tenth time."""
    calls = iter(range(10_000))

    def slow(self: Any, feeds: Any, names: Any = None) -> dict[str, Any]:
        time.sleep(0.012 if next(calls) % 10 == 9 else 0.002)
        return {}

    monkeypatch.setattr(module.Session, "run", slow)
    found = rows(artifact=str(encoder(tmp_path)), repetitions=5)
    assert found["latency_ms_p50"]["n"] == 100
    assert 2 <= found["latency_ms_p50"]["value"] < 8
    assert found["latency_ms_p99"]["value"] >= 12


def test_lengths_beyond_the_model_are_left_out(tmp_path: Path) -> None:
    found = rows(artifact=str(encoder(tmp_path)), lengths=[128, 16, 512], longest=64)
    assert found["latency_ms_p50"]["tokens"] == 64
    assert [name for name in found if name.startswith("latency_ms_p50")] == ["latency_ms_p50", "latency_ms_p50_b1_t16"]


def test_a_graph_of_one_size_is_timed_at_that_size(tmp_path: Path) -> None:
    found = rows(artifact=str(encoder(tmp_path, (2, 24))), lengths=[128, 16])
    assert [name for name in found if name.startswith("latency_ms_p50")] == ["latency_ms_p50"]
    assert (found["latency_ms_p50"]["batch"], found["latency_ms_p50"]["tokens"]) == (2, 24)


def test_images_have_no_length(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    node = helper.make_node("GlobalAveragePool", ["pixel_values"], ["logits"])
    made = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    found = rows(artifact=str(tmp_path), image=[20, 30], more_batches=[3])
    assert [name for name in found if "p50" in name] == ["latency_ms_p50", "latency_ms_p50_b3"]
    with pytest.raises(UsageError, match="give height and width"):
        rows(artifact=str(tmp_path))


def test_a_missing_provider_is_status_4(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="CoreMLExecutionProvider"):
        rows(artifact=str(encoder(tmp_path)), provider="CoreMLExecutionProvider")


def test_a_decoder_has_the_rows_of_a_gguf(int4_package: Path) -> None:
    found = decoder_latency(
        artifact=str(int4_package), prompt_tokens=32, decode_tokens=8, repetitions=3, warmups=1, pause_seconds=0,
        threads=2, context=64,
    )  # fmt: skip
    named = {row["name"]: row for row in found["rows"]}
    assert list(named) == DECODER_NAMES
    assert all(row["value"] > 0 for row in named.values())
    assert named["decode_tokens_per_s_p50"]["n"] == 24
    assert named["ttft_ms_p50"]["n"] == 3
    assert found["settings"]["threads"] == 2


def test_an_answer_is_the_prompt_one_token_and_the_timed_ones(int4_package: Path) -> None:
    with Decoder(int4_package, context=64, threads=1) as decoder:
        run = answer(decoder, [10, 20, 30], 5)
        assert decoder._generator.token_count() == 3 + 1 + 5
        assert len(run.token_ms) == 5
        assert 0 < run.prefill_ms <= run.ttft_ms
        assert answer(decoder, [10, 20, 30], 60 - 3 + 3).token_ms  # to the last place of the cache


def test_a_prompt_is_real_text_of_exactly_so_many_tokens(int4_package: Path, example: Path) -> None:
    from transformers import AutoTokenizer

    from edgepack.text import default_evaluation_text, read_text

    expected = AutoTokenizer.from_pretrained(example)(read_text(default_evaluation_text())[: 64 * 50])["input_ids"]
    with Decoder(int4_package, context=64, threads=1) as decoder:
        assert module._prompt(decoder, 50) == expected[:50]


def test_what_does_not_fit_in_the_context_is_refused(int4_package: Path) -> None:
    with pytest.raises(UsageError, match="do not fit in a context of 64"):
        decoder_latency(
            artifact=str(int4_package), prompt_tokens=56, decode_tokens=8, repetitions=1, warmups=1, pause_seconds=0,
            threads=1, context=64,
        )  # fmt: skip


def test_onnx_reads_what_the_tests_made(tmp_path: Path) -> None:
    onnx.checker.check_model(str(encoder(tmp_path) / "model.onnx"), full_check=True)
