"""From the tokenizer of a Hugging Face folder to the `tokenizer.*` keys of a GGUF file.

Works from tokenizer.json (or tokenizer.model where there is none), by structure, so a vocabulary that nobody has seen
before converts like a published one. What the structure is taken for is proved afterwards by
`edgepack/conform/tokens.py`; this module only decides.

Sources: llama.cpp `src/llama-vocab.cpp`, `conversion/base.py` (get_vocab_base), Hugging Face `tokenizers` (the format
of tokenizer.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.gguf.file import Metadata, boolean, u32
from edgepack.gguf.pre_tokenizers import PreTokenizer, recognise
from edgepack.gguf.special_tokens import affixes, chat_template_keys, chat_templates, special_tokens
from edgepack.gguf.spm import from_bpe, from_unigram
from edgepack.gguf.spm_file import from_model_file
from edgepack.gguf.tokenizer_json import (
    added_types,
    check_bpe,
    merge_pairs,
    model_of,
    normalizers,
    older_type,
    pre_tokenizers,
    token_ids,
    tokens_by_id,
)
from edgepack.gguf.vocab import TokenType, Vocab, metadata, padded

_SAVE_HINT = (
    "Save it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR); then build again, or give"
    " a GGUF of the model."
)


def vocabulary(checkpoint: Checkpoint, *, rows: int) -> Metadata:
    """All `tokenizer.*` keys of a model, chat template included.

    Args:
        checkpoint: The model folder.
        rows: Rows of its embedding matrix; ids without a token become `[PAD<id>]`, type UNUSED.

    Returns:
        Keys in file order.

    Raises:
        InputRefused: No tokenizer, one that is not understood, or a token id beyond the embedding.
    """
    tokenizer = checkpoint.json("tokenizer.json")
    if tokenizer is None:
        vocab = _without_tokenizer_json(checkpoint, rows)
        ids = {token: index for index, token in enumerate(vocab.tokens) if token}
    else:
        ids, vocab = _from_tokenizer_json(checkpoint, tokenizer, rows)
    around = affixes(checkpoint, tokenizer, vocab.roles)
    keys = metadata(padded(vocab, rows)) | special_tokens(checkpoint, ids, around, rows=rows, vocab=vocab)
    keys["tokenizer.ggml.add_space_prefix"] = boolean(vocab.prefix_space)
    segments = checkpoint.config.get("type_vocab_size")
    if type(segments) is int and segments > 0:
        keys["tokenizer.ggml.token_type_count"] = u32(segments)
    return keys | chat_template_keys(checkpoint)


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level BPE tokenizer.json splits text into words.

    Args:
        tokenizer: Parsed tokenizer.json.

    Raises:
        InputRefused: No name fits; the message prints the structure.
    """
    return _choose(recognise(tokenizer), tokenizer).name


def _from_tokenizer_json(
    checkpoint: Checkpoint, tokenizer: Mapping[str, Any], rows: int
) -> tuple[dict[str, int], Vocab]:
    chats = bool(chat_templates(checkpoint))
    try:
        ids = token_ids(tokenizer)
        vocab = _vocab(tokenizer, tokens_by_id(ids, rows), chats=chats)
        unknown = ids.get(model_of(tokenizer).get("unk_token") or "", model_of(tokenizer).get("unk_id"))
        return ids, vocab if unknown is None else replace(vocab, roles={"unk": int(unknown)})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        # A field that is missing or of another type: `tokenizers` refuses such a file too.
        raise InputRefused(
            f"{checkpoint.path / 'tokenizer.json'}: malformed ({type(error).__name__}: {error})", hint=_SAVE_HINT
        ) from error


def _vocab(tokenizer: Mapping[str, Any], tokens: list[str], *, chats: bool) -> Vocab:
    kind = model_of(tokenizer).get("type") or older_type(model_of(tokenizer))
    if kind == "BPE" and any(node.get("type") == "ByteLevel" for node in pre_tokenizers(tokenizer)):
        return _byte_level(tokenizer, tokens)
    if kind == "BPE":
        return from_bpe(tokenizer, tokens, chats=chats)
    if kind == "Unigram":
        return from_unigram(tokenizer, tokens)
    if kind == "WordPiece":
        return _word_piece(tokenizer, tokens)
    raise InputRefused(
        f"tokenizer.json: model type {kind!r} not understood; expected BPE, Unigram or WordPiece",
        hint="If llama.cpp's converter knows this model, give its F16 GGUF instead.",
    )


