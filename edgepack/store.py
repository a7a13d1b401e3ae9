"""Content-addressed, crash-safe folders: the result of a step is made once, and found whole or not at all.

    <root>/done/<key>/            finished entries (see `entries.py`); a rename into here is the only commit point
    <root>/tmp/<what>.<random>/   work in progress; its folder is locked by its maker, so that a dead one's can be told
    <root>/released/<key>.json    where large files of an entry went
    <root>/bad/<key>.<random>/    entries found damaged, kept for a look
    <root>/journals/<key>/        what long steps go on from after they were killed
    <root>/locks/<key>            so that two builds do not do the same work

The key is the SHA-256 of a step's name and inputs; the caller MUST put in everything that changes the result: options,
versions, digests of input files; never paths or times. Correctness rests on the rename and on hashing what is read; the
locks only save work, and keep `gc` away from entries that a living process uses. Killed at any call, a rerun goes on
from what is whole.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack import locks
from edgepack.cleaning import JOURNALS, clean, remove_abandoned, temporary, tree_bytes
from edgepack.entries import MANIFEST, Damaged, FileRecord, Released, key_of, read, seal
from edgepack.errors import StorageError
from edgepack.files import (
    clone,
    copy,
    discard,
    is_storage_error,
    storage_error,
    storage_errors,
    sync_folder,
    write_atomic,
)
from edgepack.publish import published_place
from edgepack.releases import Releases, link, took_over

_log = logging.getLogger(__name__)

_COPIED_BELOW = 256 << 20  # bytes; a smaller file is copied in under a second and stays in its entry
_CACHEDIR_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# Backup programs skip this folder (https://bford.info/cachedir/). edgepack keeps results of build steps here; it can be
# removed at any time.
"""
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 60.0  # with a process that releases a file and does not settle; its copy is read all the same
_ELSEWHERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_HINT = "Set EDGEPACK_CACHE to a folder that can be written and has room."


@dataclass(frozen=True)
class Entry:
    """A finished step.

    Args:
        key: SHA-256 of the step's name and inputs.
        path: Its folder in the store. Read only.
        cached: It was there before.
        files: By the name they were made with, `/` between folders.
    """

    key: str
    path: Path
    cached: bool
    files: Mapping[str, FileRecord]


