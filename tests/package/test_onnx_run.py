"""The code of ONNX cards: the Python of every task is run on a small graph, the rest is checked for what it names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgepack.package.onnx_run import literal, sections

TEXT = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] How do I reset my password ? To it , open Settings choose Account and press "
    "Reset . The new phone arrived in Berlin on Monday"
)
WORDS = TEXT.split()
LABELS = {"0": "plain", "1": "place", "2": "time"}
SPECIAL = {"before": [2], "between": [3], "after": [3], "types": True}


def logits_of(classes: int) -> np.ndarray:
    """What the graph gives for each token: `[words, classes]`."""
    return np.random.default_rng(3).standard_normal((len(WORDS), classes)).astype(np.float32)


def package(folder: Path, outputs: list[str], classes: int, *, pooled: bool = False) -> Path:
    """A package whose model looks tokens up in a table; pooled: the mean over tokens."""
    (folder / "model").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    table = numpy_helper.from_array(logits_of(classes), "table")
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["found"])]
    shape: list[Any] = ["batch", "sequence", classes]
    if len(outputs) == 2:
        nodes += [helper.make_node("Split", ["found"], ["s", "e"], axis=2, num_outputs=2)]
        nodes += [helper.make_node("Squeeze", [part, "axis"], [name]) for part, name in zip("se", outputs, strict=True)]
        shape = shape[:2]
    elif pooled:
        nodes += [helper.make_node("ReduceMean", ["found", "tokens"], outputs, keepdims=0)]
        shape = ["batch", classes]
    else:
        nodes += [helper.make_node("Identity", ["found"], outputs)]
    constants = [numpy_helper.from_array(np.array([axis]), name) for name, axis in (("axis", 2), ("tokens", 1))]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, made, [table, *constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model" / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "labels.json").write_text(json.dumps(LABELS))
    return folder


def runtime(task: str, **changes: Any) -> dict[str, Any]:
    shape = ["batch", changes.pop("classes", 3)]
    settings = {"max_tokens": 64, "pad_id": 0, "special_tokens": SPECIAL} | changes
    return {
        "engine": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "task": task,
        "outputs": [{"name": "logits", "shape": shape, "dtype": "float32"}],
        "text": settings,
    }


def run_python(folder: Path, document: dict[str, Any], path: Path | None = None) -> list[str]:
    code = next(code for title, _, code in sections("m-phone", "model/model.onnx", document) if title == "Python")
    extra = {} if path is None else {"env": {"PYTHONPATH": str(path)}}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, **extra)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ids(text: str) -> list[int]:
    found = [WORDS.index(word) if word in WORDS else 1 for word in re.findall(r"\[\w+\]|\w+|[^\w\s]+", text)]
    return [2, *found, 3]


SENTENCE = "The new phone arrived in Berlin on Monday."
QUESTION = "How do I reset my password?"
PASSAGE = "To reset it, open Settings, choose Account and press Reset password."


def test_text_classification_names_the_likeliest_class(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", ["logits"], 3, pooled=True)
    logits = logits_of(3)[ids(SENTENCE)].mean(axis=0)
    label, score = run_python(folder, runtime("text-classification"))[-1].split()
    assert label == LABELS[str(logits.argmax())]
    assert float(score) == pytest.approx(np.exp(logits).max() / np.exp(logits).sum(), rel=1e-5)


def test_a_reranker_scores_the_pair(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", ["logits"], 1, pooled=True)
    expected = logits_of(1)[[*ids(QUESTION), *ids(PASSAGE)[1:]]].mean()
    assert float(run_python(folder, runtime("text-classification", classes=1))[-1]) == pytest.approx(expected, abs=1e-5)


def test_token_classification_labels_every_token(tmp_path: Path) -> None:
    lines = run_python(package(tmp_path / "p", ["logits"], 3), runtime("token-classification"))
    best = logits_of(3)[ids(SENTENCE)].argmax(axis=-1)
    assert [line.split()[1] for line in lines] == [LABELS[str(label)] for label in best]
    assert lines[0].split()[0] == "[CLS]"


def test_question_answering_prints_a_piece_of_the_context(tmp_path: Path) -> None:
    (answer,) = run_python(package(tmp_path / "p", ["start_logits", "end_logits"], 2), runtime("question-answering"))
    context = ids(PASSAGE)[1:-1]
    table = logits_of(2)[context]
    first = int(table[:, 0].argmax())
    last = first + int(table[first:, 1].argmax())
    words = re.findall(r"\w+|[^\w\s]+", PASSAGE)
    assert re.findall(r"\w+|[^\w\s]+", answer) == words[first : last + 1]
    assert answer in PASSAGE


def test_fill_mask_prints_the_likeliest_words(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", ["logits"], len(WORDS))
    (line,) = run_python(folder, runtime("fill-mask", mask_token="[MASK]", mask_id=4))
    best = logits_of(len(WORDS))[4].argsort()[::-1][:5]
    assert line == str([WORDS[i] for i in best])


def test_fixed_shapes_are_padded_to(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", ["last_hidden_state"], 4)
    (line,) = run_python(folder, runtime("feature-extraction", padded_to=20, max_tokens=20, rows=2))
    assert line == "(20, 4)"
    titles = [title for title, _, _ in sections("m", "model/model.onnx", runtime("feature-extraction", rows=2))]
    assert titles == ["Python"], "the other languages' code gives one row"


PIL = """
import numpy as np

