from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifacts import random_bert

from edgepack.conform import onnx_tokens as module
from edgepack.conform.onnx_tokens import chat, tokens
from edgepack.errors import ConformanceError, InputRefused
from edgepack.worker import no_progress


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a WordPiece tokenizer that puts tokens around a text."""
    return random_bert(tmp_path_factory.mktemp("bert"))


def compared(package: Path, source: Path) -> dict[str, Any]:
    return tokens(package=str(package), source=str(source), progress=no_progress)


def changed(folder: Path, name: str, edit: Callable[[dict[str, Any]], None], to: Path) -> Path:
    """A copy with another tokenizer file."""
    shutil.copytree(folder, to)
    document = json.loads((to / name).read_text())
    edit(document)
    (to / name).write_text(json.dumps(document))
    return to


def test_both_engines_of_a_package_give_the_sources_ids(int4_package: Path, example: Path) -> None:
    found = compared(int4_package, example)
    assert list(found["engines"]) == ["tokenizer.json", "onnxruntime-genai"]
    assert found["engines"]["tokenizer.json"]["equal"] == found["engines"]["tokenizer.json"]["texts"] == found["texts"]
    native = found["engines"]["onnxruntime-genai"]
    assert [entry["reason"] for entry in native["differences"]] == [module._NUL]
    assert native["equal"] == native["texts"] - native["differences"][0]["texts"]
    assert found["tokens"] > 4000


def test_an_encoders_tokenizer_is_compared_with_its_special_tokens(bert: Path) -> None:
    found = compared(bert, bert)
    assert list(found["engines"]) == ["tokenizer.json"]
    assert found["equal"] == found["texts"]


@pytest.mark.parametrize("engine", ["tokenizer.json", "onnxruntime-genai"])
def test_another_id_is_found_and_shown(
    engine: str, int4_package: Path, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens of the vocabulary change places."""

    def swap(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary["h"], vocabulary["q"] = vocabulary["q"], vocabulary["h"]

    package = changed(int4_package, "tokenizer.json", swap, tmp_path / "package")
    if engine == "onnxruntime-genai":  # keep the first one quiet, to see that the second one speaks up
        original = module._engines
        monkeypatch.setattr(module, "_engines", lambda path: {engine: original(path)[engine]})
    with pytest.raises(ConformanceError, match=rf"{engine}: token ids differ: text '.*', token \d+: the source has"):
        compared(package, example)


def test_special_tokens_that_only_one_side_adds_are_found(bert: Path, tmp_path: Path) -> None:
    package = changed(bert, "tokenizer.json", lambda d: d.update(post_processor=None), tmp_path / "package")
    with pytest.raises(ConformanceError, match=r"tokenizer\.json: token ids differ"):
        compared(package, bert)


def test_a_package_without_a_tokenizer_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="an app has nothing to encode texts with"):
        compared(tmp_path, bert)
    (tmp_path / "tokenizer.json").symlink_to(bert / "tokenizer.json")
    with pytest.raises(InputRefused, match="not a regular file"):
        compared(tmp_path, bert)


def rendered(monkeypatch: pytest.MonkeyPatch, texts: dict[str, Any], template: str | None = "{{ tools }}") -> None:
    """What the process that renders would have answered."""
    monkeypatch.setattr(module, "run", lambda *a, **k: {"template": template, "texts": texts})


def test_chats_reach_the_model_alike(int4_package: Path, example: Path) -> None:
    """In the real engines, in the process that renders."""
    found = chat(package=str(int4_package), source=str(example))
    assert found["chats"] == 2
    assert found["skipped"] == {"tools": "the template knows no tools"}
    assert found["tokens"] > 80


def test_a_chat_that_differs_is_found(int4_package: Path, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered(monkeypatch, {"turns": [{"text": "abc"}, {"text": "abd"}]})
    with pytest.raises(ConformanceError, match="renders differently at character 2: the source has 'c'"):
        chat(package=str(int4_package), source=str(example))
    rendered(monkeypatch, {"turns": [{"text": "abc"}, {"error": "no such filter"}]})
    with pytest.raises(ConformanceError, match="onnxruntime-genai alone can't render it: no such filter"):
        chat(package=str(int4_package), source=str(example))
    rendered(monkeypatch, {"turns": [{"error": "undefined"}, {"error": "undefined"}]})
    with pytest.raises(InputRefused, match="can't render a plain chat: undefined"):
        chat(package=str(int4_package), source=str(example))
    rendered(monkeypatch, {}, None)
    assert chat(package=str(int4_package), source=str(example))["note"] == "the model has no chat template"


def test_a_template_without_end_is_stopped(
    int4_package: Path, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(example, source)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text(loop)
    monkeypatch.setattr(module, "START_SECONDS", 7)
    with pytest.raises(InputRefused, match=r"chat template: rendering the chat template failed: .*8 s"):
        chat(package=str(int4_package), source=str(source), seconds=1.0)
