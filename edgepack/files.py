"""Files that are whole or not there: durable writes, hashes, copies that share blocks, removal that follows no link.

Every OSError leaves as a `StorageError` that names the path and says what to do. Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from edgepack.errors import StorageError
from edgepack.worker import Progress, no_progress

_CHUNK = 1 << 20  # bytes per read: hashlib lets go of the GIL, and a larger buffer is not faster
_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h; see ioctl_ficlone(2)

_HINTS = {
    errno.ENOSPC: "Free some space on that file system, or choose another place.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another place.",
    errno.EROFS: "That file system is read-only: choose another place.",
    errno.EACCES: "Check the permissions of that path, or choose another place.",
    errno.EPERM: "Check the permissions of that path, or choose another place.",
    errno.EIO: "The disk failed to read or write it: check the disk and the system log (dmesg).",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n) and try again.",
    errno.ENFILE: "The system has too many files open: close other programs and try again.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.EFBIG: "That file system, or a limit (ulimit -f), does not take a file of this size.",
}


def storage_error(error: OSError, path: Path | None = None) -> StorageError:
    """The `StorageError` for `error`: the path it names (else `path`), the system's reason, and what to do about it."""
    place = error.filename if isinstance(error.filename, str) else path
    reason = error.strerror or str(error)
    message = f"{place}: {reason[:1].lower()}{reason[1:]}" if place else reason
    return StorageError(message, hint=_HINTS.get(error.errno or 0))


def is_storage_error(error: OSError) -> bool:
    """Whether the file system refused (full, read-only, not allowed, failing), rather than the program being wrong."""
    return error.errno in _HINTS


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Within the block, an OSError becomes a `StorageError` about `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def write_atomic(path: Path, data: bytes, *, beside: Path | None = None) -> None:
    """Write a file so that `path` holds either what it held before or all of `data`, after a crash too.

    Args:
        path: The file.
        data: All of its content.
        beside: Folder for the temporary file, on the same file system; None takes that of `path`. SIGKILL leaves it.

    Raises:
        StorageError: The file system refused; `path` is unchanged and no temporary file is left.
    """
    temporary = (beside or path.parent) / f".{os.urandom(8).hex()}.tmp"
    with storage_errors(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush one file's content to the disk."""
    _sync(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that can't sync folders say so (fsync(2)); no data is at risk
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush a folder, everything in it, and the folders in it, to the disk; links are not followed."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            if stat.S_ISREG(Path(folder, name).lstat().st_mode):
                sync_file(Path(folder, name))
        sync_folder(Path(folder))


def sha256_of(path: Path, progress: Progress = no_progress) -> str:
    """SHA-256 of a regular file in hexadecimal.

    Args:
        path: The file; a link or a device is refused.
        progress: In bytes.

    Raises:
        StorageError: It is no regular file, or reading it failed.
    """
    with storage_errors(path), _open_regular(path) as (descriptor, size):
        return _sha256(descriptor, path, size, progress)


def _sha256(descriptor: int, path: Path, size: int, progress: Progress) -> str:
    state, buffer, done = hashlib.sha256(), memoryview(bytearray(_CHUNK)), 0
    while count := _read_into(descriptor, buffer, path):
        state.update(buffer[:count])
        done += count
        progress(done, max(size, done))
    return state.hexdigest()


def _read_into(descriptor: int, buffer: memoryview, path: Path) -> int:
    try:
        return os.readv(descriptor, [buffer])
    except OSError as error:  # read(2) knows no name
        error.filename = str(path)
        raise


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, int]]:
    # O_NONBLOCK: a FIFO must not hang the open; it has no effect on a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def clone(source: Path, destination: Path) -> bool:
    """Make `destination` share the blocks of `source` (Btrfs, XFS, bcachefs), or return False and leave nothing.

    Raises:
        StorageError: The destination exists, or can't be created.
    """
    with storage_errors(destination), _open_regular(source) as (origin, _):
        target = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.ioctl(target, _FICLONE, origin)
            os.fsync(target)
            return True
        except OSError:  # another file system, or one that can't: EXDEV, EOPNOTSUPP, EINVAL, ENOTTY
            destination.unlink()
            return False
        finally:
            os.close(target)


def copy(source: Path, destination: Path, progress: Progress = no_progress) -> None:
    """Copy a regular file to a name that must not exist, through shared blocks where possible, durably.

    Args:
        source: The file; a link is refused.
        destination: Where it goes; permissions are those of a new file.
        progress: In bytes.

    Raises:
        StorageError: The destination exists, or reading or writing failed; nothing is left at the destination.
    """
    if clone(source, destination):
        return
    with storage_errors(destination), _open_regular(source) as (origin, size):
        target = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _copy_bytes(origin, target, source, destination, size, progress)
            os.fsync(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                destination.unlink()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(destination)
            raise
        finally:
            os.close(target)


def _copy_bytes(origin: int, target: int, source: Path, destination: Path, size: int, progress: Progress) -> None:
    buffer, done = memoryview(bytearray(_CHUNK)), 0
    while count := _read_into(origin, buffer, source):
        piece = buffer[:count]
        while piece:
            piece = piece[os.write(target, piece) :]
        done += count
        progress(done, max(size, done))


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a whole folder; what does not exist is fine.

    Raises:
        StorageError: Something could not be removed.
    """
    with storage_errors(path):
        _remove(path)


def _remove(path: Path) -> None:
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
    except FileNotFoundError:
        return
    # A folder without write permission can't be emptied; whoever made it read-only did not mean this removal.
    for folder, folders, _ in os.walk(path):
        for name in [".", *folders]:
            place = Path(folder, name)
            if not place.is_symlink():
                place.chmod(stat.S_IMODE(place.lstat().st_mode) | stat.S_IRWXU)
    shutil.rmtree(path)  # by folder descriptors: a link swapped in meanwhile is not followed


def discard(path: Path) -> None:
    """`remove` for clean-up after a failure: what can't be removed is left, since the failure is what matters."""
    with contextlib.suppress(OSError):
        _remove(path)
