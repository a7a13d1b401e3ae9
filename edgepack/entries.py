"""The folder of one finished step: its manifest, and the check that decides whether it is whole.

    <key>/MANIFEST.json   schema_version, key, name, inputs, files (path, size, sha256); written last
    <key>/...             what the step made: regular files, in folders if it likes

Nothing is believed: a manifest that does not parse, inputs that do not give the key, a link, another size, another hash
each make the entry `Damaged`. Does not know where entries live or how they come to be; that is `store.py`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgepack.canonical import canonical_json, digest
from edgepack.errors import InputRefused, StepError, StorageError
from edgepack.files import sha256_of, storage_errors, sync_file, sync_folder, sync_tree
from edgepack.strict_json import parse_object

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 1

_MANIFEST_BYTES = 64 << 20  # some 400,000 files; more is no manifest of ours

# Reasons not to be able to read a file that say nothing of the file.
_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}

Places = Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class FileRecord:
    """One file of an entry.

    Args:
        size: In bytes.
        sha256: Hexadecimal.
        path: Where it is now: in the entry, or where it was released to.
    """

    size: int
    sha256: str
    path: Path


class Damaged(Exception):
    """The entry is not what was committed; the text says in what."""


class Released(Damaged):
    """A file that was released is no longer, or no longer unchanged, where it went: nobody's fault."""


def key_of(name: str, inputs: Mapping[str, Any]) -> str:
    """The name of the entry: SHA-256 of the canonical JSON of a step's name and inputs."""
    return digest({"name": name, "inputs": inputs})


def seal(folder: Path, name: str, inputs: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Record what a step has made in `folder`, flush all of it to the disk, and write the manifest, last.

    Raises:
        StepError: No file, a link, a special file, or a name that is no text.
        StorageError: The file system refused.
    """
    with storage_errors(folder):
        records = {path.relative_to(folder).as_posix(): path for path in _made(folder)}
        if not records:
            raise StepError(f"step {name} ended without an error but made no file", hint="Please report this.")
        if MANIFEST in records:
            raise StepError(f"step {name} made a file {MANIFEST}, a name that the store keeps for itself")
        sync_tree(folder)
        files = {
            path: FileRecord(place.lstat().st_size, sha256_of(place), place) for path, place in sorted(records.items())
        }
        document = {
            "schema_version": SCHEMA_VERSION,
            "key": key_of(name, inputs),
            "name": name,
            "inputs": inputs,
            "files": [{"path": path, "size": file.size, "sha256": file.sha256} for path, file in files.items()],
        }
        (folder / MANIFEST).write_bytes(canonical_json(document))
        sync_file(folder / MANIFEST)
        sync_folder(folder)
    return files


def _made(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, onerror=_raise):
        for name in [*folders, *names]:
            path = Path(place, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            shown = os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise StepError(f"a step made {shown!r}, which is a link or a special file; expected regular files")
            if not _is_text(path.relative_to(folder).as_posix()):
                raise StepError(f"a step made {shown!r}, whose name is not UTF-8")
            yield path


def _raise(error: OSError) -> None:
    raise error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read(folder: Path, released: Places) -> dict[str, FileRecord]:
    """Check every byte of the entry in `folder` against its manifest.

    Args:
        folder: The entry; its last part is the key.
        released: For files that were released, where to, latest first.

    Returns:
        The files by the name they were made with.

    Raises:
        Damaged: Something is not as it was committed.
        OSError, StorageError: It could not be told: no permission, no file descriptor, no memory.
    """
    listed = _manifest(folder)
    return {path: _check(folder, path, size, sha256, released.get(path, ())) for path, (size, sha256) in listed.items()}


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    path = folder / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > _MANIFEST_BYTES:
            raise Damaged(f"{MANIFEST} is a link, no regular file, or too large")
        data = path.read_bytes()
        document = parse_object(data, MANIFEST)
        if document.get("schema_version") != SCHEMA_VERSION:
            found = document.get("schema_version")
            raise Damaged(f"{MANIFEST} has schema version {found!r}, this edgepack reads {SCHEMA_VERSION}")
        key = key_of(document["name"], document["inputs"])
        if canonical_json(document) != data or not folder.name == document["key"] == key:
            raise Damaged(f"{MANIFEST} does not give the key of its entry")
        files = {str(row["path"]): (int(row["size"]), str(row["sha256"])) for row in document["files"]}
    except OSError as error:
        if error.errno in _OWN_TROUBLE:
            raise
        raise Damaged(f"{MANIFEST} can't be read: {error.strerror}") from error
    except (InputRefused, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} can't be read: {type(error).__name__}: {error}") from error
    for name in files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != name or name == MANIFEST:
            raise Damaged(f"{MANIFEST} names a file {name!r}")
    return files


def _check(folder: Path, name: str, size: int, sha256: str, released: Sequence[Path]) -> FileRecord:
    place = folder / name
    if released and not os.path.lexists(place):
        for elsewhere in released:
            if not _difference(elsewhere, size, sha256, links=True):
                return FileRecord(size, sha256, elsewhere)
        raise Released(f"{name} is gone or changed where it was released to: {', '.join(map(str, released))}")
    for parent in PurePosixPath(name).parents:
        if (folder / parent).is_symlink():
            raise Damaged(f"{parent} is a link")
    # A release links a file before it takes it out: a second name is expected then.
    if problem := _difference(place, size, sha256, links=bool(released)):
        raise Damaged(f"{name} {problem}")
    return FileRecord(size, sha256, place)


def _difference(path: Path, size: int, sha256: str, *, links: bool) -> str:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        if status.st_nlink != 1 and not links:
            return f"has {status.st_nlink} hard links"
        if status.st_size != size:
            return f"has {status.st_size} bytes, {size} were written"
        found = sha256_of(path)
    except FileNotFoundError:
        return "is missing"
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _OWN_TROUBLE:
            raise
        return f"can't be read: {error}"
    return "" if found == sha256 else f"has sha256 {found[:12]}..., {sha256[:12]}... was written"
