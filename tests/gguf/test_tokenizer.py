"""What a tokenizer is taken for, the keys that follow, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.gguf.pre_tokenizers import PRE_TOKENIZERS, canonical, splits
from edgepack.gguf.special_tokens import MAX_TEMPLATE_BYTES, Affixes, post_processor
from edgepack.gguf.spm import scores_of
from edgepack.gguf.spm_file import parse
from edgepack.gguf.tokenizer import pre_tokenizer, vocabulary

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = BYTE_LEVEL | {"use_regex": False}


def isolated(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*nodes: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(nodes)}


def byte_level(pre: Any = BYTE_LEVEL, *, added: tuple[str, ...] = ("<|end|>",), **model: Any) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE tokenizer with 256 tokens, two merges and `added` special ones."""
    vocab = {**BYTES, "he": 256, "hel": 257}
    entries = [{"id": 258 + i, "content": token, "special": True} for i, token in enumerate(added)]
    model = {"type": "BPE", "vocab": vocab, "merges": ["h e", "he l"], "ignore_merges": False} | model
    return {"added_tokens": entries, "normalizer": None, "pre_tokenizer": pre, "post_processor": None, "model": model}


def keys(folder: Path, tokenizer: Any, *, rows: int = 300, config: dict[str, Any] | None = None, **files: Any) -> dict:
    """Plain values of `tokenizer.*` for a folder with this tokenizer.json and these further JSON files."""
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, "utf-8")
    found = vocabulary(Checkpoint(folder, {"model_type": "llama"} | (config or {}), {}), rows=rows)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in found.items()}


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), "smollm"),
        (sequence(sequence({"type": "Digits", "individual_digits": True}), BYTE_LEVEL), "smollm"),
        (sequence(isolated(QWEN2), PLAIN), "qwen2"),
        (sequence(isolated(LLAMA3) | {"behavior": "Removed", "invert": True}, PLAIN), "smaug-bpe"),
        (sequence(isolated(LLAMA3.replace(r"\r\n", "\r\n")), PLAIN), "smaug-bpe"),
    ],
)
def test_the_name_follows_from_the_structure(node: dict[str, Any], name: str) -> None:
    assert pre_tokenizer(byte_level(node)) == name


def test_ignore_merges_chooses_among_names_of_one_structure() -> None:
    node = sequence(isolated(LLAMA3), PLAIN)
    assert pre_tokenizer(byte_level(node, ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer(byte_level(node, ignore_merges=False)) == "smaug-bpe"


def test_ignore_merges_that_no_name_has_is_refused_only_where_it_matters() -> None:
    node = sequence(isolated(QWEN2), PLAIN)
    assert pre_tokenizer(byte_level(node, ignore_merges=True)) == "qwen2"
    unreachable = {**BYTES, "he": 256, "hel": 257, "xyz": 258}
    with pytest.raises(InputRefused, match=r"ignore_merges is True, llama.cpp's qwen2 .*1 tokens .*'xyz'"):
        pre_tokenizer(byte_level(node, ignore_merges=True, vocab=unreachable))


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (sequence(isolated(r"\w+|\W+"), PLAIN), r"\\w\+"),
        (sequence(isolated(QWEN2), isolated(QWEN2), PLAIN), "has no name in llama.cpp"),
        (sequence({"type": "Whitespace"}, PLAIN), "Whitespace node"),
        (sequence(isolated(QWEN2) | {"behavior": "MergedWithNext"}, PLAIN), "Split node"),
        (BYTE_LEVEL | {"add_prefix_space": True}, "add_prefix_space"),
    ],
)
def test_an_unknown_structure_is_printed_with_what_is_known(node: dict[str, Any], why: str) -> None:
    with pytest.raises(InputRefused, match=why) as caught:
        pre_tokenizer(byte_level(node))
    assert '"type"' in caught.value.message
    assert "qwen2" in str(caught.value.hint)
    assert "GGUF" in str(caught.value.hint)
    assert "\n" not in caught.value.message


def test_every_row_of_the_table_is_in_its_canonical_spelling_and_distinct() -> None:
    for entry in PRE_TOKENIZERS:
        assert tuple(canonical(split) for split in entry.splits) == entry.splits, entry.name
        assert bool(entry.engine) == bool(entry.difference)
    assert len({(entry.splits, entry.ignore_merges) for entry in PRE_TOKENIZERS}) == len(PRE_TOKENIZERS)


def words(regex: str, text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Split(Regex(regex), "isolated").pre_tokenize_str(text)]


# Spellings that are in use: tiktoken's, Bailing's, GPT-2's own, with and without the last alternative.
SPELLINGS = (
    QWEN2,
    LLAMA3,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
)
TRICKY = st.lists(
    st.sampled_from([*"aZé中1½ \n\r\t.,'-_\u00a0\u0301", "'s", "'LL", "'Re", "\r\n", "  ", " '", "x'd"]), max_size=20
).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=TRICKY)
def test_the_canonical_spelling_splits_as_the_original(text: str) -> None:
    for spelling in SPELLINGS:
        assert words(canonical(spelling), text) == words(spelling, text)


