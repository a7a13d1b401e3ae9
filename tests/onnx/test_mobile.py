"""Packages for phones: their files, the code of the card, the neural processor's profile, .ort, inspect, compare."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from pico_encoders import sentence_transformer, write
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

import edgepack
from edgepack.compare import compare
from edgepack.errors import InputRefused, MissingError, UsageError
from edgepack.inspect import inspect
from edgepack.onnx import app_files
from edgepack.onnx.providers import available
from edgepack.package import Package
from edgepack.text import default_evaluation_text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *(f"{p}{c}" for p in ("", "##") for c in "abcdefghijklmnopqrstuvwxyz")]


def add_tokenizer(folder: Path) -> Path:
    """A WordPiece tokenizer of single letters, with templates for one text and for two."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 24, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short evaluation text: these models are random, so a few sentences say as much as many."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(default_evaluation_text().read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(
        sentence_transformer(tmp_path_factory.mktemp("m") / "embedder", {"pooling_mode_mean_tokens": True})
    )


@pytest.fixture(scope="module")
def phone(embedder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("p") / "phone"
    return edgepack.build(
        embedder, "phone", folder, quantize="int8-dynamic", overrides=["onnx.ort=true"], evaluation=text
    )


@pytest.fixture(scope="module")
def npu(embedder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("p") / "npu"
    return edgepack.build(embedder, "android-npu", folder, overrides=["onnx.sequence=32"], evaluation=text)


def runtime_of(package: Package) -> dict:
    return json.loads((package.path / "runtime.json").read_text())


def test_phone_takes_encoders_as_onnx_and_leaves_its_own_speed_unmeasured(phone: Package) -> None:
    rows = {row.name: row for row in phone.measurements}
    assert edgepack.verify(phone.path).problems == ()
    assert phone.artifact.name == "model.onnx" and phone.manifest["recipe"]["format"] == "onnx"
    assert rows["cosine_mean"].verdict == rows["cosine_p01"].verdict == "pass"
    assert rows["peak_rss_mb"].verdict == "not_measured"
    assert "label_agreement" not in rows, "a budget on labels does not apply to embeddings"
    assert phone.verdict == "incomplete"


def test_a_package_has_what_an_app_needs_and_no_modelfile(phone: Package) -> None:
    assert {path.name for path in (phone.path / "tokenizer").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    assert not (phone.path / "Modelfile").exists()
    runtime = runtime_of(phone)
    assert runtime["provider"] == "CPUExecutionProvider" and runtime["min_version"] == "1.19"
    assert runtime["session"]["intra_op_num_threads"] == 4
    assert runtime["text"]["max_tokens"] == 24
    assert runtime["text"]["special_tokens"] == {"before": [2], "between": [3], "after": [3], "types": True}


def test_the_python_of_the_card_gives_what_transformers_gives(phone: Package, embedder: Path) -> None:
    card = (phone.path / "README.md").read_text()
    assert [title for title in ("Python", "Android (Kotlin)", "iOS (Swift)") if f"**{title}**" in card] == [
        "Python", "Android (Kotlin)", "iOS (Swift)",
    ]  # fmt: skip
    code = re.search(r"```python\n(.*?)```", card, re.S)[1] + "\nprint('|', embedding.tolist())"
    done = subprocess.run([sys.executable, "-c", code], cwd=phone.path, capture_output=True, text=True, check=True)
    found = np.array(json.loads(done.stdout.rpartition("|")[2]))
    expected = source_embedding(embedder, "How do I reset my password?")
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999


def source_embedding(folder: Path, sentence: str) -> np.ndarray:
    """What the source gives: transformers with its own tokenizer, the mean over tokens."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(sentence, truncation=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(**given).last_hidden_state[0].mean(dim=0).numpy()


def test_ort_is_loaded_and_gives_the_same(phone: Package) -> None:
    feeds = {name: np.array([[2, 9, 11, 3]]) for name in ("input_ids",)}
    feeds |= {"attention_mask": np.ones((1, 4), np.int64), "token_type_ids": np.zeros((1, 4), np.int64)}
    both = [
        onnxruntime.InferenceSession(str(phone.path / "model" / name), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for name in ("model.onnx", "model.ort")
    ]
    np.testing.assert_allclose(both[0][0], both[1][0], atol=1e-6)
    operators = (phone.path / "model" / "model.required_operators_and_types.config").read_text()
    assert "MatMulInteger" in operators and "/" not in operators
    assert phone.manifest["recipe"]["ort"]["max_abs_diff"] < 1e-6


def test_the_neural_processors_package_is_qdq_of_fixed_shape_proved_on_the_cpu(npu: Package) -> None:
    rows = {row.name: row for row in npu.measurements}
    found = inspect(npu.path)
    assert found["fixed_shapes"] and found["provider"] == "QNNExecutionProvider"
    assert found["inputs"]["input_ids"] == "int64 [1, 32]"
    assert found["operators"]["com.microsoft::QuantizeLinear"] > 20 and "uint16" in found["bytes_by_type"]
    assert rows["cosine_mean"].value > 0.999
    assert "computed by CPUExecutionProvider; QNNExecutionProvider is not in this" in rows["cosine_mean"].note
    assert rows["peak_rss_mb"].verdict == "not_measured" and npu.verdict == "incomplete"
    runtime = runtime_of(npu)
    assert runtime["provider_options"]["backend_path"] == "libQnnHtp.so" and runtime["text"]["padded_to"] == 32
    card = (npu.path / "README.md").read_text()
    assert "onnxruntime-android-qnn" in card and "addQnn" in card and "iOS (Swift)" not in card


def test_speed_on_a_provider_that_is_not_here_ends_with_status_4_and_the_list(npu: Package, embedder: Path) -> None:
    with pytest.raises(MissingError, match=r"QNNExecutionProvider.*it has .*CPUExecutionProvider") as caught:
        edgepack.validate(npu.path, overrides=["measure.fidelity=false"])
    assert caught.value.exit_code == 4 and all(name in caught.value.message for name in available())
    asked = ["onnx.provider=CUDAExecutionProvider"]
    with pytest.raises(MissingError, match="CUDAExecutionProvider is not in the installed onnxruntime"):
        edgepack.build(embedder, "laptop", npu.path.parent / "never", quantize="fp32", overrides=asked)
    assert not (npu.path.parent / "never").exists()


@pytest.mark.parametrize(("name", "exists"), [("tokenizer.json", True), ("preprocessor_config.json", False)])
def test_a_source_without_what_an_app_needs_is_refused_by_name(
    name: str, exists: bool, embedder: Path, tmp_path: Path
) -> None:
    if exists:
        folder = Path(shutil.copytree(embedder, tmp_path / "m"))
        (folder / name).unlink()
        (folder / "vocab.txt").write_text("\n".join(WORDS))
    else:
        folder = write(tmp_path / "m", "vit", "AutoModelForImageClassification")
    with pytest.raises(InputRefused, match=rf"{re.escape(name)} is missing") as caught:
        edgepack.plan(folder, "phone", quantize="int8")
    assert caught.value.exit_code == 5
    assert ("vocab.txt" in caught.value.hint) == exists


def test_a_task_without_a_head_names_those_there_are(embedder: Path) -> None:
    with pytest.raises(UsageError, match="no head for it") as caught:
        edgepack.plan(embedder, "phone", quantize="int8", overrides=["onnx.task=token-classification"])
    assert "sentence-similarity" in caught.value.hint


def test_two_packages_are_compared_on_the_same_sentences(
    phone: Package, npu: Package, embedder: Path, text: Path
) -> None:
    found = compare(phone.path, npu.path, text=text, source=str(embedder), windows=4, speed=False, threads=2)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["artifact_bytes"]["b"] == npu.artifact.stat().st_size
    row = rows["cosine_mean"]
    assert row["n"] == 20 and row["difference"]["value"] == pytest.approx(row["b"] - row["a"], abs=1e-6)
    assert row["difference"]["ci95"][0] <= row["difference"]["value"] <= row["difference"]["ci95"][1]
    own = {row.name: row.value for row in phone.measurements}
    assert row["a"] == pytest.approx(own["cosine_mean"], abs=1e-3)
    assert json.loads(json.dumps(found)) == found


def test_without_a_source_an_artifact_equals_itself(phone: Package, text: Path) -> None:
    found = compare(phone.path, phone.path, text=text, windows=2, threads=1)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["cosine_mean_of_a_and_b"]["b"] == pytest.approx(1, abs=1e-6)
    assert rows["latency_ms_p50"]["a"] > 0


def test_packages_of_different_models_are_not_compared(phone: Package, tmp_path: Path, text: Path) -> None:
    other = Path(shutil.copytree(phone.path, tmp_path / "other"))
    manifest = json.loads((other / "edgepack.json").read_text())
    manifest["source"]["files"]["model.safetensors"] = "00" * 32
    (other / "edgepack.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="not of one model: weights of other digests"):
        compare(phone.path, other, text=text, windows=2, speed=False, threads=1)
    bare = tmp_path / "model.onnx"
    shutil.copy(phone.artifact, bare)
    with pytest.raises(UsageError, match="an encoder by itself"):
        compare(phone.path, bare, text=text, windows=2, speed=False, threads=1)


def test_inspect_says_what_onnx_says(phone: Package, edgepack_command) -> None:
    import onnx

    model = onnx.load(phone.artifact)
    found = inspect(phone.artifact, tensors=True)
    assert found["kind"] == "onnx" and found["nodes"] == len(model.graph.node)
    assert found["opsets"] == {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    assert {row["name"] for row in found["tensors"]} >= {tensor.name for tensor in model.graph.initializer}
    assert sum(found["operators"].values()) == found["nodes"]
    assert found["file_bytes"] == phone.artifact.stat().st_size
    done = edgepack_command("inspect", phone.path, "--json")
    assert json.loads(done.stdout)["task"] == "sentence-similarity" and done.returncode == 0
    assert "bytes" in edgepack_command("inspect", phone.path).stdout
    with pytest.raises(UsageError, match="minimal builds"):
        inspect(phone.path / "model" / "model.ort")


def test_verify_tells_a_file_from_a_folder_and_gives_an_error_document(
    phone: Package, tmp_path: Path, edgepack_command
) -> None:
    with pytest.raises(UsageError, match="a file, expected a package folder"):
        edgepack.verify(phone.artifact)
    spoilt = Path(shutil.copytree(phone.path, tmp_path / "p"))
    (spoilt / "runtime.json").write_text("{}")
    done = edgepack_command("verify", spoilt, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == document["error"]["exit_code"] == 5
    assert "runtime.json: changed" in document["error"]["message"]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}, ([0], [2, 2], [2], False)),
        ({"type": "BertProcessing", "cls": ["a", 7], "sep": ["b", 8]}, ([7], [8], [8], True)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}]}, ([], [], [], False)),
        (None, ([], [], [], False)),
    ],
)
def test_special_tokens_are_read_from_every_post_processor(processor, expected) -> None:
    found = app_files.special_tokens({"post_processor": processor})
    assert tuple(found[key] for key in ("before", "between", "after", "types")) == expected
