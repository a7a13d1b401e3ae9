"""Calibration text from files, folders and JSON lines; windows against llama.cpp's own tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from artifacts import exported

from edgepack.calibrate import texts
from edgepack.calibrate.texts import CalibrationText, calibration_text, calibration_windows, resolve
from edgepack.errors import EdgepackError, InputRefused, UsageError
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import default_calibration_text, read_text

WORDS = "The quick brown fox jumps over the lazy dog. "
CHAT = [{"role": "user", "content": "Hello, Zürich?"}, {"role": "assistant", "content": "Yes."}]


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return path


def refusal(kind: type[EdgepackError], spec: str | Path, source: Path = Path("none")) -> EdgepackError:
    with pytest.raises(kind) as caught:
        calibration_text(str(spec), source)
    assert "\n" not in caught.value.message
    return caught.value


def test_without_a_name_it_is_the_text_that_ships(example: Path) -> None:
    found = calibration_text(None, example)
    assert found.sha256 == hashlib.sha256(default_calibration_text().read_bytes()).hexdigest()
    assert (found.origin, found.datasets, found.special) == ("calibration.txt of edgepack", ("calibration.txt",), False)


def test_a_plain_file_is_taken_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "my words.rst"
    path.write_bytes("a\r\n\ufeffé <|im_end|> \n\n\n\n b".encode())
    found = calibration_text(str(path), tmp_path)
    assert found.text.encode() == path.read_bytes()
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.origin, found.special) == ("my words.rst", False)


def test_lines_of_text_become_documents_with_two_blank_lines_between(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "One é.", "url": "x"}, {"text": "Two\n"})
    path.write_text("\ufeff" + path.read_text("utf-8") + "\n  \n", "utf-8")
    assert calibration_text(str(path), tmp_path).text == "One é.\n\n\nTwo\n"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("c.txt", "a.md", "b/z.txt", "b/a.TXT", ".git/x.txt", "b/.hidden.txt", "b/image.png"):
        (folder / name).write_text(f"text of {name}")
    lines(folder / "b.jsonl", {"text": "line one"}, {"text": "line two"})
    found = calibration_text(str(folder), tmp_path)
    expected = ["text of a.md", "line one", "line two", "text of b/a.TXT", "text of b/z.txt", "text of c.txt"]
    assert found.text.split("\n\n\n") == expected
    assert found.origin == "texts/ (5 files)"
    assert found.datasets == ("a.md", "b.jsonl", "b/a.TXT", "b/z.txt", "c.txt")
    assert calibration_text(f"{folder}/", tmp_path) == found


def test_chats_are_rendered_by_the_models_own_template(tmp_path: Path, example: Path) -> None:
    second = [{"role": "system", "content": "Be terse."}, *CHAT, {"role": "user", "content": "Bye"}]
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": "plain"}, {"messages": CHAT}, {"messages": second})
    found = calibration_text(str(path), example)
    one = "<|im_start|>user\nHello, Zürich?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    two = f"<|im_start|>system\nBe terse.<|im_end|>\n{one}<|im_start|>user\nBye<|im_end|>\n"
    assert found.text == f"{one}\n\n\nplain\n\n\n{one}{two}"
    assert found.special


def test_special_tokens_count_as_such_in_chats_and_as_letters_in_plain_text(example: Path) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n" * 300
    end = json.loads((example / "tokenizer.json").read_text("utf-8"))["added_tokens"][2]
    assert end["content"] == "<|im_end|>"
    chats = calibration_windows(example, CalibrationText(text, "", "x", special=True), 64)
    plain = calibration_windows(example, CalibrationText(text, "", "x"), 64)
    assert any(end["id"] in ids for ids in chats)
    assert not any(end["id"] in ids for ids in plain)


@pytest.fixture(scope="module")
def with_bos(example: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The example model with a BOS before every text, and its GGUF."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(example, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    around = [{"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": {bos["id"]: bos}}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [tokenizer["post_processor"], template]}
    path.write_text(json.dumps(tokenizer), "utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"bos_token": bos["id"], "add_bos_token": True}), "utf-8")
    return folder, exported(folder, "F16", folder.parent)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_those_llama_imatrix_cuts(
    bos: bool, special: bool, example: Path, with_bos: tuple[Path, Path], tmp_path: Path
) -> None:
    source, artifact = with_bos if bos else (example, exported(example, "F16", tmp_path))
    text = CalibrationText(
        read_text(default_calibration_text())[:60_000] + "<|im_end|> x" * 50, "", "x", special=special
    )
    with Model(str(artifact), threads=1, vocab_only=True) as engine:
        assert engine.add_bos == bos
        ids = engine.tokenize(text.text, add_special=True, parse_special=special)
        first = engine.bos
    expected = [ids[i * 128 : (i + 1) * 128] for i in range(len(ids) // 128)]  # compute_imatrix of imatrix.cpp
    if bos:
        expected = [[first, *window[1:]] for window in expected]
    assert len(expected) > 50
    assert calibration_windows(source, text, 128) == expected
    assert calibration_windows(source, text, 128, 7) == expected[:7]
    assert calibration_windows(artifact, text, 128) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
def test_a_limit_gives_the_first_windows_of_the_whole(limit: int, example: Path) -> None:
    text = calibration_text(None, example)
    short = CalibrationText(text.text[:100_000], "", "x")
    assert calibration_windows(example, short, 100, limit) == calibration_windows(example, short, 100)[:limit]


def test_a_limit_tokenizes_only_as_much_as_it_needs() -> None:
    asked: list[int] = []

    def encode(part: str) -> list[int]:
        asked.append(len(part))
        return list(range(len(part) // 20))  # long tokens: the first guess is too short

    text = "x" * 99 + "\n"
    assert len(texts._beginning(text * 100_000, encode, 1000)) >= 1000
    assert asked == sorted(asked) and asked[-1] < 50_000
    assert texts._beginning(text * 2, encode, 1000) == list(range(10))


def test_too_few_tokens_are_refused_with_both_numbers(tmp_path: Path, example: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(WORDS * 5)
    text = calibration_text(str(path), example)
    with pytest.raises(InputRefused, match=r"short\.txt has \d+ tokens, expected at least 1024") as caught:
        calibration_windows(example, text)
    assert caught.value.hint is not None and "--calibration" in caught.value.hint
    with pytest.raises(InputRefused, match="expected at least 1024"):
        calibration_windows(example, text, limit=1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.jsonl", b" \n\n", "empty"),
        ("a.txt", "naïve".encode("latin-1"), "byte 0xef at offset 2 is not UTF-8"),
        ("a.txt", "naïve".encode("utf-16"), "NUL byte|not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', 'line 2: expected "text"'),
        ("a.jsonl", b'{"content": "a"}\n', "line 1: expected \"text\" .* found 'content'"),
        ("a.jsonl", b'["a"]\n', "line 1: expected a JSON object, found array"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "duplicate|twice"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', "line 1: the text holds a NUL"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "half a surrogate pair at character 1"),
        ("a.jsonl", b'{"messages": []}\n', "expected an array of messages"),
        ("a.jsonl", b'{"messages": "hello"}\n', '"messages" is string'),
        ("a.jsonl", b'{"messages": [{"content": "hello"}]}\n', r'messages\[0\] has no "role"'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r'messages\[0\]: "content" is null'),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', '"content" is array'),
        ("a.parquet", b"PAR1", r"a \.parquet file is not read as text"),
        ("a.json", b'[{"text": "a"}]', r"a \.json file is not read as text"),
    ],
)
def test_what_is_no_calibration_text_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refusal(InputRefused, path)
    assert re.search(reason, error.message), error.message
    assert str(path) in error.message
    assert error.exit_code == 5


def test_a_name_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(WORDS)
    assert f"Did you mean {tmp_path / 'words.txt'}?" == refusal(UsageError, tmp_path / "word.txt").hint
    assert "hub:acme/chats" in str(refusal(UsageError, "acme/chats").hint)
    assert "hub:acme/chats" in str(refusal(UsageError, "https://huggingface.co/datasets/acme/chats").hint)
    assert "hub:org/dataset" in str(refusal(UsageError, "/no/such/place").hint)
    for spec in ("hub:", "hub:acme", "hub:acme/a--b", "hub:../../etc"):
        assert "hub:org/dataset" in str(refusal(UsageError, spec).hint)
    assert "is no text file" in refusal(UsageError, "hub:acme/chats:../train.txt").message
    assert "is no text file" in refusal(UsageError, "hub:acme/chats:train.parquet").message


def test_a_folder_without_text_and_links_out_of_it_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "image.png").write_bytes(b"png")
    assert "no .txt, .md or .jsonl file" in refusal(InputRefused, folder).message
    (tmp_path / "secret").write_text("secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret")
    assert "a link that leaves the folder" in refusal(InputRefused, folder).message


def test_more_than_a_quarter_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(texts.MAX_BYTES // 2 + 1)
    assert "bytes of calibration text, expected at most 268,435,456" in refusal(InputRefused, tmp_path).message
    assert resolve(str(tmp_path / "a.txt")).origin == "a.txt"


def test_chats_without_a_template_are_refused(tmp_path: Path, copied_model: Path) -> None:
    (copied_model / "chat_template.jinja").unlink()
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT})
    error = refusal(InputRefused, path, copied_model)
    assert "no chat template" in error.message
    assert '{"text": ...}' in str(error.hint)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert "the model is a GGUF file" in refusal(InputRefused, path, gguf).message


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ raise_exception('no system') }}",
            r"a\.jsonl: line 1: the model's chat template can't render it: .*no system",
        ),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "did not finish within"),
        ("{{ 'x' * (1 << 33) }}", "did not finish within .* memory|can't render it"),
    ],
)
def test_a_hostile_template_ends_in_one_line(
    template: str, reason: str, tmp_path: Path, copied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepack.calibrate import chats

    (copied_model / "chat_template.jinja").write_text(template)
    asked, made = lines(tmp_path / "asked.jsonl", ["a.jsonl: line 1", CHAT]), tmp_path / "made.jsonl"
    monkeypatch.setattr("edgepack.conform.chat.RENDER_SECONDS", 1.0)
    with pytest.raises(InputRefused) as caught:
        chats.render(folder=str(copied_model), chats=str(asked), texts=str(made))
    assert re.search(reason, caught.value.message), caught.value.message
    assert "\n" not in caught.value.message