def test_tiktoken_spellings_are_recognised() -> None:
    names = [pre_tokenizer(byte_level(sequence(isolated(spelling), PLAIN))) for spelling in SPELLINGS]
    assert names == ["qwen2", "smaug-bpe", "smaug-bpe", "qwen2", "gpt-2", "gpt-2"]


def test_splits_of_a_node_are_what_the_library_does() -> None:
    node = sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = "In 2026, x1's ½ price\n\n  ok"
    found = [text]
    for split in splits(byte_level(node)):
        found = [word for part in found for word in words(split, part)]
    expected = [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == expected


# --- keys -----------------------------------------------------------------------------------------------------------


def test_free_rows_are_padded_and_never_collide(tmp_path: Path) -> None:
    tokenizer = byte_level(added=("<|end|>", "[PAD262]"))
    found = keys(tmp_path, tokenizer, rows=264)
    assert found["tokens"][258:] == ("<|end|>", "[PAD262]", "[PAD260]", "[PAD261]", "[[PAD262]]", "[PAD263]")
    assert found["token_type"][256:] == (1, 1, 3, 3, 5, 5, 5, 5)
    assert len(set(found["tokens"])) == 264


def test_an_id_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"token '<\|end\|>' has id 258, and the embedding has 258 rows"):
        keys(tmp_path, byte_level(), rows=258)


def test_a_monstrous_id_is_refused_without_allocating(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer["added_tokens"][0]["id"] = 10**15
    with pytest.raises(InputRefused, match="has id 1000000000000000"):
        keys(tmp_path, tokenizer)


def test_token_types_follow_llama_cpp(tmp_path: Path) -> None:
    tokenizer = byte_level(added=("<|end|>", "<tool>", "<|looks_special|>", "<unused7>"))
    for entry in tokenizer["added_tokens"][1:]:
        entry["special"] = False
    assert keys(tmp_path, tokenizer)["token_type"][257:262] == (1, 3, 4, 3, 3)


def test_the_turn_end_goes_to_eot_and_further_ends_to_eom(tmp_path: Path) -> None:
    tokenizer = byte_level(added=("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    generation = {"eos_token_id": [259, 260, 261]}
    found = keys(tmp_path, tokenizer, tokenizer_config__json=config, generation_config__json=generation)
    assert [found[f"{role}_token_id"] for role in ("bos", "eos", "eot", "eom")] == [258, 259, 261, 260]


def test_a_turn_end_that_only_the_template_names_is_found(tmp_path: Path) -> None:
    tokenizer = byte_level(added=("<|endoftext|>", "<|im_end|>"))
    config = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}<|im_end|>"}
    found = keys(tmp_path, tokenizer, tokenizer_config__json=config)
    assert (found["eos_token_id"], found["eot_token_id"]) == (258, 259)


def test_ids_come_from_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    config = {"bos_token_id": 7, "eos_token_id": [258, 3], "pad_token_id": -1}
    found = keys(tmp_path, byte_level(), config=config)
    assert (found["bos_token_id"], found["eos_token_id"]) == (7, 258)
    assert "padding_token_id" not in found


def test_without_any_bos_llama_cpps_default_is_not_left_standing(tmp_path: Path) -> None:
    found = keys(tmp_path, byte_level(), tokenizer_config__json={"eos_token": "<|end|>"})
    assert found["bos_token_id"] == 258  # llama.cpp would take id 11
    assert found["add_bos_token"] is False


def test_fill_in_the_middle_tokens_are_named(tmp_path: Path) -> None:
    added = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
    found = keys(tmp_path, byte_level(added=added))
    assert [found[f"fim_{part}_token_id"] for part in ("pre", "mid", "suf", "pad")] == [259, 260, 261, 262]


def test_the_added_token_is_bos_whatever_the_folder_calls_it(tmp_path: Path) -> None:
    tokenizer = byte_level(added=("[CLS]", "[SEP]", "<|end|>"))
    tokenizer["post_processor"] = {"type": "RobertaProcessing", "sep": ["[SEP]", 259], "cls": ["[CLS]", 258]}
    found = keys(tmp_path, tokenizer, tokenizer_config__json={"eos_token": "<|end|>"})
    assert (found["bos_token_id"], found["eos_token_id"], found["eot_token_id"]) == (258, 259, 260)
    assert found["add_bos_token"] is found["add_eos_token"] is True


def test_a_post_processor_that_adds_two_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(added=("<a>", "<b>"))
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<a>", "<b>")]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*single, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<a>": {"ids": [258]}, "<b>": {"ids": [259]}},
    }
    with pytest.raises(InputRefused, match=r"adds tokens \[258, 259\] before a text"):
        keys(tmp_path, tokenizer)


