"""SentencePiece vocabularies: BPE with byte fallback, and unigram, from tokenizer.json or from tokenizer.model.

llama.cpp's SentencePiece BPE (`llama`) has no merges: it joins the two neighbours whose text is the token of the
highest score, any two whose text is a token. tokenizer.json has merges and no scores. The two agree when every way to
join two tokens into a third is a merge, and the merges of one token stand together; then the rank of a token's merges
is its score. That holds for tokenizers converted from SentencePiece and not for those trained by Hugging Face
`tokenizers`; the latter run in llama.cpp as BPE with merges over raw UTF-8 (`sarvam-moe`), provided they put no space
before the text.

Does not know whether the ids agree: `edgepack/conform/tokens.py` proves it.

Sources: llama.cpp `src/llama-vocab.cpp` (llm_tokenizer_spm_session, llm_tokenizer_ugm_session, tokenize), Hugging Face
`tokenizers` `src/pre_tokenizers/metaspace.rs`, transformers `tokenization_utils_base.py` (generate_merges).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.errors import InputRefused
from edgepack.gguf.file import Metadata, ValueType, array, boolean
from edgepack.gguf.tokenizer_json import added_types, check_bpe, merge_pairs, normalizers, pre_tokenizers
from edgepack.gguf.vocab import TokenType, Vocab

SPACE = "▁"
_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
_NO_SCORE = -1e9  # below every rank: tokens that no merge makes


def from_bpe(tokenizer: Mapping[str, Any], tokens: Sequence[str], *, chats: bool) -> Vocab:
    """BPE with byte fallback: Llama 1 and 2, TinyLlama, Mistral, Phi-3, Gemma.

    Args:
        tokenizer: Parsed tokenizer.json.
        tokens: By id; empty text for free ids.
        chats: The model has a chat template. Where the tokenizer puts a space before a text but not after a special
            token, llama.cpp can do both or neither; chats are made of special tokens, so then it is neither.

    Raises:
        InputRefused: A structure llama.cpp has no counterpart of.
    """
    check_bpe(tokenizer)
    model = tokenizer["model"]
    missing = sorted(set(_BYTES) - set(tokens))
    if not model.get("byte_fallback") or missing:
        raise InputRefused(
            "tokenizer.json: BPE without ByteLevel needs byte_fallback and 256 byte tokens"
            f" (byte_fallback is {model.get('byte_fallback')!r}, {len(missing)} byte tokens are missing)",
            hint="If llama.cpp's converter knows this model, give its F16 GGUF instead.",
        )
    scheme = prefix_scheme(tokenizer)
    prefix = scheme == "always" or (scheme == "first" and not chats)
    merges = merge_pairs(tokenizer)
    made = {left + right for left, right in merges}
    types = _bpe_types(tokenizer, tokens, made)
    texts = _spelled(tokenizer, tokens, types)
    scores = scores_of(merges, [text for text, kind in zip(texts, types, strict=True) if kind == TokenType.NORMAL])
    if scores is not None:
        by_id = tuple(scores.get(text, _NO_SCORE) if text else _NO_SCORE for text in texts)
        return Vocab("llama", "default", tuple(texts), tuple(types), scores=by_id, prefix_space=prefix)
    if prefix:
        raise InputRefused(
            "tokenizer.json: BPE whose merges are not those of SentencePiece (a pair of tokens spells a third and is no"
            f" merge) together with a space before the text ({scheme}): llama.cpp can do one or the other",
            hint="Train the tokenizer with SentencePiece, or as byte-level BPE.",
        )
    joined = tuple(f"{left} {right}" for left, right in merges)
    return Vocab("gpt2", "sarvam-moe", tuple(texts), tuple(types), merges=joined)


def prefix_scheme(tokenizer: Mapping[str, Any]) -> str:
    """When a space is put before text: `always` (after special tokens too), `first` (at the start only) or `never`.

    Raises:
        InputRefused: The normalizer or pre-tokenizer does anything but turn spaces into `▁`.
    """
    scheme, replaced = "never", False
    for node in normalizers(tokenizer):
        kind, pattern = node.get("type"), node.get("pattern") or {}
        if kind == "Prepend" and node.get("prepend") == SPACE:
            scheme = "always"
        elif kind == "Replace" and pattern.get("String") == " " and node.get("content") == SPACE:
            replaced = True
        else:
            raise _unknown("normalizer", tokenizer)
    for node in pre_tokenizers(tokenizer):
        if node.get("type") == "Metaspace" and node.get("replacement", SPACE) == SPACE:
            scheme, replaced = _scheme(node), True
        # Gemma: splits at spaces, of which the normalizer has left none
        elif not (node.get("type") == "Split" and node.get("pattern") == {"String": " "} and replaced):
            raise _unknown("pre_tokenizer", tokenizer)
    if not replaced:
        raise _unknown("normalizer", tokenizer)
    return str(scheme)


def _scheme(metaspace: Mapping[str, Any]) -> str:
    # `add_prefix_space` is the older spelling (tokenizers before 0.15)
    older = "always" if metaspace.get("add_prefix_space", True) else "never"
    return str(metaspace.get("prepend_scheme", older))


def puts_space(metaspace: Mapping[str, Any]) -> bool:
    """Whether a Metaspace node puts a space before text."""
    return _scheme(metaspace) != "never"


def scores_of(merges: Sequence[tuple[str, str]], normal: Sequence[str]) -> dict[str, float] | None:
    """Token -> minus the rank of the first merge that makes it; None when scores can't stand for the merges.

    Args:
        merges: Best first.
        normal: Texts of all ordinary tokens.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    count: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        token = left + right
        first.setdefault(token, rank)
        last[token] = rank
        count[token] = count.get(token, 0) + 1
    if any(last[token] - rank + 1 != count[token] for token, rank in first.items()):
        return None
    known, pairs = set(normal), set(merges)
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            # A single character is a symbol of llama.cpp's even when it is no token.
            joins = (cut == 1 or left in known) and (len(right) == 1 or right in known)
            if joins and (left, right) not in pairs:
                return None
    return {token: -float(rank) for token, rank in first.items()}