def _without_tokenizer_json(checkpoint: Checkpoint, rows: int) -> Vocab:
    if (checkpoint.path / "tokenizer.model").is_file():
        return from_model_file(checkpoint, "tokenizer.model", rows)
    # The last two number their pieces otherwise than the model does (fairseq's order); transformers knows how.
    for name in ("vocab.json", "vocab.txt", "tekken.json", "spiece.model", "sentencepiece.bpe.model"):
        if (checkpoint.path / name).is_file():
            raise InputRefused(f"{checkpoint.path}: {name} but no tokenizer.json", hint=_SAVE_HINT)
    raise InputRefused(
        f"{checkpoint.path}: no tokenizer (looked for tokenizer.json, tokenizer.model)",
        hint="Copy the tokenizer files of the base model into the folder.",
    )


def _byte_level(tokenizer: Mapping[str, Any], tokens: list[str]) -> Vocab:
    check_bpe(tokenizer)
    for node in normalizers(tokenizer):
        # llama.cpp applies no normaliser. NFC changes only text that is not composed: the proof names the difference.
        if node.get("type") != "NFC":
            raise InputRefused(f"tokenizer.json: normalizer {node.get('type')!r}; llama.cpp applies none to this kind")
    merges = tuple(f"{left} {right}" for left, right in merge_pairs(tokenizer))
    types = added_types(tokenizer, len(tokens))
    return Vocab("gpt2", pre_tokenizer(tokenizer), tuple(tokens), tuple(types), merges=merges)


def _choose(entries: tuple[PreTokenizer, ...], tokenizer: Mapping[str, Any]) -> PreTokenizer:
    """The first entry whose `ignore_merges` is the tokenizer's, or the first at all where the flag changes no id."""
    wanted = bool(model_of(tokenizer).get("ignore_merges"))
    if entries[0].ignore_merges == wanted:
        return entries[0]
    apart = _unreachable(tokenizer)
    for entry in entries:
        if entry.ignore_merges == wanted or not apart:
            return entry
    raise InputRefused(
        f"tokenizer.json: ignore_merges is {wanted}, llama.cpp's {entries[0].name} has it {not wanted}, and"
        f" {len(apart)} tokens depend on it (first: {apart[0]!r})",
        hint="If llama.cpp's converter knows this model, give its F16 GGUF instead.",
    )


def _unreachable(tokenizer: Mapping[str, Any]) -> list[str]:
    """Tokens that merging does not produce from their own text: only for them does `ignore_merges` matter."""
    from tokenizers import models

    vocab = dict(model_of(tokenizer)["vocab"])
    added = {entry["content"] for entry in tokenizer.get("added_tokens") or []}
    plain = models.BPE(vocab=vocab, merges=merge_pairs(tokenizer))
    return [token for token in vocab if token not in added and len(plain.tokenize(token)) != 1]


def _word_piece(tokenizer: Mapping[str, Any], tokens: list[str]) -> Vocab:
    """BERT: continuation pieces lose `##`, all others get `▁` (llama.cpp conversion/bert.py)."""
    model = model_of(tokenizer)
    prefix = model.get("continuing_subword_prefix", "##")
    nodes = normalizers(tokenizer)
    if len(nodes) != 1 or nodes[0].get("type") != "BertNormalizer" or prefix != "##":
        raise InputRefused(
            f"tokenizer.json: WordPiece with normalizer {tokenizer.get('normalizer')!r:.300} and prefix {prefix!r};"
            " llama.cpp knows BertNormalizer and '##' only"
        )
    lowercase = bool(nodes[0].get("lowercase", True))
    accents = nodes[0].get("strip_accents")
    types = added_types(tokenizer, len(tokens))

    def spelled(token: str, kind: int) -> str:
        if not token or kind == TokenType.CONTROL:
            return token
        return token[2:] if token.startswith("##") else "▁" + token

    return Vocab(
        "bert",
        "default",
        tuple(spelled(token, kind) for token, kind in zip(tokens, types, strict=True)),
        tuple(types),
        extra={
            "tokenizer.ggml.normalizer.lowercase": boolean(lowercase),
            "tokenizer.ggml.normalizer.strip_accents": boolean(lowercase if accents is None else bool(accents)),
        },
    )
