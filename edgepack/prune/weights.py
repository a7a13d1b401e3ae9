"""Writing the tensors that stay: read rows, take what stays, write; a few MB in memory whatever the model's size.

Shards stay as they were, without those that end up empty. Values are copied bit for bit in the checkpoint's own type.
Source of the format: https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import read_rows
from edgepack.prune.cut import Piece
from edgepack.weight_files import INDEX_FILE, SINGLE_FILE
from edgepack.worker import Progress, no_progress

Array = npt.NDArray[Any]
# What becomes of some rows of a tensor: (piece, first row after the cut, rows after the cut) -> the rows to write.
Change = Callable[[Piece, int, Array], Array]

_READ_BYTES = 16 << 20
_ALIGNMENT = 8  # of the data: as the safetensors library writes it


def unchanged(piece: Piece, first: int, rows: Array) -> Array:
    """Write rows as they are."""
    return rows


def write_weights(
    folder: Path, pieces: Sequence[Piece], *, change: Change = unchanged, progress: Progress = no_progress
) -> list[Path]:
    """Write safetensors files and, for several, their index.

    Args:
        folder: Where to.
        pieces: All tensors.
        change: Applied to every block of rows.
        progress: In bytes written.

    Returns:
        The safetensors files.

    Raises:
        StorageError, OSError: The file system refused.
        InputRefused: The checkpoint changed while it was read.
    """
    shards: dict[Path, list[Piece]] = {}
    for piece in pieces:
        shards.setdefault(piece.info.file, []).append(piece)
    several = len(shards) > 1
    total, done = sum(piece.nbytes for piece in pieces), 0
    written: list[Path] = []
    index: dict[str, str] = {}
    for number, shard in enumerate(shards.values(), 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else SINGLE_FILE
        index |= {piece.name: name for piece in shard}
        with (folder / name).open("xb") as file:
            file.write(_header(shard))
            for piece in shard:
                _write_piece(file, piece, change)
                done += piece.nbytes
                progress(done, total)
        written.append(folder / name)
    if several:
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return written


def _header(pieces: Sequence[Piece]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.nbytes
        entries[piece.name] = {"dtype": piece.info.dtype, "shape": list(piece.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_piece(file: BinaryIO, piece: Piece, change: Change) -> None:
    rows = math.prod(piece.info.shape[:-1])
    width = piece.info.shape[-1] if piece.info.shape else 1
    step = max(1, _READ_BYTES // max(1, width * piece.info.nbytes // max(1, piece.info.parameters)))
    first = 0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if piece.rows is not None:
            wanted = piece.rows[(piece.rows >= start) & (piece.rows < stop)] - start
            if not len(wanted):
                continue
            found = read_rows(piece.info, start, stop)[wanted]
        else:
            found = read_rows(piece.info, start, stop)
        if piece.columns is not None:
            found = found[:, piece.columns]
        file.write(np.ascontiguousarray(change(piece, first, found)).tobytes())
        first += len(found)
