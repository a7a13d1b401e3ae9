"""Decoder packages of the example model: what is in them, that they run, what they refuse, what they leave behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoder_models import make
from safetensors.torch import load_file, save_file

from edgepack import worker
from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused, StepError, UsageError
from edgepack.measure.divergence import score
from edgepack.measure.source_model import SourceDecoder
from edgepack.onnx import decoder
from edgepack.onnx.decoder_recipes import check_options, check_recipe, export_memory, predicted_bytes
from edgepack.runtimes.genai import Decoder
from edgepack.store import Store
from edgepack.text import default_evaluation_text, read_text

FILES = ["chat_template.jinja", "genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
FILES += ["tokenizer_config.json"]
JOINED = "model.layers.1.self_attn.k_proj.weight"  # the builder joins query, key and value


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
        "int4-mixed": job(example, root / "mixed", "int4-mixed", windows=16, bits_per_weight=5.6),
    }
    found = exports(*jobs.values())
    assert all("result" in one for one in found), found
    return {
        name: (Path(asked["folder"]), one["result"] | {"progress": one["progress"], "sorted": one["sorted"]})
        for (name, asked), one in zip(jobs.items(), found, strict=True)
    }


@pytest.fixture(scope="module")
def divergence(made: dict[str, Any], example: Path) -> dict[str, float]:
    """Mean KL divergence of each package from transformers, over eight windows: one alone is mostly chance."""
    from edgepack.measure.onnx_fidelity import source_tokens

    ids = source_tokens(example, read_text(default_evaluation_text()))[0]
    pieces = [ids[start : start + 512] for start in range(0, 8 * 512, 512)]
    source = SourceDecoder(example, threads=1)
    expected = [np.array(source.logits(piece, 256, 511)) for piece in pieces]
    found = {}
    for name in ("int4", "int4-small", "int8", "fp32", "int4-mixed"):
        values = []
        with Decoder(made[name][0], context=512, threads=1) as package, ThreadPoolExecutor(1) as pool:
            for piece, reference in zip(pieces, expected, strict=True):
                logits = package.logits(piece, 256, 511)
                scores = score(
                    logits, np.array(piece[257:512]), reference=reference.copy(), pool=pool
                )  # it is worked on in place
                assert scores.kld is not None
                values.append(float(scores.kld.mean()))
        found[name] = float(np.mean(values))
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
    assert made["int8"][1]["weights_by_format"] == {"int8/32": 4718592, "int8/128": 524288}
    assert made["int4"][1]["bytes_by_part"]["embedding and head"] == 524288 + 2 * 524288 // 128


def test_sizes_are_predicted_without_reading_a_weight(made: dict[str, Any], example: Path) -> None:
    checkpoint = open_checkpoint(example)
    for name in ("int4", "int4-small", "int8", "fp32"):
        assert predicted_bytes(checkpoint, name) == pytest.approx(made[name][1]["bytes"], rel=0.01)


def test_packages_keep_what_their_recipes_promise(divergence: dict[str, float]) -> None:
    assert divergence["fp32"] < 1e-8
    assert divergence["int8"] < 0.002
    assert divergence["int4"] < 0.16  # 0.119 over 20 windows
    assert divergence["int4"] < divergence["int4-small"]


def test_calibration_keeps_its_size_and_helps(made: dict[str, Any], divergence: dict[str, float]) -> None:
    report = made["int4-mixed"][1]
    assert 5.3 < report["bits_per_weight"] <= 5.6
    assert divergence["int4-mixed"] < 0.9 * divergence["int4"]
    assert set(report["weights_by_format"]) == {"int4/32", "int8/32"}
    assert report["calibration"]["windows"] == 16


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


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 54M parameters: ten times the example."""
    return make(
        tmp_path_factory.mktemp("larger") / "model",
        "LlamaForCausalLM",
        dtype="bfloat16",
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.02,
    )