class Resampling:
    BICUBIC = 3

class _Picture:
    def __init__(self, pixels): self.pixels, self.size = pixels, (pixels.shape[1], pixels.shape[0])
    def convert(self, mode): assert mode == "RGB"; return self
    def resize(self, size, how):
        rows, columns = (np.arange(n) * have // n for n, have in ((size[1], self.size[1]), (size[0], self.size[0])))
        return _Picture(self.pixels[rows][:, columns])
    def crop(self, box): return _Picture(self.pixels[box[1] : box[3], box[0] : box[2]])
    def __array__(self, dtype=None, copy=None): return np.asarray(self.pixels, dtype=dtype)

def open(path): return _Picture(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
"""


def test_an_image_is_scaled_cropped_and_normalised(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", ["x"], 1)
    nodes = [helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    graph = helper.make_graph(nodes, "g", [pixels], [logits], [axes])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        folder / "model/model.onnx",
    )
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("")
    (tmp_path / "PIL" / "Image.py").write_text(PIL)
    image = {"height": 4, "width": 4, "shortest_edge": 4, "resample": "bicubic", "scale": 1 / 255}
    image |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    document = runtime("image-classification") | {"image": image}
    del document["text"]
    lines = run_python(folder, document, tmp_path)
    source = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)[::2, ::2][:, 1:5] / 255  # 8 x 12 to 4 x 6, middle
    expected = (source.mean(axis=(0, 1)) - image["mean"]) / image["std"]
    assert lines == [LABELS[str(expected.argmax())]]
    for title, fence, code in sections("m", "model/model.onnx", document):
        assert "$" not in re.sub(r"\$[01]", "", code), title
        assert ("0.5f" in code) == (fence == "kotlin")


@pytest.mark.parametrize(
    "task",
    [
        "sentence-similarity",
        "feature-extraction",
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
    ],
)
def test_every_task_has_code_in_three_languages_with_its_own_numbers(task: str) -> None:
    document = runtime(task, mask_token="<mask>", mask_id=77, prompt='query "$x": ')
    found = sections("my model-phone", "model/model.onnx", document)
    assert [title for title, _, _ in found] == ["Python", "Android (Kotlin)", "iOS (Swift)"]
    for _, fence, code in found:
        assert "model/model.onnx" in code and "64" in code and "```" not in code
        assert fence == "python" or "my-model-phone" in code
        if task == "sentence-similarity":
            assert {"kotlin": '"query \\"\\$x\\": How'}.get(fence, '"query \\"$x\\": How') in code
        if task == "fill-mask":
            assert "77" in code and "<mask>" in code


def test_decoders_say_what_exists_and_what_does_not() -> None:
    document = {
        "engine": "onnxruntime-genai",
        "min_version": "0.18",
        "context": 512,
        "provider": "CPUExecutionProvider",
    }
    code = {fence: code for _, fence, code in sections("m", "model/model.onnx", document)}
    assert 'og.Model("model")' in code["python"] and "append_tokens" in code["python"]
    assert "Maven has no package" in code["kotlin"] and "SimpleGenAI" in code["kotlin"]
    assert (
        "has no release for iOS" in code["swift"] and "OGAGenerator(model: model, params: parameters)" in code["swift"]
    )
    chat = {fence: code for _, fence, code in sections("m", "model/model.onnx", document | {"chat": True})}
    assert "apply_chat_template" in chat["python"]


def test_a_decoders_python_continues_a_text(tmp_path: Path, int4_package: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "model").symlink_to(int4_package)
    document = {"engine": "onnxruntime-genai", "context": 40, "provider": "CPUExecutionProvider"}
    assert len(" ".join(run_python(folder, document))) > 20


@pytest.mark.parametrize("language", ["python", "kotlin", "swift"])
def test_words_of_strangers_stay_inside_their_literal(language: str) -> None:
    evil = 'a" + System.exit(1) + "\\" \n```\n${x} \\(y) \u2028'
    found = literal(evil, language)
    assert "\n" not in found and found[0] == found[-1] == '"'
    assert re.fullmatch(r'"(?:[^"\\]|\\.)*"', found), "every quote inside is escaped"
    if language == "kotlin":
        assert "\\${x}" in found


def test_a_package_whose_use_nobody_knows_has_no_code() -> None:
    assert sections("m", "model/model.onnx", runtime("something-else")) == []
