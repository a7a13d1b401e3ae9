"""The bytes of a token by the source's own tokenizer: what is shown where an engine can't say it itself.

Three ways of writing bytes in a vocabulary are told apart: letters that stand for bytes (GPT-2's `bytes_to_unicode`,
openai/gpt-2 src/encoder.py), `<0x0A>` for single bytes and `▁` for a space (SentencePiece, byte fallback).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgepack.conform.tokens import open_reference
from edgepack.strict_json import parse_object

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(source: Path) -> Callable[[Sequence[int]], bytes]:
    """A function from token ids to the bytes of their text, special tokens written out.

    Args:
        source: The model folder.

    Raises:
        InputRefused: It has no tokenizer that can be read.
    """
    reference = open_reference(source)
    path = source / "tokenizer.json"
    document = parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
    written = {entry["id"] for entry in document.get("added_tokens") or []}
    letters = _byte_letters() if _byte_level(document.get("decoder")) else None

    def one(token: int) -> bytes:
        name = reference.name_of(token) or ""
        if token in written:
            return name.encode()
        if letters is not None:
            return b"".join(letters.get(letter, letter.encode()) for letter in name)
        match = _BYTE.fullmatch(name)
        return bytes.fromhex(match[1]) if match else name.replace("▁", " ").encode()

    return lambda ids: b"".join(map(one, ids))


def _byte_level(decoder: Any) -> bool:
    """True where the decoder of a tokenizer.json, or one of its steps, reads letters as bytes."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_byte_level, decoder.get("decoders") or []))


def _byte_letters() -> dict[str, bytes]:
    """Letter -> byte: printable ones stand for themselves, the others for letters from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (number for number in range(0x100) if number not in plain)
    table = {chr(number): bytes([number]) for number in plain}
    return table | {chr(0x100 + place): bytes([number]) for place, number in enumerate(others)}
