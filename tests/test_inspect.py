"""`inspect` on every kind of path, against what gguf-py, safetensors and the files themselves say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from edgepack.errors import InputRefused, UsageError
from edgepack.inspect import inspect
from edgepack.measurement import Measurement
from edgepack.package import write_package
from edgepack.source import Source
from edgepack.targets import load_target

KINDS = gguf.GGMLQuantizationType


def write_gguf(path: Path, *, split: int = 0, **keys) -> list[Path]:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(2048)
    writer.add_block_count(2)
    writer.add_head_count(8)
    writer.add_head_count_kv(keys.get("kv_heads", 2))
    writer.add_embedding_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "c"])
    if keys.get("template", True):
        writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    for name, shape, kind in [
        ("token_embd.weight", (3, 64), KINDS.Q8_0), ("blk.0.attn_q.weight", (64, 64), KINDS.Q8_0),
        ("blk.0.attn_k.weight", (16, 64), KINDS.Q4_0), ("output_norm.weight", (64,), KINDS.F32),
    ]:  # fmt: skip
        data = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def test_gguf_says_what_gguf_py_reads(tmp_path):
    (path,) = write_gguf(tmp_path / "m.gguf")
    found = inspect(path, tensors=True)
    read = gguf.GGUFReader(path)
    assert found["kind"] == "gguf"
    assert (found["name"], found["model_name"], found["architecture"]) == ("m.gguf", "Tiny", "llama")
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in read.tensors)
    assert found["file_bytes"] == path.stat().st_size
    size = sum(int(tensor.n_bytes) for tensor in read.tensors)
    assert found["bits_per_weight"] == pytest.approx(size * 8 / found["parameters"], abs=1e-4)
    assert found["bytes_by_type"]["Q8_0"] == {"tensors": 2, "bytes": (3 + 64) * 68}
    assert list(found["bytes_by_type"]) == ["Q8_0", "Q4_0", "F32"]
    assert found["tensors"] == [
        {
            "name": tensor.name, "shape": tensor.shape[::-1].tolist(), "type": tensor.tensor_type.name,
            "parameters": int(tensor.n_elements), "bytes": int(tensor.n_bytes),
        }
        for tensor in read.tensors
    ]  # fmt: skip


def test_gguf_facts_come_from_its_metadata(tmp_path):
    (path,) = write_gguf(tmp_path / "m.gguf")
    found = inspect(path)
    assert (found["context_length"], found["layers"], found["heads"], found["kv_heads"]) == (2048, 2, 8, 2)
    assert found["file_type"] == "Q8_0"
    assert found["tokenizer"] == {"kind": "byte-level BPE", "pre": "smollm", "tokens": 3}
    assert (found["chat_template"], found["licence"]) == (True, "apache-2.0")
    assert "tensors" not in found


def test_layers_that_differ_are_listed(tmp_path):
    (path,) = write_gguf(tmp_path / "a.gguf", kv_heads=[2, 1], template=False)
    assert inspect(path)["kv_heads"] == [2, 1]
    assert inspect(path)["chat_template"] is False
    (path,) = write_gguf(tmp_path / "b.gguf", kv_heads=[4, 4])
    assert inspect(path)["kv_heads"] == 4


def test_any_shard_stands_for_the_whole_set(tmp_path):
    (tmp_path / "split").mkdir()
    shards = write_gguf(tmp_path / "split" / "m.gguf", split=2)
    (whole,) = write_gguf(tmp_path / "whole.gguf")
    assert len(shards) == 2
    for shard in shards:
        found, expected = inspect(shard), inspect(whole)
        assert found["files"] == 2
        assert found["file_bytes"] == sum(path.stat().st_size for path in shards)
        for fact in ("parameters", "bytes_by_type", "context_length", "tokenizer", "licence"):
            assert found[fact] == expected[fact]


def test_gguf_that_is_no_model_is_described_all_the_same(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(tmp_path / "imatrix.gguf")
    assert (found["architecture"], found["tokenizer"], found["context_length"]) == (None, None, None)
    assert found["parameters"] == 64


def test_checkpoint_says_what_its_files_say(example):
    found = inspect(example, tensors=True)
    config = json.loads((example / "config.json").read_text())
    with safe_open(example / "model.safetensors", framework="numpy") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert found["kind"] == "checkpoint"
    assert (found["name"], found["architecture"], found["supported"]) == (example.name, "LlamaForCausalLM", True)
    assert {tensor["name"]: tensor["shape"] for tensor in found["tensors"]} == shapes
    assert found["parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    assert found["bits_per_weight"] == 16
    assert found["bytes_by_type"] == {"BF16": {"tensors": len(shapes), "bytes": 2 * found["parameters"]}}
    assert found["file_bytes"] == (example / "model.safetensors").stat().st_size
    assert found["context_length"] == config["max_position_embeddings"]
    assert (found["layers"], found["heads"], found["kv_heads"]) == (6, 4, 2)
    assert found["tokenizer"] == {"kind": "byte-level BPE", "tokens": 2048}
    assert found["chat_template"] is True


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


def test_checkpoint_of_an_unknown_architecture_is_described_too(copied_model):
    edit(copied_model, "config.json", architectures=["NovelForCausalLM"], max_position_embeddings=None, n_positions=77)
    found = inspect(copied_model)
    assert (found["architecture"], found["supported"], found["context_length"]) == ("NovelForCausalLM", False, 77)


def test_checkpoint_without_template_and_with_a_licence(copied_model):
    (copied_model / "chat_template.jinja").unlink()
    (copied_model / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    found = inspect(copied_model)
    assert (found["chat_template"], found["licence"]) == (False, "MIT")
    edit(copied_model, "tokenizer_config.json", chat_template="{{ messages }}")
    assert inspect(copied_model)["chat_template"] is True


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "SentencePiece unigram"),
        ({"type": "WordPiece", "vocab": {"a": 0, "b": 1}}, "WordPiece"),
        ({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "byte_fallback": True}, "SentencePiece BPE"),
    ],
)
def test_kinds_of_tokenizers_are_told_apart(copied_model, model, kind):
    (copied_model / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": None}))
    assert inspect(copied_model)["tokenizer"] == {"kind": kind, "tokens": 2}


@pytest.mark.parametrize("document", ['{"model": 3}', '{"model": {"type": "BPE"}}', '{"model": {"vocab": [1]}}', "[]"])
def test_malformed_tokenizer_is_refused_in_one_line(copied_model, document):
    (copied_model / "tokenizer.json").write_text(document)
    with pytest.raises(InputRefused, match=r"tokenizer\.json"):
        inspect(copied_model)


def test_package_says_whence_it_is_and_what_its_artifact_holds(tmp_path):
    (model,) = write_gguf(tmp_path / "m.gguf")
    expected = inspect(model, tensors=True)
    source = Source(kind="hub", name="tiny", path=tmp_path, id="acme/tiny", commit="a" * 40, licence="MIT")
    write_package(
        tmp_path / "tiny-laptop",
        name="tiny",
        target=load_target("laptop"),
        source=source,
        recipe={"quantize": "Q8_0"},
        toolchain={"edgepack": "0"},
        runtime={"engine": "llama.cpp", "min_version": "0", "threads": 1, "context": 512, "gpu_layers": 0},
        measurements=[Measurement("artifact_bytes", 1, "bytes", budget={"max": 2}, verdict="pass")],
        measured_on={"machine": "here"},
        plan={"schema_version": 1},
        artifact=[model],
    )
    found = inspect(tmp_path / "tiny-laptop", tensors=True)
    assert (found["kind"], found["name"], found["target"], found["quantize"]) == ("package", "tiny", "laptop", "Q8_0")
    assert (found["source"], found["commit"], found["licence"]) == ("acme/tiny", "a" * 40, "MIT")
    assert found["artifact_digest"].startswith("sha256:")
    assert found["verdict"] == json.loads((tmp_path / "tiny-laptop" / "edgepack.json").read_text())["verdict"]
    for fact in ("parameters", "bytes_by_type", "bits_per_weight", "context_length", "tokenizer", "tensors"):
        assert found[fact] == expected[fact]


def test_every_answer_can_be_dumped_as_json(tmp_path, example):
    for path in (example, *write_gguf(tmp_path / "m.gguf")):
        json.dumps(inspect(path, tensors=True), allow_nan=False)


def test_hostile_gguf_is_refused(tmp_path):
    (path,) = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputRefused, match="truncated or corrupt"):
        inspect(path)


def test_paths_that_are_nothing_say_what_to_give_instead(tmp_path, copied_model):
    with pytest.raises(UsageError, match="no such file or folder"):
        inspect(tmp_path / "absent")
    with pytest.raises(UsageError) as usage:
        inspect(copied_model / "model.safetensors")
    assert usage.value.hint == f"Give its folder: {copied_model}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="no "):
        inspect(tmp_path / "empty")


def test_command_prints_the_same_facts(edgepack_command, copied_model, tmp_path):
    done = edgepack_command("inspect", copied_model, "--tensors", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed.pop("schema_version") == 1
    assert printed == inspect(copied_model, tensors=True)
    shutil.rmtree(copied_model)
    assert edgepack_command("inspect", copied_model).returncode == 2
