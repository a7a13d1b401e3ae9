from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.errors import ConformanceError, InputRefused, UsageError
from edgepack.measure.fidelity import fidelity
from edgepack.measure.onnx_fidelity import decoder_fidelity, source_tokens
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import default_evaluation_text, read_text

NAMES = ["mean_kld", "median_kld", "kld_p99", "top1_agreement", "source_perplexity", "perplexity"]
Measure = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "excerpt.txt"
    path.write_text(read_text(default_evaluation_text())[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def measure(excerpt: str, example: Path) -> Measure:
    """Rows by name, on six windows of 128 tokens unless told otherwise."""

    def rows(candidate: Path, **changes: Any) -> dict[str, dict[str, Any]]:
        settings = {"source": str(example), "text": excerpt, "windows": 6, "window_tokens": 128, "threads": 2} | changes
        found = decoder_fidelity(candidate=str(candidate), **settings)
        return {row["name"]: row for row in found["rows"]}

    return rows


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_rows_are_those_of_the_definition_on_each_models_logits(
    int4_package: Path, example: Path, excerpt: str, measure: Measure
) -> None:
    """The graph run by plain onnxruntime with an empty cache, the source by transformers, both all at once."""
    import onnxruntime
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    session = onnxruntime.InferenceSession(str(int4_package / "model.onnx"), providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(example)(read_text(excerpt))["input_ids"]
    kld, top, nll = [], [], []
    for start in range(0, 6 * 128, 128):
        ids = np.array([tokens[start : start + 128]])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds |= {
            port.name: np.zeros((1, 2, 0, 64), np.float32)
            for port in session.get_inputs()
            if port.name.startswith("past")
        }
        q = log_softmax(session.run(["logits"], feeds)[0][0, 64:127])
        with torch.no_grad():
            p = log_softmax(model(torch.tensor(ids)).logits[0, 64:127].numpy())
        kld.append((np.exp(p) * (p - q)).sum(1))
        top.append(p.argmax(1) == q.argmax(1))
        nll.append(-q[np.arange(63), ids[0, 65:128]])
    rows = measure(int4_package)
    assert list(rows) == NAMES
    assert all(row["n"] == 6 * 63 for row in rows.values())
    assert rows["mean_kld"]["value"] == pytest.approx(np.mean(kld), rel=1e-3)
    assert rows["median_kld"]["value"] == pytest.approx(np.median(kld), rel=1e-3)
    assert rows["kld_p99"]["value"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-3)
    assert rows["top1_agreement"]["value"] == pytest.approx(np.mean(top), abs=2.1 / (6 * 63))
    assert rows["perplexity"]["value"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert rows["mean_kld"]["ci95"][0] < rows["mean_kld"]["value"] < rows["mean_kld"]["ci95"][1]
    assert rows["mean_kld"]["note"] == "6 windows of 128 tokens, against the F32 source in transformers"


def test_a_package_says_where_it_parts_from_its_source(int4_package: Path, example: Path, excerpt: str) -> None:
    found = decoder_fidelity(
        candidate=str(int4_package), source=str(example), text=excerpt, windows=3, window_tokens=64, threads=2
    )
    details = found["details"]
    assert np.mean(details["kld_by_window"]) == pytest.approx(found["rows"][0]["value"], rel=1e-3)
    for shown in details["worst"]:
        assert shown["context"] + "".join(shown["tokens"]) in read_text(excerpt)
        assert len(shown["tokens"]) == len(shown["kld"]) == 31
        assert shown["positions"][0]["kld"] == max(shown["kld"])
    assert sorted(shown["window"] for shown in details["worst"]) == [0, 1, 2]


def test_a_float32_package_is_its_source(fp32_package: Path, measure: Measure) -> None:
    rows = measure(fp32_package)
    assert abs(rows["mean_kld"]["value"]) < 1e-8
    assert rows["top1_agreement"]["value"] == 1
    assert rows["perplexity"]["value"] == pytest.approx(rows["source_perplexity"]["value"], rel=1e-6)


def test_a_gguf_and_an_onnx_package_are_measured_on_the_same_scale(
    fp32_package: Path, int4_package: Path, f32: Path, q4: Path, excerpt: str, measure: Measure
) -> None:
    """Source perplexity and windows agree between both formats' measurements, and with either reference."""
    common = {"text": excerpt, "windows": 6, "window_tokens": 128, "threads": 2}
    theirs = {row["name"]: row for row in fidelity(reference=str(f32), candidate=str(q4), **common)["rows"]}
    by_transformers = measure(int4_package)
    by_llama_cpp = measure(int4_package, reference_gguf=str(f32))
    for rows in (by_transformers, by_llama_cpp):
        assert list(rows) == list(theirs)
        assert rows["source_perplexity"]["n"] == theirs["source_perplexity"]["n"]
        assert rows["source_perplexity"]["value"] == pytest.approx(theirs["source_perplexity"]["value"], rel=2e-4)
    for name in ("mean_kld", "median_kld", "kld_p99"):
        assert by_llama_cpp[name]["value"] == pytest.approx(by_transformers[name]["value"], rel=2e-3)
    assert by_llama_cpp["mean_kld"]["note"].endswith("against the F32 source in llama.cpp")
    assert abs(measure(fp32_package, reference_gguf=str(f32))["mean_kld"]["value"]) < 1e-5


def test_tokens_are_those_that_llama_cpp_measures_a_gguf_on(f32: Path, example: Path) -> None:
    text = read_text(default_evaluation_text())[:5000] + " <|im_end|> </s> <|endoftext|>"
    tokens, bos = source_tokens(example, text)
    with Model(f32, threads=1, vocab_only=True) as model:
        assert tokens == model.tokenize(text, add_special=True, parse_special=False)
        assert bos == (model.bos if model.add_bos else None)


def test_bos_starts_every_window_and_is_no_target(
    fp32_package: Path, example: Path, excerpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepack.measure import onnx_fidelity as module

    fed: list[list[int]] = []
    original = module.Decoder.logits

    def remember(self: Any, ids: list[int], first: int, stop: int) -> np.ndarray:
        fed.append(list(ids))
        return original(self, ids, first, stop)

    copy = tmp_path / "with-bos"
    shutil.copytree(example, copy)
    document = json.loads((copy / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}},
    }
    (copy / "tokenizer.json").write_text(json.dumps(document))
    monkeypatch.setattr(module.Decoder, "logits", remember)
    found = decoder_fidelity(
        candidate=str(fp32_package), source=str(copy), text=excerpt, windows=3, window_tokens=64, threads=1
    )
    tokens, bos = source_tokens(copy, read_text(excerpt))
    assert bos == 7 and tokens[0] == 7
    assert [ids[0] for ids in fed] == [7, 7, 7]
    assert [ids[1:] for ids in fed] == [tokens[start + 1 : start + 64] for start in (0, 64, 128)]
    assert found["windows"] == 3


def test_a_broken_package_is_told_from_a_broken_source(fp32_package: Path, measure: Measure, tmp_path: Path) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(fp32_package, copy)
    weights = np.fromfile(copy / "model.onnx.data", np.float32)
    weights[-100:] = np.nan
    weights.tofile(copy / "model.onnx.data")
    with pytest.raises(ConformanceError, match="the artifact gives NaN or infinite logits"):
        measure(copy)


def test_a_package_of_another_vocabulary_is_refused(
    fp32_package: Path, example: Path, excerpt: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(example)
    config.vocab_size, config.num_hidden_layers = 2100, 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example / name, tmp_path)
    with pytest.raises(ConformanceError, match="2048 values for each token, the source's 2100"):
        decoder_fidelity(
            candidate=str(fp32_package), source=str(tmp_path), text=excerpt, windows=1, window_tokens=64, threads=1
        )


def test_windows_must_fit_the_model_and_the_text(fp32_package: Path, measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"measure.window_tokens is 600: .*room for 512"):
        measure(fp32_package, window_tokens=600)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(InputRefused, match="expected at least 256"):
        measure(fp32_package, text=str(tmp_path / "short.txt"))
