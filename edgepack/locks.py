"""Advisory locks on open folders and files (flock(2)): the kernel drops them when their holder dies, however it dies.

Nothing here is needed for correctness: locks keep two builds from doing the same work, and say which folders are in use. On
file systems without locks (some NFS mounts) `take` answers None and the caller goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
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
