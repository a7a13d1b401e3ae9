"""Which files of a model folder may be touched, and how: an allow-list, regular files only, no link out of the folder.

Everything else in the folder (`*.bin`, `onnx/`, `*.py`, images) is never opened. Links are resolved once; the one
layout where they legitimately leave the folder is the Hugging Face cache, `snapshots/<commit>/f -> ../../blobs/<etag>`,
and there the target must be in that repository's own `blobs` or in the store that the repositories of one cache share.
Knows nothing of what the files say. Source of the layout: huggingface_hub docs, "Understand caching".
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from edgepack.errors import InputRefused, StorageError

MAX_ENTRIES = 20_000  # a model folder holds tens of files; a folder with more is something else

_PLAIN = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"
WEIGHTS = re.compile(rf"{_PLAIN}\.safetensors")
ALLOWED = re.compile(
    "|".join(
        (
            WEIGHTS.pattern,
            rf"{_PLAIN}\.safetensors\.index\.json",
            r"config\.json|generation_config\.json|special_tokens_map\.json|added_tokens\.json|preprocessor_config\.json",
            r"(tokenizer|vocab)[A-Za-z0-9._-]{0,100}\.(json|txt)|merges\.txt",
            rf"{_PLAIN}\.(jinja|model)",
            # sentence-transformers: which modules follow the encoder (pooling, normalisation)
            r"modules\.json|[0-9]_[A-Za-z]{1,40}/(config\.json|model\.safetensors)",
            r"config_sentence_transformers\.json|sentence_[a-z]{1,20}_config\.json",
            r"(LICENSE|LICENCE|COPYING|NOTICE|README|USE_POLICY)[A-Za-z0-9._-]{0,40}",
        )
    )
)
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
PICKLES = re.compile(r".+\.(bin|pt|pth|ckpt|pkl|pickle)", re.IGNORECASE)


def is_allowed(name: str) -> bool:
    """True when `name` (relative, `/` between parts) is a file edgepack may read."""
    return ALLOWED.fullmatch(name) is not None


def allowed_files(folder: Path) -> Iterator[str]:
    """Names of the allow-listed entries of `folder`; one level of sub-folders for sentence-transformers.

    Raises:
        InputRefused: The folder can't be listed or holds more than `MAX_ENTRIES` entries.
    """
    names = []
    for name in entries(folder):
        if is_allowed(name):
            names.append(name)
        elif re.fullmatch(r"[0-9]_[A-Za-z]{1,40}", name) and (folder / name).is_dir():
            inner = (f"{name}/config.json", f"{name}/model.safetensors")
            names += [path for path in inner if os.path.lexists(folder / path)]
    yield from names


def entries(folder: Path) -> list[str]:
    """Names of all entries, sorted.

    Raises:
        InputRefused: The folder can't be listed or holds more than `MAX_ENTRIES` entries.
    """
    names: list[str] = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                names.append(entry.name)
                if len(names) > MAX_ENTRIES:
                    raise InputRefused(f"{folder}: more than {MAX_ENTRIES} entries, which is no model folder")
    except OSError as error:
        raise InputRefused(f"{folder}: can't be listed: {error.strerror}") from error
    return sorted(names)


def locate(folder: Path, name: str, allowed: Callable[[str], bool] = is_allowed) -> Path | None:
    """Find a file of the folder, through links that stay inside.

    Args:
        folder: The model folder; it may itself be reached through a link, that is the user's choice.
        name: Relative name, on the allow-list.
        allowed: The allow-list; that of models by default.

    Returns:
        The real path of a regular file, or None when there is no such entry.

    Raises:
        InputRefused: The name is not on the allow-list, a link leaves the folder or leads nowhere, not a regular file.
    """
    if not allowed(name):
        raise InputRefused(f"{folder}: {name[:100]!r} is not a file name edgepack reads")
    path = folder / name
    try:
        os.lstat(path)
        real = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
        raise InputRefused(
            f"{path}: a link to a file that does not exist ({str(path.readlink())[:200]!r})",
            hint="The download is incomplete; fetch the model again.",
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise InputRefused(f"{path}: can't be resolved: {error}") from error
    home = folder.resolve()
    if real != home / name and not _is_home(real, home):
        raise InputRefused(
            f"{path}: a link that leaves the model folder (to {real})",
            hint="Copy the file into the folder, or remove the link.",
        )
    mode = real.stat().st_mode
    if not stat.S_ISREG(mode):
        raise InputRefused(f"{path}: expected a regular file, found a {_kind(mode)}")
    return real


def _is_home(real: Path, home: Path) -> bool:
    """True for a file inside the folder, or in the blob store of the Hugging Face cache the folder belongs to."""
    if real.is_relative_to(home):
        return True
    if home.parent.name != "snapshots":
        return False
    repository = home.parent.parent
    if real.parent == repository / "blobs":
        return True
    # In huggingface_hub 2 a blob may be a link into the store all repositories share: <cache>/blobs/<2 hex>/<64 hex>.
    shared = repository.parent / "blobs"
    return real.is_relative_to(shared) and _SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()) is not None


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "named pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    ):
        if test(mode):
            return name
    return "special file"


def open_regular(path: Path) -> BinaryIO:
    """Open a resolved path for reading, unbuffered, refusing what is not a regular file any more.

    Raises:
        InputRefused: The path vanished, became a link or is no regular file.
        StorageError: The file system refused.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            raise InputRefused(f"{path}: changed while it was being read: {error.strerror}") from error
        raise StorageError(f"{path}: can't be opened: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InputRefused(f"{path}: expected a regular file")
    return file


def read_capped(path: Path, limit: int, where: str | None = None) -> bytes:
    """Read a whole small file.

    Args:
        path: A path `locate` gave.
        limit: Largest size accepted, in bytes.
        where: Name for messages; the path by default.

    Raises:
        InputRefused: Larger than `limit`.
        StorageError: The file system refused.
    """
    where = where or str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InputRefused(f"{where}: {size:,} bytes, and at most {limit:,} are accepted")
        data = bytearray(size)
        count = read_into(file, memoryview(data), path)
    return bytes(data[:count])


def read_into(file: BinaryIO, view: memoryview, path: Path) -> int:
    """Fill `view` from the file's position; returns the bytes read, fewer only at the end of the file.

    Raises:
        StorageError: An input/output error.
    """
    done = 0
    try:
        while done < len(view):
            # Linux reads at most 2**31 - 4096 bytes per call; smaller pieces keep Ctrl-C prompt.
            count = file.readinto(view[done : done + (1 << 28)])  # type: ignore[attr-defined]
            if not count:
                break
            done += count
    except OSError as error:
        raise StorageError(f"{path}: can't be read at byte {file.tell()}: {error.strerror}") from error
    return done
