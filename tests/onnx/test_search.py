"""The search for an encoder's precision: what it finds holds when it is computed again by other means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from pico_encoders import sentence_transformer
from tiny_encoder import WORDS, encoder, images, write_tokenizer

import edgepack
from edgepack.errors import UsageError
from edgepack.events import Event
from edgepack.onnx import search
from edgepack.onnx.encoder_steps import describe
from edgepack.onnx.recipes import AUTO, RECIPES, tried
from edgepack.pipeline import exit_status
from edgepack.source import resolve
from edgepack.targets import load_target, with_overrides
from edgepack.text import default_calibration_text, default_evaluation_text, sentences


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 150 sentences: an eighth calibrates, the others judge."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(sentences(default_calibration_text().read_text(encoding="utf-8"), 150)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hurtful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("hurtful"), layers=3, hurtful=1)


def chosen(model: Path, folder: Path, recipes: list[str], text: Path | None, **options: Any) -> dict[str, Any]:
    folder.mkdir()
    seen: list[tuple[int, int]] = []
    options = {"task": "sentence-similarity", "source": str(model), "budgets": {}} | options
    found = search.choose(
        model=str(model),
        folder=str(folder),
        recipes=recipes,
        text=str(text) if text else None,
        progress=lambda done, total: seen.append((done, total)),
        **options,
    )
    assert all(0 < done <= total for done, total in seen)
    assert sorted(path.name for path in folder.iterdir()) == found["files"]
    assert sum(path.stat().st_size for path in folder.iterdir()) == found["bytes"]
    return found


def cosines(reference: Path, candidate: Path) -> np.ndarray:
    """By onnxruntime alone, on a text that the search has not seen."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    sessions = [
        onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        for folder in (reference, candidate)
    ]
    found = []
    for sentence in sentences(default_evaluation_text().read_text(encoding="utf-8"), 200):
        ids = np.array([tokenizer.encode(sentence).ids], dtype=np.int64)
        a, b = (session.run(None, {"input_ids": ids})[0][0].astype(np.float64) for session in sessions)
        found.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return np.array(found)


def at_least(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"min": value} for name, value in values.items()}


# Finding


def test_a_budget_that_plain_int8_misses_makes_a_few_nodes_finer_until_it_holds(
    hurtful: Path, text: Path, tmp_path: Path
) -> None:
    plain = chosen(hurtful, tmp_path / "plain", ["int8"], text, budgets=at_least(cosine_mean=0, cosine_p01=0))
    reached = plain["search"]["candidates"][0]["cosine_p01"]
    wanted = 1 - (1 - reached) / 4
    found = chosen(hurtful, tmp_path / "found", ["int8"], text, budgets=at_least(cosine_mean=0, cosine_p01=wanted))
    assert plain["finer"] == [] and plain["search"]["met"]
    assert 0 < len(found["finer"]) < 6 and len(found["kept"]) <= 1 and found["search"]["met"]
    before, after = (1 - np.quantile(cosines(hurtful, tmp_path / name), 0.01) for name in ("plain", "found"))
    assert after < before / 2


def test_what_has_no_finer_form_is_kept_in_float(hurtful: Path, text: Path, tmp_path: Path) -> None:
    budgets = at_least(cosine_mean=0, cosine_p01=0.9995)
    found = chosen(hurtful, tmp_path / "found", ["int8-qdq"], text, budgets=budgets)
    assert 0 < len(found["kept"]) < 7 and found["finer"] == [] and found["search"]["met"]
    nodes = {node.name: node for node in onnx.load(tmp_path / "found" / "model.onnx").graph.node}
    before = {node.name: node for node in onnx.load(hurtful / "model.onnx").graph.node}
    for name in found["kept"]:
        assert nodes[name].op_type == before[name].op_type and nodes[name].input[-1] == before[name].input[-1]
    assert np.quantile(cosines(hurtful, tmp_path / "found"), 0.01) > 0.999


