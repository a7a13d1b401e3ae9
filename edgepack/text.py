"""Evaluation and calibration text: read it, cut it into token windows, name it by its digest.

Two texts travel with edgepack (`_data/text`, freely licensed, attribution beside them): one to measure on, one to
calibrate on; no document is in both. Any UTF-8 file can stand in for either. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from edgepack.errors import InputRefused, UsageError

WINDOW_TOKENS = (
    512  # llama-perplexity's default context (llama.cpp tools/perplexity/perplexity.cpp: params.n_ctx = 512)
)
MAX_BYTES = 256 << 20  # a text is tokenized whole, in memory; wikitext-2's test split has 1.3 MB

_DATA = Path(__file__).parent / "_data" / "text"


def default_evaluation_text() -> Path:
    """The text fidelity is measured on when no other is named."""
    return _DATA / "evaluation.txt"


def named_evaluation_text(path: str | Path | None) -> Path:
    """The text a user named with `--evaluation`, or the one that ships.

    Raises:
        UsageError: It is not a file.
    """
    if path is None:
        return default_evaluation_text()
    if not Path(path).is_file():
        raise UsageError(f"--evaluation: {path} is not a file", hint="Name a UTF-8 text file.")
    return Path(path)


def default_calibration_text() -> Path:
    """The text importance matrices are computed on when no other is named; disjoint from the evaluation text."""
    return _DATA / "calibration.txt"


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, byte for byte: no newline translation, so that every machine sees the same tokens.

    Raises:
        InputRefused: Not a regular file, too large, empty, or not text (NUL bytes, invalid UTF-8).
    """
    path = Path(path)
    if not path.is_file():
        raise InputRefused(f"{path}: not a file; expected UTF-8 text")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputRefused(
            f"{path}: {size} bytes of text, expected at most {MAX_BYTES}",
            hint="Cut it: measurements start at its beginning.",
        )
    data = path.read_bytes()
    if (place := data.find(b"\0")) >= 0:
        raise InputRefused(f"{path}: NUL byte at offset {place}; expected UTF-8 text, this looks like a binary file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8") from None
    if not text.strip():
        raise InputRefused(f"{path}: empty; expected UTF-8 text of at least two windows")
    return text


def text_sha256(text: str) -> str:
    """Digest that names a text in evidence: sha256 of its UTF-8 bytes, which is that of the file it was read from."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def windows(tokens: Sequence[int], window_tokens: int = WINDOW_TOKENS, limit: int | None = None) -> list[list[int]]:
    """Cut tokens into consecutive windows from the start; a last window that is not full is left out.

    Args:
        tokens: The whole text, tokenized once.
        window_tokens: Tokens per window.
        limit: Most windows; None for all.

    Returns:
        At least one window.

    Raises:
        InputRefused: Fewer tokens than two windows, the smallest text llama-perplexity takes.
    """
    if len(tokens) < 2 * window_tokens:
        raise InputRefused(
            f"the text has {len(tokens)} tokens, expected at least {2 * window_tokens}: two windows of {window_tokens}",
            hint="Give a longer text with --evaluation; build and validate take --set measure.window_tokens=N as well.",
        )
    count = len(tokens) // window_tokens
    count = count if limit is None else min(count, limit)
    return [list(tokens[i * window_tokens : (i + 1) * window_tokens]) for i in range(count)]


def sentences(text: str, limit: int, *, shortest: int = 20, longest: int = 400) -> list[str]:
    """The first `limit` different sentences of a text, for embedders.

    A sentence ends at `.`, `!` or `?` before white space, or at a blank line; white space inside becomes one space.

    Args:
        text: Any text.
        limit: Most sentences.
        shortest: Fewest characters; shorter pieces (headings, list markers) are left out.
        longest: Most characters; longer pieces are tables and code.

    Raises:
        InputRefused: The text has fewer than two such sentences.
    """
    pieces = (" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    found = list(dict.fromkeys(piece for piece in pieces if shortest <= len(piece) <= longest))[:limit]
    if len(found) < 2:
        raise InputRefused(
            f"the text has {len(found)} sentences of {shortest} to {longest} characters, expected at least 2",
            hint="Give a longer text with --evaluation.",
        )
    return found