def test_post_processors_in_sequence_nest() -> None:
    inner = {"type": "BertProcessing", "sep": ["s", 2], "cls": ["c", 1]}
    nested = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, inner]}
    assert post_processor(nested) == Affixes((1,), (2,))
    with pytest.raises(InputRefused, match="'Other' not understood"):
        post_processor({"type": "Other"})


def test_the_template_file_wins_over_the_config(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "default", "template": "old"}, {"name": "rag", "template": "other"}]}
    found = keys(tmp_path, byte_level(), tokenizer_config__json=config, chat_template__jinja="new")
    assert found["tokenizer.chat_template"] == "new"
    assert found["tokenizer.chat_template.rag"] == "other"


@pytest.mark.parametrize("place", ["config", "file"])
def test_a_template_of_more_than_64_kib_is_refused(place: str, tmp_path: Path) -> None:
    text = "x" * (MAX_TEMPLATE_BYTES + 1)
    files: dict[str, Any] = {"tokenizer_config__json": {"chat_template": text}}
    with pytest.raises(InputRefused, match=r"65,?536"):
        keys(tmp_path, byte_level(), **(files if place == "config" else {"chat_template__jinja": text}))


# --- refused --------------------------------------------------------------------------------------------------------


def broken(**changes: Any) -> dict[str, Any]:
    tokenizer = byte_level()
    for path, value in changes.items():
        *parents, last = path.split("__")
        node: Any = tokenizer
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        node[last] = value
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (broken(model=None), "model is missing"),
        (broken(model__vocab=None), "model.vocab is missing"),
        (broken(model__vocab={"a": "x"}), "expected a non-negative integer"),
        (broken(model__vocab={"a": -1}), "expected a non-negative integer"),
        (broken(model__vocab={"a": 0, "b": 0}), "share id 0"),
        (broken(model__merges=["abc"]), r"merges\[0\] is 'abc'"),
        (broken(model__merges=[["a", "b", "c"]]), "expected two tokens"),
        (broken(model__merges=7), "malformed"),
        (broken(model__dropout=0.1), "model.dropout is 0.1"),
        (broken(model__end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (broken(model__type="WordLevel"), "'WordLevel' not understood"),
        (broken(normalizer={"type": "Lowercase"}), "normalizer 'Lowercase'"),
        (broken(normalizer={"type": "NFKC"}), "normalizer 'NFKC'"),
        (broken(added_tokens=[{"id": 5}]), "malformed"),
        (broken(added_tokens="x"), "malformed"),
        (broken(post_processor={"type": "TemplateProcessing"}), "malformed post_processor"),
        (broken(pre_tokenizer=None), "byte_fallback"),
        (broken(pre_tokenizer=7), "byte_fallback"),
    ],
)
def test_a_malformed_or_foreign_tokenizer_is_refused_in_one_line(tokenizer: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=words) as caught:
        keys(tmp_path, tokenizer)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt", "spiece.model", "tekken.json"])
def test_other_tokenizer_files_get_the_advice_to_save_tokenizer_json(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputRefused, match=f"{name} but no tokenizer.json") as caught:
        keys(tmp_path, None)
    assert "save_pretrained" in str(caught.value.hint)


def test_no_tokenizer_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no tokenizer"):
        keys(tmp_path, None)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_sentencepiece_model_or_refused(data: bytes) -> None:
    try:
        assert parse(data, "x").pieces
    except InputRefused as error:
        assert "x: " in error.message


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_stand_for_merges_only_where_every_join_is_a_merge() -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    normal = ["a", "b", "c", "ab", "bc", "abc"]
    assert scores_of(merges, normal) == {"ab": 0.0, "bc": -1.0, "abc": -2.0}
    assert scores_of(merges[:3], normal) is None  # a + bc joins in llama.cpp
    assert scores_of([merges[2], merges[0], merges[1], merges[3]], normal) is None  # abc at two places
    assert scores_of(merges, [*normal, "abcx"]) is None  # abc + x joins, though x is no token


def test_prefix_space_and_merges_without_scores_are_refused(tmp_path: Path) -> None:
    vocab = {
        "<unk>": 0,
        **{f"<0x{i:02X}>": i + 1 for i in range(256)},
        "a": 257,
        "b": 258,
        "ab": 259,
        "▁": 260,
        "aa": 261,
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"], "byte_fallback": True, "unk_token": "<unk>"},
    }
    with pytest.raises(InputRefused, match=r"llama\.cpp can do one or the other"):
        keys(tmp_path, tokenizer)
    tokenizer["normalizer"] = spaces
    assert keys(tmp_path, tokenizer)["pre"] == "sarvam-moe"
    del vocab["<0x7F>"]
    with pytest.raises(InputRefused, match="1 byte tokens are missing"):
        keys(tmp_path, tokenizer)