@pytest.mark.parametrize("size", ["example", "larger"])
@pytest.mark.parametrize(("recipe", "options"), [("int4", {}), ("int4-mixed", {"windows": 2})])
def test_memory_is_predicted(
    size: str, recipe: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(size)
    (tmp_path / "out").mkdir()
    _, usage = worker.run_measured(
        "edgepack.onnx.decoder:export", job(model, tmp_path / "out", recipe, threads=2, **options), what="export"
    )
    predicted = export_memory(open_checkpoint(model), recipe, threads=2)
    assert 0.5 * predicted < usage.peak_rss_bytes < predicted


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
    models = {
        name: make(tmp_path / name, "LlamaForCausalLM") for name in ("nan", "norm", "joined", "tokenizer", "yarn")
    }
    for name, tensor in (("nan", "model.embed_tokens.weight"), ("norm", "model.norm.weight"), ("joined", JOINED)):
        weights = load_file(models[name] / "model.safetensors")
        weights[tensor].view(-1)[5] = float("nan")
        save_file(weights, models[name] / "model.safetensors", metadata={"format": "pt"})
    (models["tokenizer"] / "tokenizer.json").write_text('{"version": "1.0"}')
    written = json.loads((models["yarn"] / "config.json").read_text())
    written["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    (models["yarn"] / "config.json").write_text(json.dumps(written))
    return models


def test_nothing_half_written_is_left_behind(spoiled: dict[str, Path], tmp_path: Path) -> None:
    jobs = [("nan", "int4"), ("norm", "int4"), ("joined", "int4"), ("nan", "int4-mixed"), ("yarn", "int4")]
    found = exports(*(job(spoiled[name], tmp_path / f"{name}-{recipe}-out", recipe) for name, recipe in jobs))
    assert [one["left"] for one in found] == [[]] * 5
    assert [(one["error"]["type"], one["error"]["exit_code"]) for one in found] == [("InputRefused", 5)] * 5
    said = [one["error"]["message"] for one in found]
    assert said[0].startswith("model.embed_tokens.weight: 1 of 2048 blocks")
    assert said[1].startswith("model.norm.weight: 1 weights are NaN")
    assert said[2].startswith(f"{JOINED}: 1 weights are NaN")
    assert said[3].startswith("model.embed_tokens.weight: 1 of")
    assert "yarn" in said[4]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("terminate", "died of signal 6 .*: terminate called after throwing: weights are lost"),
        ("kill", "killed .signal 9., likely out of memory, peak RSS"),
        ("memory", "failed: out of memory"),
    ],
)
def test_a_builder_that_is_killed_leaves_its_last_words_and_nothing_else(
    how: str, words: str, example: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def make_entry(folder: Path) -> None:
        arguments = job(example, folder, "int4") | {"how": how}
        worker.run("decoder_models:dying_export", arguments, what="export to ORT GenAI")

    with pytest.raises(StepError, match=words) as told:
        store.step("genai-export", {"how": how}, make_entry)
    assert told.value.exit_code == 1
    assert told.value.message.startswith("export to ORT GenAI failed")
    assert not [path for path in (tmp_path / "store").rglob("*") if path.suffix in (".onnx", ".data", ".json")]


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


def test_memory_of_calibration_grows_with_the_model_and_that_of_the_others_does_not(
    example: Path, larger: Path
) -> None:
    small, large = open_checkpoint(example), open_checkpoint(larger)
    more = large.parameters - small.parameters
    assert export_memory(large, "int4-mixed", threads=2) - export_memory(small, "int4-mixed", threads=2) > 5 * more
    assert export_memory(large, "int4", threads=2) - export_memory(small, "int4", threads=2) < 0.5 * more


def test_untied_embeddings_are_quantized_too(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "Qwen3ForCausalLM", tie_word_embeddings=False, dtype="bfloat16")
    (found,) = exports(job(model, tmp_path / "out", "int4"))
    parts = found["result"]["bytes_by_part"]
    weights = 2048 * 64
    assert parts["embedding"] == weights // 2 + 2 * weights // 32
    assert parts["head"] == 2048 * (64 + 2)  # rows of 64 make blocks of 64
