"""Is every byte of a package what its manifest says, and nothing else there: with the standard library alone.

Refused, each by name: a file that is missing, extra or changed; a symbolic link, a hard link, a device, a FIFO or
socket; an empty folder; a mode no ordinary copy makes; a manifest, a SHA256SUMS or a digest that disagree; a manifest
of a newer schema. What this can't see: a package forged as a whole, manifest included: pin `package_digest` for that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack import strict_json
from edgepack.canonical import canonical_json
from edgepack.errors import InputRefused, UsageError
from edgepack.package.layout import (
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    SUMS,
    VALIDATION,
    mode_problem,
    sums_text,
)
from edgepack.package.manifest import artifact_digest, manifest_problems, package_digest

_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        path: The package folder.
        problems: One sentence each, starting with the file; empty when the package is whole.
        files: How many files were checked, and
        size: their bytes.
        package_digest: As computed from the manifest; None when the manifest can't be read.
    """

    path: Path
    problems: tuple[str, ...]
    files: int = 0
    size: int = 0
    package_digest: str | None = None

    @property
    def whole(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems

    def require(self) -> None:
        """Raise unless the package is whole.

        Raises:
            InputRefused: With the first problem and the number of others.
        """
        error = self.error()
        if error is not None:
            raise error

    def error(self) -> InputRefused | None:
        """The first problem and the number of others as an error; None when the package is whole."""
        if not self.problems:
            return None
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return InputRefused(f"{self.path}: {self.problems[0]}{more}", hint="Get the package again from where it came.")


def verify(path: str | Path) -> Verification:
    """Check a package.

    Args:
        path: The package folder.

    Returns:
        Every problem found. `edgepack verify` ends with exit code 5 when there is one.

    Raises:
        UsageError: No such folder, or a file.
    """
    root = Path(path)
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: a file, expected a package folder", hint="Give the folder that holds edgepack.json.")
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder", hint="Give the folder that holds edgepack.json.")
    problems: list[str] = []
    present, regular = _walk(root, problems)
    hashes = _Hashes(root, problems)
    manifest = _manifest(root, regular, hashes, problems)
    if manifest is None:
        return Verification(root, tuple(problems))
    own = {MANIFEST, SUMS}
    listed = {record["path"]: record for record in manifest["files"]}
    problems += [f"{_shown(name)}: extra, the manifest does not list it" for name in sorted(present - own - {*listed})]
    problems += [f"{name}: missing" for name in sorted((own | {*listed}) - present)]
    for name in sorted(regular & set(listed)):
        _compare(listed[name], hashes.of(name), problems)
    _check_sums(listed, hashes, SUMS in regular, problems)
    _check_digests(manifest, problems)
    if VALIDATION in regular:
        _check_verdict(manifest, hashes.small(VALIDATION), problems)
    size = sum(record["size"] for record in manifest["files"])
    return Verification(root, tuple(problems), len(listed), size, package_digest(manifest))


def _walk(root: Path, problems: list[str]) -> tuple[set[str], set[str]]:
    """Every entry that is no folder, and those of them that are plain files of one link; odd ones become problems."""
    present: set[str] = set()
    regular: set[str] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            problems.append(f"{_shown(folder)}: can't be read: {error.strerror}")
            continue
        if folder and not found:
            problems.append(f"{_shown(folder)}: an empty folder")
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                folders.append(name)
                problems += [f"{_shown(name)}: {reason}" for reason in [mode_problem(status)] if reason]
                continue
            present.add(name)
            odd = _odd(status)
            if odd:
                problems.append(f"{_shown(name)}: {odd}")
            if stat.S_ISREG(status.st_mode):
                regular.add(name)
        if len(present) + len(folders) > 2 * MAX_FILES:
            problems.append(f"more than {2 * MAX_FILES:,} entries: this is no package")
            break
    return present, regular


def _odd(status: os.stat_result) -> str | None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        return f"{_KINDS.get(kind, 'a special file')}, expected a regular file"
    if status.st_nlink > 1:
        return f"has {status.st_nlink} hard links, expected 1: another name can change it"
    return mode_problem(status)


def _shown(name: str) -> str:
    """A path for a message: as it stands when plain, escaped when not."""
    return name if name.isprintable() and "\\" not in name else ascii(name)


class _Hashes:
    """Size and sha256 of files, each read once, never through a link."""

    def __init__(self, root: Path, problems: list[str]) -> None:
        self._root = root
        self._problems = problems
        self._known: dict[str, tuple[int, str] | None] = {}

    def of(self, name: str) -> tuple[int, str] | None:
        """Size and sha256, or None (and a problem) when the file can't be read."""
        if name not in self._known:
            try:
                self._known[name] = self._read(name)
            except OSError as error:
                self._problems.append(f"{_shown(name)}: can't be read: {error.strerror}")
                self._known[name] = None
        return self._known[name]

    def small(self, name: str) -> bytes:
        """The first bytes of a file, up to the cap of a manifest; empty when it can't be read."""
        data = b""
        with contextlib.suppress(OSError), self._open(name) as descriptor:
            while len(data) < MAX_MANIFEST_BYTES and (chunk := os.read(descriptor, _CHUNK)):
                data += chunk
        return data

    def _read(self, name: str) -> tuple[int, str]:
        state, size = hashlib.sha256(), 0
        with self._open(name) as descriptor:
            while chunk := os.read(descriptor, _CHUNK):
                state.update(chunk)
                size += len(chunk)
        return size, state.hexdigest()

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[int]:
        # O_NONBLOCK: a FIFO put there since the walk must not hang the open.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self._root / name, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)


def _manifest(root: Path, regular: set[str], hashes: _Hashes, problems: list[str]) -> dict[str, Any] | None:
    """The manifest if its form is right; else every reason is a problem and nothing more can be checked."""
    if MANIFEST not in regular:
        problems.append(f"{MANIFEST}: missing: this is no package")
        return None
    if (root / MANIFEST).lstat().st_size > MAX_MANIFEST_BYTES:
        problems.append(f"{MANIFEST}: larger than {MAX_MANIFEST_BYTES:,} bytes")
        return None
    try:
        data = hashes.small(MANIFEST)
        manifest = strict_json.parse_object(data, MANIFEST)
    except InputRefused as error:
        problems.append(error.message)
        return None
    reasons = manifest_problems(manifest)
    if not reasons and data != canonical_json(manifest):
        problems.append(f"{MANIFEST}: is not canonical JSON (RFC 8785): edited after it was written")
    problems += [f"{MANIFEST}: {reason}" for reason in reasons]
    return None if reasons else manifest


def _compare(record: Mapping[str, Any], actual: tuple[int, str] | None, problems: list[str]) -> None:
    if actual is None:
        return
    size, sha256 = actual
    if size != record["size"]:
        problems.append(f"{record['path']}: changed: {size:,} bytes, the manifest says {record['size']:,}")
    elif sha256 != record["sha256"]:
        problems.append(
            f"{record['path']}: changed: sha256 {sha256[:16]}..., the manifest says {record['sha256'][:16]}..."
        )


def _check_sums(listed: Mapping[str, Any], hashes: _Hashes, there: bool, problems: list[str]) -> None:
    """SHA256SUMS must be, byte for byte, what follows from the manifest and the manifest's own digest."""
    own = hashes.of(MANIFEST)
    if not there or own is None:
        return
    expected = sums_text({MANIFEST: own[1]} | {path: record["sha256"] for path, record in listed.items()})
    found = hashes.small(SUMS)
    if found == expected.encode():
        return
    have, want = set(found.decode("utf-8", "replace").splitlines()), set(expected.splitlines())
    paths = sorted({line.partition("  ")[2] or line for line in have ^ want})
    names = ", ".join(_shown(path)[:120] for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
    problems.append(f"{SUMS}: disagrees with {MANIFEST}" + (f" on {names}" if paths else " in order or white space"))


def _check_digests(manifest: Mapping[str, Any], problems: list[str]) -> None:
    for key, computed in (
        ("artifact_digest", artifact_digest(manifest["files"])),
        ("package_digest", package_digest(manifest)),
    ):
        if manifest[key] != computed:
            problems.append(
                f"{MANIFEST}: {key} is {manifest[key][:23]}..., the manifest's content gives {computed[:23]}..."
            )


def _check_verdict(manifest: Mapping[str, Any], data: bytes, problems: list[str]) -> None:
    try:
        validation = strict_json.parse_object(data, VALIDATION)
    except InputRefused as error:
        problems.append(error.message)
        return
    if validation.get("verdict") != manifest["verdict"]:
        found = ascii(validation.get("verdict"))[:40]
        problems.append(f"{VALIDATION}: verdict {found}, the manifest says {manifest['verdict']!r}")