def _bpe_types(tokenizer: Mapping[str, Any], tokens: Sequence[str], made: set[str]) -> list[int]:
    types = added_types(tokenizer, len(tokens))
    special = {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}
    for index, token in enumerate(tokens):
        entry = special.get(index)
        if token in _BYTES:
            types[index] = TokenType.BYTE
        elif token and token == tokenizer["model"].get("unk_token"):
            types[index] = TokenType.UNKNOWN
        elif entry and types[index] == TokenType.USER_DEFINED and token in made and set(token) == {SPACE}:
            # Gemma's runs of spaces: merges make them, and an added token that is not normalised matches no space.
            types[index] = TokenType.USER_DEFINED if entry.get("normalized") else TokenType.NORMAL
    return types


def _spelled(tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Tokens as llama.cpp looks for them: added ones in plain text, where spaces are still spaces."""
    normalized = {entry["id"] for entry in tokenizer.get("added_tokens") or [] if entry.get("normalized")}
    return [
        token.replace(SPACE, " ") if types[index] == TokenType.USER_DEFINED and index in normalized else token
        for index, token in enumerate(tokens)
    ]


def from_unigram(tokenizer: Mapping[str, Any], tokens: Sequence[str]) -> Vocab:
    """Unigram language model: XLM-R and its embedders, T5; `t5` in llama.cpp.

    Raises:
        InputRefused: Byte fallback, or a normalizer or pre-tokenizer llama.cpp has no counterpart of.
    """
    model = tokenizer["model"]
    if model.get("byte_fallback"):
        raise InputRefused("tokenizer.json: unigram with byte_fallback; llama.cpp's unigram has none")
    charsmap, merge_spaces = _unigram_normalizer(tokenizer)
    prefix = False
    for node in pre_tokenizers(tokenizer):
        if node.get("type") == "WhitespaceSplit":
            merge_spaces = True
        elif node.get("type") == "Metaspace" and node.get("replacement", SPACE) == SPACE:
            prefix = puts_space(node)
        else:
            raise _unknown("pre_tokenizer", tokenizer)
    types = added_types(tokenizer, len(tokens))
    unknown = model.get("unk_id")
    if type(unknown) is int and unknown < len(types):
        types[unknown] = TokenType.UNKNOWN
    pieces = model["vocab"]
    scores = tuple(float(pieces[index][1]) if index < len(pieces) else 0.0 for index in range(len(tokens)))
    return Vocab(
        "t5",
        "default",
        tuple(_spelled(tokenizer, tokens, types)),
        tuple(types),
        scores=scores,
        extra=_unigram_keys(charsmap, merge_spaces),
        prefix_space=prefix,
    )


def _unigram_normalizer(tokenizer: Mapping[str, Any]) -> tuple[bytes, bool]:
    charsmap, merge_spaces = b"", False
    for node in normalizers(tokenizer):
        kind, pattern = node.get("type"), node.get("pattern") or {}
        if kind == "Precompiled":
            try:
                charsmap = base64.b64decode(node.get("precompiled_charsmap") or "", validate=True)
            except (binascii.Error, ValueError, TypeError) as error:
                raise InputRefused(f"tokenizer.json: precompiled_charsmap is not base64: {error}") from error
        elif (
            kind == "Replace" and pattern.get("Regex") == " {2,}" and node.get("content") in (" ", SPACE)
        ) or kind == "Strip":
            merge_spaces = True
        else:
            raise _unknown("normalizer", tokenizer)
    return charsmap, merge_spaces


def _unigram_keys(charsmap: bytes, merge_spaces: bool) -> Metadata:
    keys: Metadata = {"tokenizer.ggml.remove_extra_whitespaces": boolean(merge_spaces)}
    if charsmap:
        keys["tokenizer.ggml.precompiled_charsmap"] = array(ValueType.UINT8, charsmap)
    return keys


def _unknown(part: str, tokenizer: Mapping[str, Any]) -> InputRefused:
    structure = json.dumps(tokenizer.get(part), ensure_ascii=False)
    return InputRefused(
        f"tokenizer.json: {part} not understood for a SentencePiece tokenizer: {structure[:1500]}",
        hint="Known: Prepend and Replace to '▁', Metaspace, Precompiled, WhitespaceSplit. If llama.cpp's converter"
        " knows this model, give its F16 GGUF instead.",
    )
