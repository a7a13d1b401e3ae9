"""Checksums of files: sha256 for the record, git's blob id to check what a hub lists by it.

Reads in pieces, several files at once (hashlib releases the interpreter lock), and notices a file that changes under
its hands. Source of the blob id: git-hash-object(1), the sha1 of "blob", the size, NUL and the content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from edgepack.errors import InputRefused
from edgepack.model_folder import open_regular, read_into
from edgepack.worker import Progress, no_progress

_PIECE = 4 << 20  # large enough that the system calls vanish, small enough for a steady progress bar
_THREADS = 4  # beyond that the disk is the limit


@dataclass(frozen=True)
class Digest:
    """What a file's content is.

    Args:
        size: Bytes.
        sha256: Hexadecimal.
        blob_id: Git's name of the content, hexadecimal; empty unless it was asked for.
    """

    size: int
    sha256: str
    blob_id: str = ""


def digest(path: Path, *, blob_id: bool = False, progress: Progress = no_progress) -> Digest:
    """Hash one file.

    Args:
        path: A regular file, links resolved.
        blob_id: Compute git's blob id as well.
        progress: Called with (bytes done, bytes of the file).

    Raises:
        InputRefused: Not a regular file, or its size or time stamp changed while it was read.
        StorageError: The file system refused.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        hashes = [hashlib.sha256()]
        if blob_id:
            hashes.append(hashlib.sha1(b"blob %d\0" % before.st_size, usedforsecurity=False))
        buffer = memoryview(bytearray(_PIECE))
        done = 0
        # A file that grows for ever must not be read for ever: one piece beyond its size is enough to notice.
        while done <= before.st_size and (count := read_into(file, buffer, path)):
            for each in hashes:
                each.update(buffer[:count])
            done += count
            progress(done, before.st_size)
        after = os.fstat(file.fileno())
    if done != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputRefused(f"{path}: changed while it was being read", hint="Let the download or copy finish first.")
    return Digest(done, hashes[0].hexdigest(), hashes[1].hexdigest() if blob_id else "")


def sha256_of(files: Mapping[str, Path], progress: Progress = no_progress) -> dict[str, str]:
    """sha256 of several files, hashed side by side.

    Args:
        files: Name -> path.
        progress: Called with (bytes done, bytes of all files).

    Returns:
        Name -> hexadecimal sha256, in the order of `files`.

    Raises:
        InputRefused, StorageError: As `digest`.
    """
    total = sum(path.stat().st_size for path in files.values())
    done: dict[str, int] = {}
    lock = Lock()

    def hash_one(name: str) -> str:
        def count(bytes_done: int, _: int) -> None:
            with lock:
                done[name] = bytes_done
                progress(sum(done.values()), total)

        return digest(files[name], progress=count).sha256

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(hash_one, files), strict=True))
