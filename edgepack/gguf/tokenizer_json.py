"""Reading tokenizer.json, whatever kind of tokenizer it holds: tokens, types of added tokens, merges, node lists.

Source: Hugging Face `tokenizers` (`src/tokenizer/serialization.rs`, `src/models/mod.rs`), llama.cpp
`conversion/base.py` (get_vocab_base: token types, does_token_look_special).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepack.errors import InputRefused
from edgepack.gguf.vocab import TokenType


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token text -> id of a tokenizer.json, added tokens included.

    Raises:
        InputRefused: The vocabulary is not a table of text and non-negative integers.
    """
    vocab = model_of(tokenizer).get("vocab")
    if isinstance(vocab, list):  # unigram: [text, log probability] by id
        pairs = {str(entry[0]): index for index, entry in enumerate(vocab)}
    elif isinstance(vocab, dict):
        pairs = dict(vocab)
    else:
        raise InputRefused("tokenizer.json: model.vocab is missing; expected a table of tokens")
    for entry in tokenizer.get("added_tokens") or []:
        pairs[entry["content"]] = entry["id"]
    for token, number in pairs.items():
        if type(number) is not int or number < 0:
            raise InputRefused(f"tokenizer.json: token {token!r} has id {number!r}; expected a non-negative integer")
    return pairs


def model_of(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` node.

    Raises:
        InputRefused: There is none.
    """
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise InputRefused("tokenizer.json: model is missing; expected an object")
    return model


def older_type(model: Mapping[str, Any]) -> str | None:
    """The type of a `model` node that does not name it."""
    # tokenizers before 0.10 wrote no type: told from the fields, as tokenizers src/models/mod.rs does.
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "max_input_chars_per_word" in model else None


def tokens_by_id(ids: Mapping[str, int], rows: int) -> list[str]:
    """Tokens in id order, empty text for ids that have none.

    Raises:
        InputRefused: An id is beyond the embedding, or two tokens share one.
    """
    token, last = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise InputRefused(
            f"tokenizer.json: token {token!r} has id {last}, and the embedding has {rows} rows",
            hint="Tokenizer and weights are not of one model, or tokens were added without resize_token_embeddings.",
        )
    tokens = [""] * (last + 1)
    for text, number in ids.items():
        if tokens[number]:
            raise InputRefused(f"tokenizer.json: tokens {tokens[number]!r} and {text!r} share id {number}")
        tokens[number] = text
    return tokens


def looks_special(token: str) -> bool:
    """Whether a token is meant for control though its folder calls it ordinary (llama.cpp's converter's rule)."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def added_types(tokenizer: Mapping[str, Any], count: int) -> list[int]:
    """Token types by id: CONTROL or USER_DEFINED for added tokens, NORMAL for all others."""
    types = [int(TokenType.NORMAL)] * count
    for entry in tokenizer.get("added_tokens") or []:
        special = entry.get("special") or looks_special(entry["content"])
        types[entry["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    return types


def merge_pairs(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first; both formats, `"a b"` and `["a", "b"]`.

    Raises:
        InputRefused: An entry is neither.
    """
    pairs = []
    for rank, entry in enumerate(model_of(tokenizer).get("merges") or []):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise InputRefused(f"tokenizer.json: model.merges[{rank}] is {entry!r}; expected two tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def check_bpe(tokenizer: Mapping[str, Any]) -> None:
    """Refuse the options of a BPE model that llama.cpp has no counterpart of."""
    model = model_of(tokenizer)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputRefused(f"tokenizer.json: model.{option} is {model[option]!r}; llama.cpp has no such option")


def normalizers(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The normalizer of tokenizer.json as a flat list."""
    return _flat(tokenizer.get("normalizer"), "normalizers")


def pre_tokenizers(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pre_tokenizer of tokenizer.json as a flat list."""
    return _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")


def _flat(node: Any, parts: str) -> list[dict[str, Any]]:
    if not isinstance(node, dict):
        return []
    if node.get("type") == "Sequence":
        return [inner for part in node.get(parts) or [] for inner in _flat(part, parts)]
    return [node]
