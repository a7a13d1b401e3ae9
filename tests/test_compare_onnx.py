"""Decoders of two formats side by side: the same windows, whatever runs them. Encoders: tests/onnx/test_mobile.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from artifacts import exported, random_bert

from edgepack.compare import compare
from edgepack.errors import ConformanceError, InputRefused, UsageError
from edgepack.text import default_evaluation_text, read_text
from edgepack.worker import run

WINDOWS = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text(default_evaluation_text())[:9_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gguf(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(example, "Q8_0", tmp_path_factory.mktemp("gguf"))


def test_a_gguf_and_an_onnx_decoder_meet_on_the_same_windows(
    gguf: Path, int4_package: Path, example: Path, text: Path
) -> None:
    found = compare(gguf, int4_package, text=text, source=str(example), windows=WINDOWS, speed=False, threads=2)
    rows = {row["name"]: row for row in found["rows"]}
    arguments = {"candidate": str(int4_package), "source": str(example), "text": str(text), "windows": WINDOWS}
    alone = run(
        "edgepack.measure.onnx_fidelity:decoder_fidelity", arguments | {"window_tokens": 512, "threads": 2}, what="x"
    )
    values = {row["name"]: row["value"] for row in alone["rows"]}
    for name in ("mean_kld", "perplexity", "top1_agreement"):
        assert rows[name]["b"] == pytest.approx(values[name], rel=1e-4)
    assert 0 < rows["mean_kld"]["a"] < 0.01 < rows["mean_kld"]["b"]
    difference = rows["mean_kld"]["difference"]
    assert difference["value"] == pytest.approx(rows["mean_kld"]["b"] - rows["mean_kld"]["a"])
    assert difference["ci95"][0] <= difference["value"] <= difference["ci95"][1]
    assert [found[side]["format"] for side in "ab"] == ["gguf", "onnx"]


def test_an_onnx_decoder_that_reads_other_tokens_is_refused(
    gguf: Path, int4_package: Path, text: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(int4_package, tmp_path / "other"))
    document = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert '"the"' in document
    (other / "tokenizer.json").write_text(document.replace('"\u0120the"', '"\u0120thx"'), encoding="utf-8")
    with pytest.raises((ConformanceError, InputRefused), match="tokeniz"):
        compare(gguf, other, text=text, windows=WINDOWS, speed=False, threads=1)


def test_a_decoder_and_an_encoder_are_not_of_one_model(int4_package: Path, text: Path, tmp_path: Path) -> None:
    encoder = exported(random_bert(tmp_path / "bert"), "F32", tmp_path)
    with pytest.raises(UsageError, match="not of one model: a language model and an encoder"):
        compare(int4_package, encoder, text=text, windows=WINDOWS, speed=False, threads=1)


def test_a_short_text_names_an_option_that_compare_has(gguf: Path, int4_package: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Too short.")
    with pytest.raises(InputRefused, match="two windows") as caught:
        compare(gguf, int4_package, text=tmp_path / "t.txt", windows=WINDOWS, speed=False, threads=1)
    assert caught.value.hint.startswith("Give a longer text with --evaluation")
