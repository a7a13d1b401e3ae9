"""What may be removed from a store: folders of dead processes, damaged copies, entries unused for longest.

Only what bears a name of the store's is ever looked at: $EDGEPACK_CACHE may be set to a folder that holds other things.
What a living process uses is locked, and stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgepack import locks
from edgepack.entries import MANIFEST
from edgepack.files import discard, remove

_KEY = re.compile(r"[0-9a-f]{64}")
_BAD = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{8}")
JOURNALS = "journals"
_JOURNAL_SECONDS = 7 * 24 * 3600  # a step that was not taken up again by then will not be
_TEMPORARY = re.compile(r"\w+\.\d+\.[0-9a-f]{12}")


@contextlib.contextmanager
def temporary(parent: Path, label: str) -> Iterator[tuple[Path, int]]:
    """A folder in `parent` and a descriptor with its lock; removed at the end of the block, if it is still there.

    Raises:
        OSError: It can't be created.
    """
    folder, descriptor = locks.new_folder(lambda: parent / f"{label}.{os.getpid()}.{os.urandom(6).hex()}")
    try:
        yield folder, descriptor
    finally:
        try:
            if locks.is_at(descriptor, folder):
                discard(folder)
        finally:
            os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders of processes that are dead."""
    for folder in _matching(parent, _TEMPORARY):
        descriptor = locks.abandoned(folder)
        if descriptor is not None:
            discard(folder)
            os.close(descriptor)


def clean(root: Path, keep_bytes: int, take_away: Callable[[Path], None]) -> None:
    """Remove damaged copies, then entries, those longest unused first, until at most `keep_bytes` are left in them.

    Args:
        root: Of the store.
        keep_bytes: Size of all entries that may stay.
        take_away: Removes an entry that nobody uses, which is locked meanwhile.

    Raises:
        OSError, StorageError: Something can't be removed.
    """
    for folder in _matching(root / "bad", _BAD):
        remove(folder)
    remove_abandoned(root / "tmp")
    for folder in _matching(root / JOURNALS, _KEY) if (root / JOURNALS).is_dir() else ():
        if time.time() - _newest(folder) > _JOURNAL_SECONDS:
            discard(folder)
    sizes = {folder: tree_bytes(folder) for folder in sorted(_matching(root / "done", _KEY), key=_last_used)}
    left = sum(sizes.values())
    for folder, size in sizes.items():
        if left <= keep_bytes:
            break
        if _evict(folder, take_away):
            left -= size
    for lock in _matching(root / "locks", _KEY):
        if not os.path.lexists(root / "done" / lock.name):
            _remove_unused(lock)


def _evict(folder: Path, take_away: Callable[[Path], None]) -> bool:
    try:
        descriptor = locks.open_folder(folder)
    except OSError:
        remove(folder)
        return True
    try:
        if not locks.take(descriptor) or not locks.is_at(descriptor, folder):
            return False  # without locks nobody can tell what is in use
        take_away(folder)
        return True
    except locks.Busy:
        return False
    finally:
        os.close(descriptor)


def _remove_unused(lock: Path) -> None:
    with contextlib.suppress(OSError, locks.Busy):
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if locks.take(descriptor):
                lock.unlink()
        finally:
            os.close(descriptor)


def tree_bytes(path: Path) -> int:
    """Bytes of all files in a folder and below."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += Path(folder, name).lstat().st_size
    return total


def _matching(folder: Path, names: re.Pattern[str]) -> list[Path]:
    return [path for path in folder.iterdir() if names.fullmatch(path.name)]


def _newest(folder: Path) -> float:
    """When anything in a folder was last written; now, if it went meanwhile."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return time.time()


def _last_used(folder: Path) -> float:
    try:
        return (folder / MANIFEST).lstat().st_mtime
    except OSError:
        return 0.0
