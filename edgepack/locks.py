"""Advisory locks on open folders and files (flock(2)): the kernel drops them when their holder dies, however it dies.

Nothing here is needed for correctness: locks keep two builds from doing the same work, and say which folders are in
use. On file systems without locks (some NFS mounts) `take` answers False and the caller goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_ABANDONED_SECONDS = 7 * 86400  # where the file system has no locks: no build takes a week
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}


class Busy(Exception):
    """Another process holds the lock."""


def take(descriptor: int, *, shared: bool = False) -> bool:
    """Lock what is open, without waiting; an own lock is converted.

    Returns:
        False where the file system has no locks.

    Raises:
        Busy: Another process holds it.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        raise Busy from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False


def open_folder(path: Path) -> int:
    """A descriptor of a folder (no link), not inherited by children: an inherited one would keep its lock alive."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the thing that `descriptor` has open: it may have been renamed or replaced meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def new_folder(name: Callable[[], Path]) -> tuple[Path, int]:
    """Create a folder and lock it: as long as the descriptor is open, everyone can tell that its maker lives.

    Args:
        name: Makes up a name; called again when one is taken.

    Returns:
        The folder, and the descriptor that the caller has to close.

    Raises:
        OSError: It can't be created.
    """
    while True:
        folder = name()
        try:
            folder.mkdir()
            descriptor = open_folder(folder)
        except (FileExistsError, FileNotFoundError):  # a name that was taken; a cleaner that came before the lock
            if not folder.parent.is_dir():
                raise
            continue
        with contextlib.suppress(Busy):
            take(descriptor)
            if is_at(descriptor, folder):
                return folder, descriptor
        os.close(descriptor)


def abandoned(folder: Path) -> int | None:
    """A descriptor with the lock of a folder whose maker is dead, for the caller to close; None if it may be alive."""
    try:
        descriptor = open_folder(folder)
    except OSError:
        return None
    with contextlib.suppress(Busy):
        # Without locks only age can tell. A clock that was set back makes a folder look younger: it stays, no harm.
        age = time.time() - os.fstat(descriptor).st_mtime
        if (take(descriptor) or age > _ABANDONED_SECONDS) and is_at(descriptor, folder):
            return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def waiting(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` within the block; wait for whoever holds it.

    Args:
        path: Created if missing, never removed by this.
        what: What the other process is doing, for the log.

    Raises:
        OSError: The lock file can't be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        told = False
        while True:
            try:
                if not take(descriptor):
                    _log.warning("%s: this file system has no locks; two builds may do the same work", path.parent)
                break
            except Busy:
                if not told:
                    _log.info("another edgepack process is %s; waiting for it", what)
                    told = True
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