def test_more_precision_than_a_second_product_gives_is_float32(hurtful: Path, text: Path, tmp_path: Path) -> None:
    """8-bit weights alone miss it, whatever the activations: only float32 is left, part by part."""
    found = chosen(hurtful, tmp_path / "found", ["int8"], text, budgets=at_least(cosine_mean=0.99999))
    assert found["search"]["met"] and found["kept"] and not set(found["kept"]) & set(found["finer"])
    assert cosines(hurtful, tmp_path / "found").mean() > 0.99998


def test_the_least_product_of_bytes_and_time_wins_among_those_that_hold(
    hurtful: Path, text: Path, tmp_path: Path
) -> None:
    recipes = ["fp32", "fp16", "int8-dynamic", "int8-weights"]
    found = chosen(hurtful, tmp_path / "found", recipes, text, budgets=at_least(cosine_p01=0.99))["search"]
    rows = found["candidates"]
    holding = [row for row in rows if row["cosine_mean"] >= 0.9955 and row["cosine_p01"] >= 0.991]
    costs = [row["bytes"] * row["latency_ms_p50"] for row in holding]
    assert {row["recipe"] for row in rows} == set(recipes)
    assert rows[: len(holding)] == holding and costs == sorted(costs)
    assert next(row for row in rows if row["recipe"] == "fp32")["error"] == 0


def test_an_impossible_budget_gives_the_best_that_was_reached(hurtful: Path, text: Path, tmp_path: Path) -> None:
    budgets = at_least(cosine_mean=1.0) | {"artifact_bytes": {"max": 60_000}}
    found = chosen(hurtful, tmp_path / "found", ["int8-dynamic", "int8", "int4", "fp32"], text, budgets=budgets)
    told = found["search"]
    fitting = [row for row in told["candidates"] if row["bytes"] <= 60_000]
    assert not told["met"] and set(told["missed"]) == {"cosine_mean"}
    assert found["bytes"] <= 60_000 < max(row["bytes"] for row in told["candidates"])
    assert told["candidates"][0]["error"] == min(row["error"] for row in fitting)


def test_a_size_budget_makes_four_bits_win_and_eight_where_they_hurt(hurtful: Path, text: Path, tmp_path: Path) -> None:
    sizes = {
        name: chosen(hurtful, tmp_path / name, [name], text, budgets=at_least(cosine_mean=0, cosine_p01=0))["bytes"]
        for name in ("int4", "int8-weights")
    }
    assert sizes["int4"] < sizes["int8-weights"]
    between = {"artifact_bytes": {"max": sizes["int8-weights"] - 1}}
    budgets = at_least(cosine_mean=0.9, cosine_p01=0.9) | between
    found = chosen(hurtful, tmp_path / "found", ["int8-weights", "int4"], text, budgets=budgets)
    assert found["recipe"] == "int4" and found["search"]["met"] and found["bytes"] < sizes["int8-weights"]


def test_a_latency_budget_counts(hurtful: Path, text: Path, tmp_path: Path) -> None:
    budgets = {"latency_ms_p50": {"max": 1e-6}}
    found = chosen(hurtful, tmp_path / "found", ["int8-dynamic"], text, budgets=budgets)["search"]
    assert not found["met"] and "latency_ms_p50" in found["missed"]


def test_labels_are_what_a_classifier_is_judged_by(text: Path, tmp_path: Path) -> None:
    model = encoder(tmp_path / "model", labels=4)
    found = chosen(model, tmp_path / "found", ["int8", "int4"], text, task="text-classification")
    told = found["search"]
    assert told["met"] and told["budgets"]["label_agreement"] == {"min": 0.99} and "cosine_mean" not in told["budgets"]
    sessions = [onnxruntime.InferenceSession(f / "model.onnx") for f in (model, tmp_path / "found")]
    random = np.random.default_rng(3)
    inputs = [random.integers(0, WORDS, (1, 20)) for _ in range(100)]
    same = [len({int(s.run(None, {"input_ids": ids})[0].argmax()) for s in sessions}) == 1 for ids in inputs]
    assert np.mean(same) >= 0.97


def test_scores_of_rerankers_are_judged_by_their_order(text: Path, tmp_path: Path) -> None:
    model = encoder(tmp_path / "model", labels=1)
    found = chosen(model, tmp_path / "found", ["int8"], text, task="text-classification", pairs=True)["search"]
    assert set(found["budgets"]) == {"rank_agreement"} and found["candidates"][0]["rank_agreement"] > 0.9


