"""tokenizer.model: the protocol buffer SentencePiece writes, read without SentencePiece.

Only the fields llama.cpp needs are looked at. Source: sentencepiece `src/sentencepiece_model.proto` (field numbers;
its piece types are numbered like llama.cpp's token types), protobuf encoding specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.gguf.file import boolean
from edgepack.gguf.tokenizer_json import looks_special
from edgepack.gguf.vocab import UNUSED_SCORE, TokenType, Vocab

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_ADDED_SCORE = -1000.0  # llama.cpp conversion/base.py: tokens that are not in tokenizer.model


@dataclass(frozen=True)
class SentencePieceFile:
    """What tokenizer.model says.

    Args:
        pieces: (text, score, type) by id.
        unigram: Unigram, else BPE.
        add_dummy_prefix: A space is put before the text.
        remove_extra_whitespaces: Runs of spaces become one, those at the ends go.
        charsmap: Compiled normalisation rules; empty for identity.
        roles: Ids of `unk`, `bos`, `eos`, `pad`, those there are.
    """

    pieces: tuple[tuple[str, float, int], ...]
    unigram: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    roles: Mapping[str, int]


def parse(data: bytes, where: str) -> SentencePieceFile:
    """Read the bytes of a tokenizer.model.

    Args:
        data: The whole file.
        where: Its path, for messages.

    Raises:
        InputRefused: Not a SentencePiece model, cut short, or of a type other than unigram and BPE.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece.get(1, b"").decode(), score, piece.get(3, 1)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError, AttributeError, TypeError) as error:
        raise InputRefused(f"{where}: not a SentencePiece model: {error}") from error
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise InputRefused(
            f"{where}: SentencePiece model of type {kind} with {len(pieces)} pieces; expected unigram or BPE"
        )
    return SentencePieceFile(
        pieces=tuple(pieces),
        unigram=kind == _UNIGRAM,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
        roles=_roles(trainer, len(pieces)),
    )


def _roles(trainer: Mapping[int, Any], count: int) -> dict[str, int]:
    # TrainerSpec: unk_id 40, bos_id 41, eos_id 42, pad_id 43, with these defaults; -1 (none) is stored as 2**64 - 1.
    numbers = {
        "unk": trainer.get(40, 0),
        "bos": trainer.get(41, 1),
        "eos": trainer.get(42, 2),
        "pad": trainer.get(43, -1),
    }
    return {role: number for role, number in numbers.items() if 0 <= number < count}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value): int for varints, bytes for everything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value: Any
            value, position = _varint(data, position)
        else:
            if kind == 2:
                size, position = _varint(data, position)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind} at byte {position}")
            value = data[position : position + size]
            position += size
            if position > len(data):
                raise ValueError("ends inside a field")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 10 bytes")


def from_model_file(checkpoint: Checkpoint, name: str, rows: int) -> Vocab:
    """The vocabulary of a folder that has tokenizer.model and no tokenizer.json.

    Args:
        checkpoint: The folder; added_tokens.json and tokenizer_config.json's added_tokens_decoder are applied.
        name: The file.
        rows: Rows of the embedding matrix; added tokens beyond it are refused.

    Raises:
        InputRefused: Not a SentencePiece model, a unigram one, or an added token's id is beyond the embedding.
    """
    model = parse(checkpoint.data(name) or b"", str(checkpoint.path / name))
    if model.unigram:
        raise InputRefused(
            f"{checkpoint.path / name}: a unigram model, and the folder has no tokenizer.json",
            hint="Save it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        )
    tokens = [text for text, _, _ in model.pieces]
    scores = [score for _, score, _ in model.pieces]
    types = [kind for _, _, kind in model.pieces]
    for number, text, special in _added(checkpoint):
        if not 0 <= number < rows:
            raise InputRefused(
                f"{checkpoint.path}: added token {text!r} has id {number}, the embedding has {rows} rows"
            )
        missing = number + 1 - len(tokens)
        tokens += [""] * missing
        scores += [UNUSED_SCORE] * missing
        types += [TokenType.UNUSED] * missing
        keep = types[number] in (TokenType.UNKNOWN, TokenType.BYTE) and tokens[number] == text
        tokens[number] = text
        if not keep:
            scores[number] = _ADDED_SCORE
            types[number] = TokenType.CONTROL if special or looks_special(text) else TokenType.USER_DEFINED
    return Vocab(
        "llama",
        "default",
        tuple(tokens),
        tuple(types),
        scores=tuple(scores),
        extra={"tokenizer.ggml.remove_extra_whitespaces": boolean(model.remove_extra_whitespaces)},
        prefix_space=model.add_dummy_prefix,
        roles=model.roles,
    )


def _added(checkpoint: Checkpoint) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of tokens that were added after training."""
    for text, number in (checkpoint.json("added_tokens.json") or {}).items():
        yield int(number), text, False
    decoder = (checkpoint.json("tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    for key, entry in decoder.items():
        yield int(key), str(entry.get("content")), bool(entry.get("special"))
