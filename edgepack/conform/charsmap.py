"""SentencePiece's compiled normalisation rules, applied as SentencePiece and llama.cpp apply them: longest match.

Hugging Face `tokenizers` looks whole grapheme clusters up instead, which gives other text for decomposed letters and
for CR LF. Written from the format, for the comparison only; never used to build a file.

Source: sentencepiece `src/normalizer.cc` (NormalizePrefix, DecodePrecompiledCharsMap), darts-clone `darts.h` (the units
of the double array).
"""

from __future__ import annotations

import struct


class Charsmap:
    """Rules of one tokenizer.

    Args:
        blob: `precompiled_charsmap`: size of the double array in bytes (uint32), the array, then the replacements, each
            ended by NUL.
    """

    def __init__(self, blob: bytes) -> None:
        size = struct.unpack_from("<I", blob)[0] // 4
        self._units = struct.unpack_from(f"<{size}I", blob, 4)
        self._replacements = blob[4 + 4 * size :]

    def __call__(self, text: str) -> str:
        """The text with every rule applied, from left to right."""
        data, out, position = text.encode("utf-8", "replace"), bytearray(), 0
        while position < len(data):
            length, offset = self._longest(data, position)
            if length:
                out += self._replacements[offset : self._replacements.index(b"\0", offset)]
            else:  # one character as it is
                length = next(n for n in range(1, 5) if position + n >= len(data) or data[position + n] & 0xC0 != 0x80)
                out += data[position : position + length]
            position += length
        return out.decode("utf-8", "replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """(bytes matched, offset of the replacement); (0, 0) when no rule matches."""
        units, found = self._units, (0, 0)
        node = _base(units[0])
        for position in range(start, len(data)):
            letter = data[position]
            node ^= letter
            if letter == 0 or node >= len(units) or units[node] & 0x8000_00FF != letter:
                break
            leaf = units[node] >> 8 & 1
            node ^= _base(units[node])
            if leaf:
                found = (position - start + 1, units[node] & 0x7FFF_FFFF)
        return found


def _base(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)