# Images, neural processors, missing data


def test_images_calibrate_judge_and_keep_convolutions(tmp_path: Path) -> None:
    model = images(tmp_path / "model")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32))
    recipes = list(tried("CPUExecutionProvider", images=True))
    found = chosen(model, tmp_path / "found", recipes, tmp_path / "images.npy", task="image-classification")
    assert found["search"]["judged_on"] == "images" and found["search"]["samples"] == 56
    assert {row["recipe"] for row in found["search"]["candidates"]} == set(recipes)
    assert found["search"]["met"]


def test_without_images_nothing_is_calibrated_and_the_result_says_so(tmp_path: Path) -> None:
    model = images(tmp_path / "model")
    recipes = list(tried("CPUExecutionProvider", images=True))
    found = chosen(model, tmp_path / "found", recipes, None, task="image-classification")["search"]
    assert found["judged_on"] == "synthetic images"
    assert set(found["left_out"]) == {name for name in recipes if RECIPES[name].needs_calibration}
    assert {row["recipe"] for row in found["candidates"]} == {"int8-dynamic", "fp16", "fp32"}
    with pytest.raises(UsageError, match="int8-qdq: needs calibration data") as error:
        chosen(model, tmp_path / "none", ["int8-qdq"], None, task="image-classification")
    assert "--calibration" in (error.value.hint or "")


