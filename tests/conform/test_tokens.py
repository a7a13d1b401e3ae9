"""Token ids of llama.cpp against Hugging Face tokenizers, for a new vocabulary of every family."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepack import worker
from edgepack.conform.corpus import TEXTS, texts
from edgepack.conform.tokens import describe_engine, open_reference, pieces, tokens
from edgepack.errors import ConformanceError, InputRefused, StepError
from edgepack.gguf.file import read_gguf
from edgepack.runtimes.llama_cpp import Model
from edgepack.worker import no_progress

NFC = "llama.cpp does not bring text to Unicode normal form NFC, the tokenizer does"
# Families for which the GGUF can't say all that tokenizer.json says, and what has to be reported then.
REPORTED = {
    "olmo": {"NFC"},
    "command-r": {"NFC"},
    "qwen2": {"NFC"},
    "qwen3.5": {"NFC"},
    "tekken": {"ASCII only and takes combining marks"},
    "mistral": {"puts a space before every text"},
    "llama2-metaspace": {"puts a space before every text"},
    "xlm-r": {"charsmap", "white space"},
    "xlm-r-newer": {"charsmap", "white space"},
    "bert-uncased": {"combining marks", "U+0085", "more than 100 characters"},
    "bert-cased": {"U+0085", "more than 100 characters"},
}


def compare(artifact: Path, source: Path) -> dict:
    return tokens(artifact=str(artifact), source=str(source), progress=no_progress)


@pytest.mark.parametrize("name", families.ALL)
def test_a_new_vocabulary_of_every_family_gives_the_ids_of_its_tokenizer(name: str, tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / name, name)
    result = compare(artifact, folder)
    assert result["texts"] > 80
    reasons = {entry["reason"] for entry in result["differences"]}
    unexpected = [reason for reason in reasons if not any(part in reason for part in REPORTED.get(name, ()))]
    assert not unexpected
    assert all(any(part in reason for reason in reasons) for part in REPORTED.get(name, ())), reasons
    if not name.startswith(("bert", "xlm", "mistral", "llama2", "phi-3")):  # those lose spaces on the way
        lost = sum(entry["texts"] for entry in result["differences"]) + (2 if name == "gemma" else 0)  # two hold a ▁
        assert result["round_trips"] == result["texts"] - lost


def test_the_reference_models_of_the_repository_agree(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "examples/models/tiny-llama-5m"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / file).write_bytes((source / file).read_bytes())
    artifact = families.gguf(tmp_path / "m", 2048)
    assert compare(artifact, source)["differences"] == []
    assert read_gguf(artifact).get("tokenizer.ggml.eot_token_id") == 2


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_tokenizer_model_alone_gives_the_ids_of_sentencepiece(name: str, tmp_path: Path) -> None:
    model = families.llama_model() if name == "llama" else families.gemma_model()
    folder = families.write_folder(tmp_path / name, None, {}, tokenizer__model=model)
    result = compare(families.gguf(folder, 1600), folder)
    assert result["reference"] == "tokenizer.model"
    assert result["texts"] == len(TEXTS)
    assert result["differences"] == []


def test_merges_may_be_strings_or_pairs(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(families.family("gpt2")[0])
    pairs = [entry.split(" ") if isinstance(entry, str) else entry for entry in tokenizer["model"]["merges"]]
    found = []
    for name, merges in (("pairs", pairs), ("strings", [" ".join(pair) for pair in pairs])):
        tokenizer["model"]["merges"] = merges
        folder = families.write_folder(tmp_path / name / "m", tokenizer, {"eos_token": "<|endoftext|>"})
        found.append(families.gguf(folder, 1500))
        assert compare(found[-1], folder)["differences"] == []
    assert found[0].read_bytes() == found[1].read_bytes()


def test_gemma_style_merges_that_no_score_can_express_run_as_bpe(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(families.family("gemma")[0])
    model = tokenizer["model"]
    model["merges"] = [pair for number, pair in enumerate(model["merges"]) if number % 17 != 3]
    folder = families.write_folder(tmp_path / "m", tokenizer, families.family("gemma")[1])
    artifact = families.gguf(folder, families.size_of(tokenizer))
    assert read_gguf(artifact).get("tokenizer.ggml.pre") == "sarvam-moe"
    assert compare(artifact, folder)["differences"] == []


def test_a_chat_model_with_a_first_space_gets_none_and_says_so(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "mistral", chat_template="{{ bos_token }}[INST] x [/INST]")
    assert read_gguf(artifact).get("tokenizer.ggml.add_space_prefix") is False
    reasons = [entry["reason"] for entry in compare(artifact, folder)["differences"]]
    assert reasons == ["llama.cpp puts no space before a text that starts without a special token; the tokenizer does"]


def replaced(artifact: Path, **keys: object) -> Path:
    """A copy of a vocabulary-only GGUF with other values."""
    from dataclasses import replace

    from edgepack.gguf.file import encode_header

    metadata = dict(read_gguf(artifact).metadata)
    for key, value in keys.items():
        name = "tokenizer.ggml." + key
        metadata[name] = replace(metadata[name], value=value)
    path = artifact.with_name("changed.gguf")
    path.write_bytes(encode_header(metadata, [])[0])
    return path


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("smollm", {"pre": "gpt-2"}, "token ids differ: text"),
        ("qwen2", {"pre": "gpt-2"}, "token ids differ: text"),
        ("llama3", {"pre": "qwen2"}, "token ids differ: text"),
        ("deepseek-v3", {"pre": "gpt-4o"}, "token ids differ: text"),
        ("gpt-4o", {"pre": "tekken"}, "token ids differ: text"),
        ("gemma", {"add_space_prefix": True}, "token ids differ: text"),
        ("llama2", {"add_space_prefix": False}, "token ids differ: text"),
        ("llama2-metaspace", {"add_space_prefix": False}, "token ids differ: text"),
        ("xlm-r", {"add_space_prefix": False}, "token ids differ: text"),
        ("bert-cased", {"normalizer.lowercase": True}, "token ids differ: text"),
        ("llama3", {"add_bos_token": False}, "special tokens around a text differ"),
        ("qwen2", {"add_eos_token": True}, "special tokens around a text differ"),
        ("xlm-r", {"add_eos_token": False}, "special tokens around a text differ"),
    ],
)
def test_a_wrong_key_stops_the_build(family: str, keys: dict, words: str, tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", family)
    with pytest.raises(ConformanceError, match=words):
        compare(replaced(artifact, **keys), folder)


def test_a_swapped_token_is_shown_with_text_place_and_both_ids(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "gpt2")
    names = list(read_gguf(artifact).get("tokenizer.ggml.tokens"))
    a, b = open_reference(folder).encode(TEXTS[0])[:2]
    names[a], names[b] = names[b], names[a]
    with pytest.raises(ConformanceError) as caught:
        compare(replaced(artifact, tokens=tuple(names)), folder)
    assert "text 'The quick brown fox jumps over the lazy dog.'" in caught.value.message
    assert f"token 0: the source has {a} 'The', the GGUF {b} '\\u0120qu'" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.isascii()


def test_the_worker_reports_the_same(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "llama2")
    arguments = {"artifact": str(artifact), "source": str(folder)}
    seen: list[tuple[int, int]] = []
    result = worker.run(
        "edgepack.conform.tokens:tokens",
        arguments,
        what="comparing token ids",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result == compare(artifact, folder)
    assert seen[-1] == (result["texts"], result["texts"])


def test_a_gguf_made_from_a_gguf_is_compared_with_it(tmp_path: Path) -> None:
    _, artifact = families.build(tmp_path / "m", "qwen2")
    assert compare(artifact, artifact)["differences"] == []
    with pytest.raises(ConformanceError):
        compare(replaced(artifact, pre="gpt-2"), artifact)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    _, artifact = families.build(tmp_path / "m", "gpt2")
    with pytest.raises(InputRefused, match="no tokenizer"):
        compare(artifact, tmp_path)


def test_a_tokenizer_json_the_library_can_not_read_is_refused(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "gpt2")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(InputRefused, match="Hugging Face tokenizers can't read it"):
        compare(artifact, folder)


def test_a_vocabulary_that_llama_cpp_can_not_load_is_one_line(tmp_path: Path) -> None:
    folder, artifact = families.build(tmp_path / "m", "gpt2")
    with pytest.raises(StepError, match="unknown pre-tokenizer"):
        compare(replaced(artifact, pre="no-such-thing"), folder)


def test_special_tokens_are_tried_inside_texts() -> None:
    found = list(texts(["<|im_end|>"]))
    assert "before<|im_end|>after" in found
    assert found[: len(TEXTS)] == list(TEXTS)
    assert len(list(texts(f"<{i}>" for i in range(1000)))) < 400


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """(family, engine, reference, known differences) of families with different machinery."""
    folder = tmp_path_factory.mktemp("pairs")
    opened = []
    for name in ("gpt2", "smollm", "llama3", "qwen2", "qwen3.5", "deepseek-v3", "falcon", "gemma", "llama2", "xlm-r"):
        source, artifact = families.build(folder / name, name)
        engine, reference = Model(artifact, threads=1, vocab_only=True), open_reference(source)
        opened.append((name, engine, reference, list(reference.differences(describe_engine(engine)))))
    yield opened
    for _, engine, _, _ in opened:
        engine.close()


# Letters that llama.cpp and Hugging Face may know from different versions of Unicode are left out: unassigned ones.
LETTERS = st.characters(exclude_categories=("Cs", "Cn", "Co"))
PIECES = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", "345", "é", "中", "ا", "क्ष", "👩‍👩‍👧", ".", "_", "="]
)
ANY_TEXT = st.lists(st.one_of(st.text(LETTERS, max_size=6), PIECES), max_size=12).map("".join)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(text=ANY_TEXT)
def test_any_text_gives_equal_ids_or_a_known_difference(pairs: list, text: str) -> None:
    for name, engine, reference, known in pairs:
        expected = reference.encode(text)
        found = engine.tokenize(text, add_special=False, parse_special=True)
        if found != expected:
            assert any(encode(text) == found for _, encode in known), (name, text, expected, found)
        if name in ("gpt2", "smollm", "llama3", "deepseek-v3", "falcon"):
            assert pieces(engine, found).decode() == text
