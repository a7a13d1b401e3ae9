"""Decoder packages of the example model: what is in them, that they run, what they refuse, what they leave behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from decoder_models import make
from safetensors.torch import load_file, save_file

from edgepack import worker
from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused, StepError, UsageError
from edgepack.measure.divergence import score
from edgepack.measure.source_model import SourceDecoder
from edgepack.onnx import decoder
from edgepack.onnx.decoder_recipes import check_options, check_recipe, memory_bytes, predicted_bytes
from edgepack.runtimes.genai import Decoder
from edgepack.text import default_evaluation_text, read_text

FILES = ["chat_template.jinja", "genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
FILES += ["tokenizer_config.json"]


def exports(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Several exports in one worker process."""
    found: list[dict[str, Any]] = worker.run("decoder_models:exports", {"jobs": list(jobs)}, what="export")
    return found


def job(model: Path, folder: Path, recipe: str, *, provider: str = "cpu", **options: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "folder": str(folder),
        "recipe": recipe,
        "provider": provider,
        "options": {"threads": 1} | options,
    }


@pytest.fixture(scope="module")
def made(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The example in every recipe for CPU, and once more elsewhere with more threads: name -> folder, report."""
    root = tmp_path_factory.mktemp("decoders")
    elsewhere = Path(shutil.copytree(example, tmp_path_factory.mktemp("elsewhere") / "renamed"))
    jobs = {
        "int4": job(example, root / "int4", "int4"),
        "int4-small": job(example, root / "small", "int4-small"),
        "int8": job(example, root / "int8", "int8", context=300),
        "fp32": job(example, root / "fp32", "fp32"),
        "again": job(elsewhere, root / "again", "int4", threads=3),
        "int4-mixed": job(example, root / "mixed", "int4-mixed", windows=4, bits_per_weight=5.6),
    }
    found = exports(*jobs.values())
    assert all("result" in one for one in found), found
    return {
        name: (Path(asked["folder"]), one["result"] | {"progress": one["progress"], "sorted": one["sorted"]})
        for (name, asked), one in zip(jobs.items(), found, strict=True)
    }


@pytest.fixture(scope="module")
def divergence(made: dict[str, Any], example: Path) -> dict[str, float]:
    """Mean KL divergence of each package from transformers, on one window."""
    from edgepack.measure.onnx_fidelity import source_tokens

    ids = source_tokens(example, read_text(default_evaluation_text()))[0][:256]
    expected = SourceDecoder(example, threads=1).logits(ids, 100, 255)
    found = {}
    for name, (folder, _) in made.items():
        with Decoder(folder, context=256, threads=1) as package:
            logits = package.logits(ids, 100, 255)
        scores = score(logits, np.array(ids[101:256]), reference=np.array(expected))
        assert scores.kld is not None
        found[name] = float(scores.kld.mean())
    return found


def test_a_package_holds_graph_weights_configuration_and_tokenizer(made: dict[str, Any]) -> None:
    for folder, report in made.values():
        assert sorted(path.name for path in folder.iterdir()) == FILES == report["files"]
        assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())


def test_sizes_are_true_and_every_byte_is_accounted_for(made: dict[str, Any], example: Path) -> None:
    parameters = open_checkpoint(example).parameters
    for folder, report in made.values():
        size = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        assert report["bytes"] == size
        assert report["bits_per_weight"] == pytest.approx(8 * size / parameters)
        assert 0 <= size - sum(report["bytes_by_part"].values()) < 64 * 200  # what alignment leaves empty
    assert made["int8"][1]["weights_by_format"] == {"int8/32": 4325376, "int8/128": 524288}
    assert made["int4"][1]["bytes_by_part"]["embedding and head"] == 524288 + 2 * 524288 // 128


def test_sizes_are_predicted_without_reading_a_weight(made: dict[str, Any], example: Path) -> None:
    checkpoint = open_checkpoint(example)
    for name in ("int4", "int4-small", "int8", "fp32"):
        assert predicted_bytes(checkpoint, name) == pytest.approx(made[name][1]["bytes"], rel=0.01)


def test_packages_keep_what_their_recipes_promise(divergence: dict[str, float]) -> None:
    assert divergence["fp32"] < 1e-8
    assert divergence["int8"] < 0.002
    assert divergence["int4"] < 0.1
    assert divergence["int4"] < divergence["int4-small"]


def test_calibration_keeps_its_size_and_helps(made: dict[str, Any], divergence: dict[str, float]) -> None:
    report = made["int4-mixed"][1]
    assert 5.3 < report["bits_per_weight"] <= 5.6
    assert divergence["int4-mixed"] < 0.9 * divergence["int4"]
    assert set(report["weights_by_format"]) == {"int4/32", "int8/32"}
    assert report["calibration"]["windows"] == 4


def test_packages_generate(made: dict[str, Any]) -> None:
    for name in ("int4", "int8", "int4-mixed"):
        with Decoder(made[name][0], context=64, threads=1) as package:
            package.feed([43, 639, 82, 1474])
            said = [package.step() for _ in range(12)]
        assert len(set(said)) > 3
        assert all(0 <= token < 2048 for token in said)


def test_bytes_depend_on_nothing_but_the_model(made: dict[str, Any]) -> None:
    first, second = (
        {name: hashlib.sha256((made[key][0] / name).read_bytes()).hexdigest() for name in FILES}
        for key in ("int4", "again")
    )
    assert first == second


def test_no_file_says_where_it_was_made(made: dict[str, Any], example: Path) -> None:
    words = [str(example), str(example.parent.parent.parent), "/tmp", "site-packages", str(Path.home())]
    for folder, _ in made.values():
        for path in folder.iterdir():
            content = path.read_bytes()
            assert not [word for word in words if word.encode() in content], path


def test_tied_weights_are_stored_once(made: dict[str, Any]) -> None:
    graph = onnx.load(made["int4"][0] / "model.onnx", load_external_data=False).graph
    readers = {node.op_type: set(node.input) for node in graph.node if "lm_head" in node.name or "embed" in node.name}
    (codes,) = [name for name in readers["MatMulNBits"] if "lm_head" in name and name.endswith("_Q8G128")]
    assert codes in readers["Reshape"]
    assert sum("lm_head" in tensor.name and tensor.data_type == 2 for tensor in graph.initializer) == 1


def test_a_context_limits_the_cache_and_nothing_else(made: dict[str, Any]) -> None:
    limited, free = (json.loads((made[name][0] / "genai_config.json").read_text()) for name in ("int8", "int4"))
    assert limited["search"]["max_length"] == 300
    assert limited["model"]["context_length"] == 512
    limited["search"]["max_length"] = 512
    assert limited == free


def test_progress_counts_weights_to_the_last_one(made: dict[str, Any]) -> None:
    for _, report in made.values():
        done, total = report["progress"][-1]
        assert done == total >= report["parameters"] - 10_000
        assert report["sorted"]


@pytest.mark.parametrize("provider", ["cuda", "webgpu", "NvTensorRtRtx"])
def test_packages_for_gpus_are_made_without_one(provider: str, example: Path, tmp_path: Path) -> None:
    from edgepack.onnx.check import check_model

    (found,) = exports(job(example, tmp_path / "out", "int4-small", provider=provider))
    assert "result" in found, found
    assert sorted(found["result"]["files"]) == FILES
    check_model(tmp_path / "out" / "model.onnx")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    kinds = {tensor.data_type for tensor in model.graph.initializer if "scales" in tensor.name}
    assert kinds == {onnx.TensorProto.FLOAT16}
    operators = {node.op_type for node in model.graph.node}
    assert ("DequantizeLinear" in operators) == (provider == "NvTensorRtRtx")
    assert ("MatMulNBits" in operators) == (provider != "NvTensorRtRtx")
    options = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert [list(entry) for entry in options["provider_options"]] == [[provider]]


def test_memory_is_predicted(example: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _, usage = worker.run_measured(
        "edgepack.onnx.decoder:export", job(example, tmp_path / "out", "int4", threads=2), what="export"
    )
    predicted = memory_bytes(open_checkpoint(example).parameters, "int4")
    assert 0.6 * predicted < usage.peak_rss_bytes < predicted


def test_models_that_no_one_proved_are_refused_with_the_list_and_another_way(tmp_path: Path) -> None:
    from pico import config, files, write

    changes = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    model = write(tmp_path / "pico", files() | {"config.json": config(**changes)})
    (tmp_path / "out").mkdir()
    with pytest.raises(InputRefused, match=r"MixtralForCausalLM can't .* LlamaForCausalLM, .*Qwen3ForCausalLM") as told:
        decoder.export(model=str(model), folder=str(tmp_path / "out"), recipe="int4")
    assert told.value.exit_code == 5
    assert "--format gguf" in str(told.value.hint)
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def spoiled(tmp_path: Path) -> dict[str, Path]:
    """Models that fail while they are exported."""
    models = {name: make(tmp_path / name, "LlamaForCausalLM") for name in ("nan", "norm", "tokenizer", "yarn")}
    for name, tensor in (("nan", "model.layers.1.mlp.down_proj.weight"), ("norm", "model.norm.weight")):
        weights = load_file(models[name] / "model.safetensors")
        weights[tensor].view(-1)[5] = float("nan")
        save_file(weights, models[name] / "model.safetensors", metadata={"format": "pt"})
    (models["tokenizer"] / "tokenizer.json").write_text('{"version": "1.0"}')
    written = json.loads((models["yarn"] / "config.json").read_text())
    written["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    (models["yarn"] / "config.json").write_text(json.dumps(written))
    return models


def test_nothing_half_written_is_left_behind(spoiled: dict[str, Path], tmp_path: Path) -> None:
    names = ["nan", "norm", "yarn"]
    found = exports(*(job(spoiled[name], tmp_path / f"{name}-out", "int4") for name in names))
    assert [one["left"] for one in found] == [[], [], []]
    assert [one["error"]["type"] for one in found] == ["InputRefused"] * 3
    said = [one["error"]["message"] for one in found]
    assert "model.layers.1.mlp.down_proj" in said[0] and "1 of" in said[0]
    assert "norm" in said[1] and "1 weights are NaN" in said[1]
    assert "yarn" in said[2]


def test_a_builder_that_dies_leaves_its_last_words_and_nothing_else(spoiled: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(StepError, match="decoder export failed") as told:
        worker.run("edgepack.onnx.decoder:export", job(spoiled["tokenizer"], out, "int4"), what="decoder export")
    assert len(told.value.message) > 40
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("recipe", "provider", "reason"),
    [
        ("fp16", "cpu", "do not run on CPU"),
        ("fp32", "cuda", "fp32 decoders are for cpu"),
        ("int8", "NvTensorRtRtx", "8-bit matrices"),
        ("int4-mixed", "NvTensorRtRtx", "8-bit matrices"),
        ("int5", "cpu", "'int5' is unknown; expected one of int4,"),
        ("int4", "tpu", "'tpu' is unknown; expected one of cpu,"),
    ],
)
def test_combinations_that_can_not_run_are_refused(recipe: str, provider: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        check_recipe(recipe, provider)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block": 32}, "'block' is unknown; expected one of threads,"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": True}, "threads is True"),
        ({"context": 1.5}, "context is 1.5"),
        ({"bits_per_weight": 3}, "bits_per_weight is 3, expected 4.5"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight is nan"),
        ({"windows": 8}, "windows belongs to int4-mixed"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        check_options(options, decoder.RECIPES["int4"])


def test_a_context_beyond_the_models_own_is_refused(example: Path, tmp_path: Path) -> None:
    (found,) = exports(job(example, tmp_path / "out", "int4", context=513))
    assert found["error"]["type"] == "UsageError"
    assert "the model was made for 512" in found["error"]["message"]
    assert found["left"] == []


def test_memory_of_calibration_grows_with_the_model() -> None:
    assert memory_bytes(10**9, "int4-mixed") - memory_bytes(0, "int4-mixed") == 5 * 10**9
    assert memory_bytes(10**9, "int4") == memory_bytes(0, "int4")


def test_untied_embeddings_are_quantized_too(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "Qwen3ForCausalLM", tie_word_embeddings=False, dtype="bfloat16")
    (found,) = exports(job(model, tmp_path / "out", "int4"))
    parts = found["result"]["bytes_by_part"]
    weights = 2048 * 64
    assert parts["embedding"] == weights // 2 + 2 * weights // 32
    assert parts["head"] == 2048 * (128 + 2)  # rows of 64 fill half a block of 128
    assert torch.get_num_threads() >= 1
