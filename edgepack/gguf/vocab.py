"""A vocabulary on its way into a GGUF file: tokens, their types, and what the tokenizer needs besides.

Source: llama.cpp `include/llama.h` (enum llama_token_type), `src/llama-vocab.cpp` (how the keys are read), gguf-py
`gguf/constants.py` (names of the keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

from edgepack.errors import InputRefused
from edgepack.gguf.file import Metadata, ValueType, array, string


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`: enum llama_token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocab:
    """Everything llama.cpp needs to turn text into ids, but the ids of the special tokens.

    Args:
        model: `tokenizer.ggml.model`: `gpt2` (BPE with merges), `llama` (SentencePiece BPE by score), `t5` (unigram),
            `bert` (WordPiece).
        pre: `tokenizer.ggml.pre`.
        tokens: By id.
        types: By id.
        scores: By id, for `llama` and `t5`.
        merges: `left right`, best first, for `gpt2`.
        extra: Further keys of this kind of tokenizer.
        prefix_space: `tokenizer.ggml.add_space_prefix`.
        roles: Ids the tokenizer itself gives to `unk`, `bos`, `eos`, `pad`; the folder's other files come first.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    extra: Metadata = field(default_factory=dict)
    prefix_space: bool = False
    roles: Mapping[str, int] = field(default_factory=dict)


UNUSED_SCORE = -10000.0  # llama.cpp conversion/base.py: ids that have no token


def padded(vocab: Vocab, rows: int) -> Vocab:
    """The vocabulary with one token per embedding row: free ids get `[PAD<id>]`, as llama.cpp's converter names them.

    Args:
        vocab: Tokens by id; empty strings stand for free ids.
        rows: Rows of the embedding matrix.

    Raises:
        InputRefused: A token has an id beyond the embedding, or two ids share one text.
    """
    if len(vocab.tokens) > rows:
        last = len(vocab.tokens) - 1
        raise InputRefused(
            f"tokenizer: token {vocab.tokens[last]!r} has id {last}, and the embedding has {rows} rows",
            hint="Tokenizer and weights are not of one model, or tokens were added without resize_token_embeddings.",
        )
    missing = rows - len(vocab.tokens)
    tokens, types = list(vocab.tokens) + [""] * missing, list(vocab.types) + [TokenType.UNUSED] * missing
    taken = {token: index for index, token in enumerate(tokens) if token}
    for index, token in enumerate(tokens):
        if not token:
            name = f"[PAD{index}]"
            while name in taken:
                name = f"[{name}]"
            tokens[index], types[index], taken[name] = name, TokenType.UNUSED, index
        elif taken[token] != index:
            # llama.cpp aborts on it: GGML_ASSERT(id_to_token.size() == token_to_id.size())
            raise InputRefused(
                f"tokenizer: ids {index} and {taken[token]} are one token, {token!r}; llama.cpp needs two"
            )
    scores = vocab.scores and vocab.scores + (UNUSED_SCORE,) * missing
    return replace(vocab, tokens=tuple(tokens), types=tuple(int(kind) for kind in types), scores=scores)


def metadata(vocab: Vocab) -> Metadata:
    """The keys of a vocabulary that has a token for every id."""
    keys: Metadata = {
        "tokenizer.ggml.model": string(vocab.model),
        "tokenizer.ggml.pre": string(vocab.pre),
        "tokenizer.ggml.tokens": array(ValueType.STRING, vocab.tokens),
        "tokenizer.ggml.token_type": array(ValueType.INT32, vocab.types),
    }
    if vocab.scores:
        keys["tokenizer.ggml.scores"] = array(ValueType.FLOAT32, vocab.scores)
    if vocab.merges:
        keys["tokenizer.ggml.merges"] = array(ValueType.STRING, vocab.merges)
    return keys | vocab.extra
