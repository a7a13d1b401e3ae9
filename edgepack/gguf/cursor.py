"""A checked position in the header of a GGUF file: numbers, texts, arrays of strings, never past the end.

Reads by pread in growing pieces (no mapping: mapped pages count as resident memory, and a file that shrinks under a
mapping kills the process). Knows the encoding of values, nothing of what they mean.
"""

from __future__ import annotations

import itertools
import os
import struct
from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused

MAX_HEADER = 48 << 20  # bytes; that of Gemma 4, 262,144 tokens and 514,906 merges, takes 16 MB
MAX_STRING = 16 << 20  # bytes; nothing that llama.cpp reads comes near, other tools store a whole tokenizer.json

_PIECE = 1 << 20


def shown(path: Path) -> str:
    """A path fit for one line: odd characters escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


class Cursor:
    """A position in the header and the bytes read so far; every step is checked against the file's size."""

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self.descriptor = descriptor
        self.path = path
        self.size = size
        self.data = bytearray()
        self.at = 0
        self.place = "header"  # for messages
        self.elements = 0  # array elements announced so far

    def refuse(self, reason: str) -> InputRefused:
        """The error to raise: file, place, reason."""
        return InputRefused(f"{shown(self.path)}: {self.place}: {reason}")

    def fill(self, end: int) -> None:
        """Make sure that bytes up to `end` are in memory."""
        if end > self.size:
            raise self.refuse(f"reaches byte {end}, the file ends at {self.size} (truncated or corrupt)")
        if end > MAX_HEADER:
            raise self.refuse(f"the header is larger than {MAX_HEADER >> 20} MiB")
        while len(self.data) < end:
            chunk = os.pread(self.descriptor, max(_PIECE, len(self.data)), len(self.data))
            if not chunk:
                raise self.refuse(f"the file shrank to {len(self.data)} bytes while it was read")
            self.data += chunk

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if end > len(self.data):
            self.fill(end)
        taken = bytes(memoryview(self.data)[self.at : end])
        self.at = end
        return taken

    def u32(self) -> int:
        """The next four bytes as a number."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """The next eight bytes as a number."""
        return int.from_bytes(self.take(8), "little")

    def text(self, limit: int, what: str) -> bytes:
        """The next string, undecoded; `what` names it in the message when it is longer than `limit` bytes."""
        length = self.u64()
        if length > limit:
            raise self.refuse(f"{what} is {length} bytes long, at most {limit} allowed")
        return self.take(length)

    def utf8(self, data: bytes) -> str:
        """Decode a text or refuse it."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"the text is not UTF-8 (byte {error.start}: {error.reason})") from None


def take_strings(cursor: Cursor, count: int) -> bytes:
    """The bytes of `count` strings. One Python step per string, to find the next; the text is checked in bulk."""
    start = at = cursor.at
    data, filled = cursor.data, len(cursor.data)
    length_at = struct.Struct("<Q").unpack_from
    starts = array("q")
    for _ in range(count):
        if at + 8 > filled:
            cursor.fill(at + 8)
            filled = len(data)
        starts.append(at - start)
        length = length_at(data, at)[0]
        if length > MAX_STRING:
            raise cursor.refuse(f"element {len(starts) - 1} is {length} bytes long, at most {MAX_STRING} allowed")
        at += 8 + length
    packed = cursor.take(at - start)
    _check_utf8(cursor, packed, np.array(starts, dtype=np.int64))
    return packed


def _check_utf8(cursor: Cursor, packed: bytes, starts: npt.NDArray[np.int64]) -> None:
    """Check all strings of an array at once, a megabyte at a time.

    With the length fields overwritten by zeros, which are ASCII and so can't be part of a longer sequence, the run of
    bytes is valid UTF-8 exactly when each string is.
    """
    if not len(starts):
        return
    marks = np.searchsorted(starts, np.arange(0, len(packed), _PIECE))
    bounds = [*dict.fromkeys([*marks.tolist(), len(starts)])]
    for first, last in itertools.pairwise(bounds):
        begin = int(starts[first])
        text = bytearray(memoryview(packed)[begin : int(starts[last]) if last < len(starts) else len(packed)])
        fields = starts[first:last] - begin
        view = np.frombuffer(text, dtype=np.uint8)
        for byte in range(8):
            view[fields + byte] = 0
        try:
            text.decode()
        except UnicodeDecodeError as error:
            element = first + int(np.searchsorted(fields, error.start, side="right")) - 1
            raise cursor.refuse(f"element {element} is not UTF-8 ({error.reason})") from None