def test_a_text_model_without_calibration_text_is_refused(hurtful: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8: needs calibration data, and none was given"):
        chosen(hurtful, tmp_path / "found", ["int8", "fp32"], None)


def test_neural_processors_get_fixed_ranges_with_as_many_bits_as_it_takes(text: Path, tmp_path: Path) -> None:
    model = encoder(tmp_path / "model", layers=1, axes=(1, 40))
    recipes = list(tried("QNNExecutionProvider", images=False))
    found = chosen(model, tmp_path / "found", recipes, text, provider="QNNExecutionProvider", arch="arm64")
    rows = {row["recipe"]: row for row in found["search"]["candidates"]}
    assert rows["a16w8"]["error"] < rows["a8w8"]["error"] / 2
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(ops(tmp_path / "found"))
    free = encoder(tmp_path / "free", layers=1)
    with pytest.raises(UsageError, match="input_ids has free axes"):
        chosen(free, tmp_path / "refused", recipes, text, provider="QNNExecutionProvider")


def ops(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]


def test_one_recipe_that_fails_is_left_out_with_its_reason(
    hurtful: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise search.StepError("no such kernel")

    monkeypatch.setattr("edgepack.onnx.quantize.quantize_blocks", fails)
    found = chosen(hurtful, tmp_path / "found", ["int8-weights", "int8-dynamic"], text, budgets=at_least(cosine_p01=0))
    assert found["search"]["left_out"] == {"int8-weights": "no such kernel"}
    with pytest.raises(search.StepError, match="no such kernel"):
        chosen(hurtful, tmp_path / "none", ["int8-weights"], text)


# In a build


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sentence_transformer(tmp_path_factory.mktemp("models") / "embedder", {"pooling_mode_mean_tokens": True})
    write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = [word for word, index in tokenizer["model"]["vocab"].items() if index < 101]  # the model has 101 rows
    tokenizer["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


FAST = ["measure.repetitions=1", "measure.latency=false"]


def test_auto_meets_the_budget_by_transformers_word_and_is_found_again(embedder: Path, tmp_path: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer

    wanted = [*FAST, "budget.cosine_mean=0.999", "budget.cosine_p01=0.998"]
    package = edgepack.build(embedder, "laptop", tmp_path / "p", format="onnx", overrides=wanted)
    recipe = package.manifest["recipe"]
    told = recipe["search"]
    rows = {row.name: row for row in package.measurements}
    assert [rows[name].verdict for name in ("cosine_mean", "cosine_p01")] == ["pass", "pass"]
    assert told["met"] and len(told["candidates"]) >= 6
    assert recipe["quantize"] == recipe["recipe"] == told["candidates"][0]["recipe"] != AUTO
    assert told["budgets"]["cosine_mean"] == {"min": 0.999}

    model = transformers.AutoModel.from_pretrained(embedder).eval()
    session = onnxruntime.InferenceSession(package.artifact, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(embedder / "tokenizer.json"))
    found = []
    for sentence in sentences(default_evaluation_text().read_text(encoding="utf-8"), 60):
        ids = np.array([tokenizer.encode(sentence).ids[:60]], dtype=np.int64)
        with torch.inference_mode():
            states = model(torch.from_numpy(ids), attention_mask=torch.ones(ids.shape)).last_hidden_state
        theirs = states.mean(dim=1)[0].numpy().astype(np.float64)
        fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        ours = session.run(None, {port.name: fed[port.name] for port in session.get_inputs()})[0][0].astype(np.float64)
        found.append(theirs @ ours / np.linalg.norm(theirs) / np.linalg.norm(ours))
    assert np.mean(found) > 0.999 and np.min(found) > 0.995

    events: list[Event] = []
    again = edgepack.build(embedder, "laptop", tmp_path / "q", format="onnx", overrides=wanted, listener=events.append)
    assert again.artifact_digest == package.artifact_digest
    assert any(event.step == "quantize" and event.cached for event in events if event.kind == "done")


def test_a_budget_that_nothing_meets_is_a_fail_with_the_best_that_was_reached(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its graph is larger than its weights: no estimate of the plan may stop this build before anything is measured.
    monkeypatch.setattr("edgepack.onnx.encoder_steps.GRAPH_BYTES", 0)
    package = edgepack.build(
        embedder, "laptop", tmp_path / "p", format="onnx", overrides=[*FAST, "budget.disk_mb=0.04"]
    )
    assert exit_status(package) == 3
    told = package.manifest["recipe"]["search"]
    rows = {row.name: row for row in package.measurements}
    assert not told["met"] and set(told["missed"]) == {"artifact_bytes"}
    assert rows["artifact_bytes"].verdict == "fail" and rows["artifact_bytes"].value == told["missed"]["artifact_bytes"]
    assert told["candidates"][0]["error"] == min(row["error"] for row in told["candidates"])
    card = (package.path / "README.md").read_text(encoding="utf-8")
    assert f"| {told['candidates'][0]['recipe']} (chosen) |" in card and "None holds" in card


def test_a_profile_that_says_nothing_of_fidelity_gets_the_defaults(embedder: Path) -> None:
    silent = with_overrides(load_target("laptop"), [f"budget.{name}=none" for name in search.DEFAULT_BUDGETS])
    found = describe(resolve(str(embedder)), silent)
    assert found.defaults == ("budget.cosine_mean=0.995", "budget.cosine_p01=0.98")
    asked = with_overrides(silent, ["budget.cosine_mean=0.9"])
    assert describe(resolve(str(embedder)), asked).defaults == ("budget.cosine_p01=0.98",)


@pytest.mark.parametrize(("family", "positions"), [("roberta", 68), ("mpnet", 68), ("bert", 70)])
def test_positions_are_counted_as_the_family_numbers_them(tmp_path: Path, family: str, positions: int) -> None:
    from pico_encoders import write

    assert describe(resolve(str(write(tmp_path / family, family))), load_target("laptop")).context == positions


def test_scores_and_labels_have_default_budgets_of_their_own(tmp_path: Path) -> None:
    from pico_encoders import write

    silent = with_overrides(load_target("laptop"), [f"budget.{name}=none" for name in search.DEFAULT_BUDGETS])
    for labels, wanted in ((1, "budget.rank_agreement=0.99"), (3, "budget.label_agreement=0.99")):
        folder = write(tmp_path / str(labels), "bert", "AutoModelForSequenceClassification", num_labels=labels)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert describe(resolve(str(folder)), silent).defaults == (wanted,)


def test_every_row_that_is_tried_exists() -> None:
    names = {
        name
        for provider in ("CPUExecutionProvider", "QNNExecutionProvider", "CUDAExecutionProvider", "Unknown")
        for pictures in (False, True)
        for name in tried(provider, images=pictures)
    }
    assert names <= set(RECIPES) and AUTO not in RECIPES
    assert dataclasses.is_dataclass(RECIPES["int8"])