class Store:
    """A store of step results, safe to share between processes.

    Entries that a store has handed out are in use until it is closed or collected: `gc` leaves them.

    Args:
        root: Its folder, created when first written. None takes $EDGEPACK_CACHE, else `edgepack` in the platform's
            cache folder ($XDG_CACHE_HOME, ~/.cache, ~/Library/Caches).
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()
        self._done = self.root / "done"
        self._tmp = self.root / "tmp"
        self._releases = Releases(self.root / "released")
        self._ready = False
        self._in_use: dict[str, int] = {}  # key -> descriptor of the entry's folder, with a shared lock
        self._finalizer = weakref.finalize(self, _close_all, self._in_use)

    def close(self) -> None:
        """Let go of the entries in use."""
        _close_all(self._in_use)

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Entry:
        """The entry for these inputs: found and checked, or made.

        Args:
            name: Of the step.
            inputs: JSON-able; everything that changes the result (RFC 8785 numbers: no NaN, integers below 2^53).
            make: Fills the empty folder it gets; sub-folders are fine. It must not return before its output is checked.

        Returns:
            The entry, every byte of it hashed in this call.

        Raises:
            StorageError: The store can't be written; the temporary folder is removed.
            Exception: Whatever `make` raised; the temporary folder is removed.
        """
        key = key_of(name, inputs)
        with self._storage_errors():
            entry = self._find(key, keep=False)
        if entry:
            return entry
        self._prepare()
        with contextlib.ExitStack() as held:
            with self._storage_errors():
                held.enter_context(locks.waiting(self.root / "locks" / key, f"making {name}"))
                entry = self._find(key, keep=True)
                if not entry:
                    remove_abandoned(self._tmp)  # the one that was waited for may have died
            return entry or self._make(key, name, inputs, make)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder on the store's file system, removed at the end of the block whatever happens.

        Raises:
            StorageError: It can't be made, or the block met a full, read-only or failing file system.
        """
        self._prepare()
        with self._temporary("scratch") as (folder, _):
            try:
                yield folder
            except OSError as error:
                if is_storage_error(error):
                    raise storage_error(error, folder) from error
                raise

    @contextlib.contextmanager
    def journal(self, name: str, inputs: Mapping[str, Any]) -> Iterator[Path]:
        """A folder that outlives a killed `make` of the same step: what a long one notes down to go on from.

        Removed when the block ends well; kept when it fails or dies, until it ends well or `gc` finds it a week old.
        To be used inside of `make`, whose lock keeps others away.

        Raises:
            StorageError: It can't be made.
        """
        folder = self.root / JOURNALS / key_of(name, inputs)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
        with storage_errors(folder):
            discard(folder)

    def release(self, entry: Entry, file: str, destination: Path) -> None:
        """Put a file of an entry at `destination`, without writing a large one twice.

        Blocks are shared where the file system can; else a file below 256 MB is copied. A larger one gets a second name
        (a hard link; a copy on another file system), and leaves the entry as soon as its place is final: at once, or,
        inside a folder that `publish` is building, when `settle` is called after it. Its place is remembered, and a
        later `step` finds it there if it is unchanged. While another process uses the entry, it is copied and stays.

        Args:
            entry: From `step` of this store.
            file: A key of `entry.files`.
            destination: Outside the store; must not exist.

        Raises:
            StorageError: The file system refused, or the destination exists.
        """
        record = entry.files[file]
        final = published_place(destination)
        with storage_errors(destination):
            if record.path != entry.path / file:
                # It was released before. Where that place is about to be replaced, its file can be taken over.
                if final != record.path or not link(record.path, destination):
                    copy(record.path, destination)
                self._write(*self._releases.with_places(entry.key, file, [final or destination]))
            elif record.size < _COPIED_BELOW:
                copy(record.path, destination)
            elif not clone(record.path, destination):
                self._hand_over(entry, file, destination, final)

    def _hand_over(self, entry: Entry, file: str, destination: Path, final: Path | None) -> None:
        descriptor = self._in_use[entry.key]
        try:
            locks.take(descriptor)  # until `settle`: nobody may start to use a file that is about to go
        except locks.Busy:
            with contextlib.suppress(locks.Busy):
                locks.take(descriptor, shared=True)
            copy(entry.files[file].path, destination)
            return
        self._write(*self._releases.with_places(entry.key, file, [place for place in (final, destination) if place]))
        if not link(entry.files[file].path, destination):
            copy(entry.files[file].path, destination)
        if final is None:
            self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Take released large files out of the entry, once they are where they stay. To be called after `publish`.

        Raises:
            StorageError: The file system refused.
        """
        released = self._releases.of(entry.key)
        with storage_errors(entry.path):
            for file, places in released.items():
                own = entry.path / file
                if any(published_place(place) is None and took_over(place, own) for place in places):
                    own.unlink(missing_ok=True)
                    sync_folder(own.parent)
            with contextlib.suppress(locks.Busy):
                locks.take(self._in_use[entry.key], shared=True)

    def size(self) -> int:
        """Bytes of everything in the store, released files not counted."""
        with storage_errors(self.root):
            return tree_bytes(self.root)

    def gc(self, keep_bytes: int = 0) -> int:
        """Remove damaged and abandoned folders, then the entries longest unused, until at most `keep_bytes` remain.

        Entries in use by any process stay, and so does work in progress.

        Returns:
            Bytes removed.

        Raises:
            StorageError: The store can't be written.
        """
        self._prepare()
        before = self.size()
        with storage_errors(self.root), locks.waiting(self.root / "locks" / "gc", "cleaning the store"):
            clean(self.root, keep_bytes, self._take_away)
        return before - self.size()

    def _find(self, key: str, *, keep: bool) -> Entry | None:
        """The whole entry of `key`, in use from now on; or None, and with `keep` the way is clear for a new one."""
        folder = self._done / key
        if key in self._in_use:  # an own lock that a release left exclusive would be waited for
            with contextlib.suppress(locks.Busy):
                locks.take(self._in_use[key], shared=True)
        patience = time.monotonic() + _PATIENCE_SECONDS
        while os.path.lexists(folder):
            try:
                descriptor = locks.open_folder(folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                if not keep:
                    return None
                self._set_aside(folder, "it is no folder")
                continue
            kept = False
            try:
                if time.monotonic() < patience:
                    locks.take(descriptor, shared=True)  # busy: about to be cleaned away, or handed over
                if not locks.is_at(descriptor, folder):
                    continue
                files = read(folder, self._releases.of(key))
                with contextlib.suppress(OSError):  # a store that can only be read is good for that
                    os.utime(folder / MANIFEST)
                kept = True
            except locks.Busy:
                time.sleep(_POLL_SECONDS)
                continue
            except Damaged as problem:
                if not keep:
                    return None
                self._set_aside(folder, str(problem), gone=isinstance(problem, Released))
                continue
            finally:
                if not kept:
                    os.close(descriptor)
            self._use(key, descriptor)
            entry = Entry(key, folder, True, files)
            return self._settled(entry)
        return None

    def _settled(self, entry: Entry) -> Entry:
        # A process killed between `publish` and `settle` leaves a file with two names.
        own = [file.path for name, file in entry.files.items() if file.path == entry.path / name]
        if all(path.lstat().st_nlink == 1 for path in own):
            return entry
        with contextlib.suppress(locks.Busy):
            locks.take(self._in_use[entry.key])
            self.settle(entry)
        released = self._releases.of(entry.key)
        files = {
            name: file if os.path.lexists(file.path) else FileRecord(file.size, file.sha256, released[name][0])
            for name, file in entry.files.items()
        }
        return Entry(entry.key, entry.path, entry.cached, files)

    def _make(self, key: str, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Entry:
        folder = self._done / key
        with self._temporary(key[:16]) as (work, descriptor), self._storage_errors():
            make(work)
            files = seal(work, name, inputs)
            while True:
                try:
                    work.rename(folder)  # the commit point: never over an entry, since those are not empty
                    break
                except OSError:
                    if not os.path.lexists(folder):
                        raise
                # Without locks another process may have been faster; the same inputs gave it the same result.
                if other := self._find(key, keep=True):
                    return other
            sync_folder(self._done)
            with contextlib.suppress(locks.Busy):
                locks.take(descriptor, shared=True)
            self._use(key, os.dup(descriptor))
        moved = {path: FileRecord(file.size, file.sha256, folder / path) for path, file in files.items()}
        return Entry(key, folder, False, moved)

    def _use(self, key: str, descriptor: int) -> None:
        if key in self._in_use:
            os.close(self._in_use[key])
        self._in_use[key] = descriptor

    @contextlib.contextmanager
    def _temporary(self, label: str) -> Iterator[tuple[Path, int]]:
        with contextlib.ExitStack() as held:
            with self._storage_errors():
                made = held.enter_context(temporary(self._tmp, label))
            yield made

    def _write(self, path: Path, data: bytes) -> None:
        # Not beside `path`: what a killed process leaves in a folder of its own is cleared away.
        with self._temporary("write") as (folder, _):
            write_atomic(path, data, beside=folder)

    def _prepare(self) -> None:
        if self._ready:
            return
        with self._storage_errors():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("tmp", "done", "bad", "released", "locks"):
                (self.root / name).mkdir(exist_ok=True)
            if not (self.root / "CACHEDIR.TAG").is_file():
                self._write(self.root / "CACHEDIR.TAG", _CACHEDIR_TAG)
            remove_abandoned(self._tmp)
        self._ready = True

    def _take_away(self, folder: Path) -> None:
        self._releases.forget(folder.name)
        with self._temporary("gone") as (grave, _):
            folder.rename(grave / folder.name)  # at once for everyone; the removal may take its time

    def _set_aside(self, folder: Path, problem: str, *, gone: bool = False) -> None:
        if gone:
            _log.info("entry %s: %s; it is made again", folder.name[:12], problem)
            self._take_away(folder)
            return
        _log.warning("entry %s of the store is damaged: %s; it is made again", folder.name[:12], problem)
        self._releases.forget(folder.name)
        bad = self.root / "bad"
        bad.mkdir(exist_ok=True)
        for older in bad.glob(f"{folder.name}.*"):
            discard(older)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(bad / f"{folder.name}.{os.urandom(4).hex()}")

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            with storage_errors(self.root):
                yield
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _ELSEWHERE and str(self.root) in error.message:
                raise StorageError(error.message, hint=_HINT) from cause
            raise


def default_root() -> Path:
    """$EDGEPACK_CACHE, or `edgepack` in the platform's cache folder."""
    if chosen := os.environ.get("EDGEPACK_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/edgepack").expanduser()
    # XDG base directory specification: a relative path is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "edgepack"


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
