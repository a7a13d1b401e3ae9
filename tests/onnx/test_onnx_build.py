"""ONNX packages from end to end: the same command, verdicts and manifest as GGUF, in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pico_encoders import sentence_transformer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

import edgepack
from edgepack.errors import InputRefused

FAST = ["measure.windows=2", "measure.repetitions=2", "measure.latency=false"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"{p}{c}" for p in ("", "##") for c in "abcdefghijklmnopqrstuvwxyz"),
]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sentence-transformers folder with a WordPiece tokenizer of single letters."""
    folder = sentence_transformer(tmp_path_factory.mktemp("models") / "embedder", {"pooling_mode_mean_tokens": True})
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
    )
    tokenizer.enable_truncation(32)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_decoder_becomes_a_whole_package_that_ort_genai_runs(example: Path, tmp_path: Path) -> None:
    package = edgepack.build(example, "laptop", tmp_path / "p", format="onnx", quantize="int8", overrides=FAST)
    values = {row.name: row.value for row in package.measurements}
    assert edgepack.verify(package.path).problems == ()
    assert {path.name for path in (package.path / "model").iterdir()} >= {"model.onnx", "genai_config.json"}
    assert values["mean_kld"] is not None and 0 < values["mean_kld"] < 0.02
    assert values["artifact_bytes"] == sum(path.stat().st_size for path in (package.path / "model").iterdir())


def test_a_gguf_and_an_onnx_package_of_one_model_are_measured_against_the_same_source(
    example: Path, tmp_path: Path
) -> None:
    packages = [
        edgepack.build(example, "laptop", tmp_path / format, format=format, quantize=quantize, overrides=FAST)
        for format, quantize in (("gguf", "Q8_0"), ("onnx", "int8"))
    ]
    perplexities = [row.value for p in packages for row in p.measurements if row.name == "source_perplexity"]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    names = ("mean_kld", "median_kld", "kld_p99", "top1_agreement", "perplexity", "source_perplexity")
    counts = [{row.name: (row.n, row.unit) for row in p.measurements if row.name in names} for p in packages]
    assert counts[0] == counts[1]
    assert set(counts[0]) == set(names)


def test_an_encoder_becomes_a_whole_package_that_gives_the_sources_embeddings(embedder: Path, tmp_path: Path) -> None:
    package = edgepack.build(embedder, "laptop", tmp_path / "p", format="onnx", quantize="int8-dynamic", overrides=FAST)
    values = {row.name: row.value for row in package.measurements}
    assert edgepack.verify(package.path).problems == ()
    assert values["cosine_mean"] is not None and values["cosine_mean"] > 0.99
    assert package.manifest["recipe"]["task"] == "sentence-similarity"
    assert "tokenizer.json" in {path.name for path in (package.path / "tokenizer").iterdir()}


def test_a_gguf_is_no_source_for_onnx(example: Path, tmp_path: Path) -> None:
    bare = ["measure.fidelity=false", "measure.latency=false"]
    package = edgepack.build(example, "laptop", tmp_path / "float", quantize="F16", overrides=bare)
    with pytest.raises(InputRefused, match="made from a checkpoint"):
        edgepack.plan(package.artifact, "laptop", format="onnx")
