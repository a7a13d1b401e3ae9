"""A model or a data set on the Hugging Face hub: one commit, allow-listed files, each byte checked by the listing.

The revision is resolved once and the commit used for everything after. Small files come first, so that a model that is
refused costs kilobytes. `huggingface_hub` checks sizes only (its issue #3643), so each file is hashed here; wrong bytes
are set aside, fetched once more, then refused. Downloads land in the normal Hugging Face cache (`HF_HOME`), where
other tools find them. Talks to the network only through `edgepack/hub_child.py`; knows nothing of architectures.

Source: huggingface_hub docs, "Understand caching", "Environment variables"; API `GET /api/models/{id}/revision/{r}`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgepack import config_lint, model_folder, strict_json, weight_files
from edgepack.digest import digest
from edgepack.errors import FetchError, InputRefused, StorageError, UsageError
from edgepack.hub_cache import (
    COMMIT,
    MODEL,
    Kind,
    cache_folder,
    is_offline,
    offline_files,
    offline_snapshot,
    snapshot,
    write_ref,
)
from edgepack.hub_process import HubProcess
from edgepack.worker import Progress, no_progress

# The hub's own rules: at most 96 characters a part, no "--", no ".." (huggingface_hub/utils/_validators.py).
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")


@dataclass(frozen=True)
class Listed:
    """One file as the hub lists it: name, bytes, and the checksum it has (sha256 for LFS files, else git's blob id)."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Fetched:
    """A model, or the files of a data set, complete and checked in the Hugging Face cache.

    Args:
        path: The snapshot folder.
        commit: 40 hexadecimal digits.
        gated: False, "auto" or "manual" as the hub says; None when not known (offline).
        files: Name -> sha256 of every file of the model, or of those wanted of the data set.
    """

    path: Path
    commit: str
    gated: bool | str | None
    files: dict[str, str]


def parse_id(text: str) -> tuple[str, str] | None:
    """Split `org/name` or `org/name@revision` into id and revision (default `main`); None when it is neither."""
    match = _ID.fullmatch(text)
    if match is None or "--" in match[1] or match[1].endswith((".git", ".gguf", "-", ".")) or ".." in (match[2] or ""):
        return None
    return match[1], match[2] or "main"


def fetch(
    id: str, revision: str, *, check: Callable[[dict[str, Any]], None] | None = None, progress: Progress = no_progress
) -> Fetched:
    """Bring a model into the local cache and check every byte of it.

    Args:
        id: `org/name`.
        revision: Branch, tag or commit; resolved once.
        check: Called with the linted config.json before any weight is downloaded; raises to refuse the model.
        progress: Called with (bytes here, bytes of the model).

    Returns:
        The snapshot folder, its commit, and the sha256 of its files.

    Raises:
        FetchError: Network, access, rate limit, no such model or revision, offline without a full copy.
        InputRefused: The bytes are not those the hub lists, twice; unsafe names; a config that is refused.
        StorageError: The cache can't be written or is full.
        UsageError: `HF_ENDPOINT` is not an https address.
    """
    _check_endpoint(os.environ.get("HF_ENDPOINT"))
    if is_offline():
        return _offline(id, revision, check)
    with HubProcess() as hub:
        info = hub.call("info", id=id, revision=revision)
        commit, listed = _checked_listing(info, f"{id}@{revision}")
        download = _Download(hub, id, commit, listed, progress)
        names = list(listed)
        small = [name for name in names if model_folder.is_allowed(name) and not model_folder.WEIGHTS.fullmatch(name)]
        weight_files.select(names, lambda: {"": weight_files.SINGLE_FILE}, id)  # refuse pickles before any download
        for name in small:
            download.one(name)
        folder = snapshot(id, commit)
        weights = _lint(folder, names, id, check)
        for name in weights:
            if name not in listed:
                raise FetchError(f"{id} at {commit[:12]}: the index names {name}, and the repository has no such file")
        download.expect([*small, *weights])
        for name in weights:
            download.one(name)
    write_ref(id, revision, commit)
    gated = info.get("gated")
    return Fetched(folder, commit, gated if isinstance(gated, bool | str) else None, download.sha256)


def fetch_dataset(
    id: str,
    revision: str,
    *,
    wanted: Callable[[str], bool],
    file: str | None = None,
    most_bytes: int,
    progress: Progress = no_progress,
) -> Fetched:
    """Bring files of a data set into the local cache and check every byte of them.

    Args:
        id: `org/name`.
        revision: Branch, tag or commit; resolved once.
        wanted: Says of a name in the repository whether it is fetched.
        file: One name; None fetches every wanted one. Offline it must be given: the cache does not say what else a
            data set has.
        most_bytes: Refuse, before any download, what is larger.
        progress: Called with (bytes here, bytes of all files).

    Returns:
        The snapshot folder, its commit, and the sha256 of the files, by name.

    Raises:
        FetchError, StorageError, UsageError: As `fetch`.
        InputRefused: Nothing wanted is in it, it is too large, or as `fetch`.
    """
    _check_endpoint(os.environ.get("HF_ENDPOINT"))
    kind = Kind("dataset", wanted)
    if is_offline():
        return _offline_dataset(id, revision, kind, file)
    with HubProcess() as hub:
        info = hub.call("info", id=id, revision=revision, kind=kind.word)
        commit, listed = _checked_listing(info, f"{id}@{revision}", kind)
        names = sorted(name for name in listed if wanted(name) and file in (None, name))
        if not names:
            kinds = ", ".join(sorted({Path(name).suffix or name for name in listed}))[:120]
            raise InputRefused(
                f"data set {id} has no {file or 'text file'} that can be read; it has {kinds}",
                hint="Expected .txt, .md or .jsonl. Tables (.parquet, .csv) turn into .jsonl with the `datasets`"
                " library: load_dataset(...).to_json(FILE); give that file.",
            )
        size = sum(listed[name].size for name in names)
        if size > most_bytes:
            raise InputRefused(
                f"data set {id}: {len(names)} files with {size:,} bytes of text, expected at most {most_bytes:,}",
                hint=f"Name one file: hub:{id}:{min(names, key=lambda name: listed[name].size)}",
            )
        download = _Download(hub, id, commit, listed, progress, kind)
        download.expect(names)
        for name in names:
            download.one(name)
    write_ref(id, revision, commit, kind)
    gated = info.get("gated")
    return Fetched(
        snapshot(id, commit, kind), commit, gated if isinstance(gated, bool | str) else None, download.sha256
    )


def _lint(folder: Path, names: list[str], id: str, check: Callable[[dict[str, Any]], None] | None) -> tuple[str, ...]:
    """Check the configuration and the index of a snapshot that has no weights yet; returns the weight files."""
    config_path = model_folder.locate(folder, "config.json")
    if config_path is None:
        raise InputRefused(f"{id}: no config.json", hint="Is this a transformers model?")
    config = strict_json.parse_object(model_folder.read_capped(config_path, 1 << 20), f"{id}: config.json")
    config_lint.lint_config(config, f"{id}: config.json")
    if check is not None:
        check(config)

    def weight_map() -> dict[str, str]:
        index = model_folder.locate(folder, weight_files.INDEX_FILE)
        if index is None:
            raise FetchError(f"{id}: {weight_files.INDEX_FILE} is missing in {folder}")
        return weight_files.parse_index(
            model_folder.read_capped(index, weight_files.MAX_INDEX_BYTES), f"{id}: {weight_files.INDEX_FILE}"
        )

    return weight_files.select(names, weight_map, id)


class _Download:
    """Fetches files of one commit, checks each, and counts bytes."""

    def __init__(
        self,
        hub: HubProcess,
        id: str,
        commit: str,
        listed: Mapping[str, Listed],
        progress: Progress,
        kind: Kind = MODEL,
    ) -> None:
        self.sha256: dict[str, str] = {}
        self._hub, self._id, self._commit, self._listed, self._progress = hub, id, commit, listed, progress
        self._kind, self._folder = kind, snapshot(id, commit, kind)
        self._done = self._total = 0

    def expect(self, names: list[str]) -> None:
        """Set the total of the progress, and refuse at once what the disk can't hold."""
        self._total = sum(self._listed[name].size for name in names)
        missing = sum(self._listed[name].size for name in names if not (self._folder / name).exists())
        free = shutil.disk_usage(_existing(self._folder)).free
        if missing > free:
            raise StorageError(
                f"{self._id} needs {missing / 1e9:.1f} GB more in {cache_folder()}, and {free / 1e9:.1f} GB are free",
                hint="Free some space, or set HF_HOME to a larger disk.",
            )

    def one(self, name: str) -> None:
        """Fetch one file; wrong bytes are set aside and fetched once more.

        Raises:
            InputRefused: Wrong bytes twice.
        """
        start, file = self._done, self._listed[name]
        for last in (False, True):
            self._done = start
            request = {"id": self._id, "commit": self._commit, "file": name, "kind": self._kind.word}
            path = Path(self._hub.call("fetch", counting=self._count, **request)["path"])
            problem = self._problem(path, file)
            if problem is None:
                break
            _set_aside(path)
            if last:
                raise InputRefused(
                    f"{self._id} at {self._commit[:12]}: {name} {problem}, twice",
                    hint="The server or a proxy on the way sends other bytes than the hub lists; do not use them.",
                )
        self._done = start + file.size
        self._progress(self._done, max(self._total, self._done))

    def _count(self, received: int) -> None:
        self._done += received
        if self._total:
            self._progress(min(self._done, self._total), self._total)

    def _problem(self, path: Path, file: Listed) -> str | None:
        real = model_folder.locate(self._folder, file.name, self._kind.allowed)
        if real is None or path.resolve() != real:
            raise FetchError(f"{self._id}: {file.name} was stored at {path}, which is not where it belongs")
        found = digest(real, blob_id=file.sha256 is None)
        self.sha256[file.name] = found.sha256
        if found.size != file.size:
            return f"has {found.size:,} bytes where the hub lists {file.size:,}"
        if file.sha256 is not None:
            return None if found.sha256 == file.sha256 else "has the right size and the wrong sha256"
        return None if found.blob_id == file.blob_id else "has the right size and the wrong git blob id"


def _set_aside(path: Path) -> None:
    """Take wrong bytes out of the cache: the snapshot entry goes, the blob is kept under another name to look at."""
    try:
        real = path.resolve(strict=True)
        if path.is_symlink():
            link = path.parent / path.readlink()
            path.unlink()
            if link.is_symlink():  # into the store all repositories share
                link.unlink()
        real.replace(real.with_name(f"{real.name}.wrong"))
    except OSError as error:
        raise StorageError(f"{path}: wrong bytes can't be set aside: {error.strerror}") from error


def _checked_listing(info: Mapping[str, Any], where: str, kind: Kind = MODEL) -> tuple[str, dict[str, Listed]]:
    commit, files = info.get("commit"), info.get("files")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise FetchError(f"{where}: the hub gave {str(commit)[:60]!r} where a commit was expected")
    if not isinstance(files, list) or not files:
        raise FetchError(f"{where}: the hub lists no files")
    listed = {}
    for file in files:
        name = str(file["name"])
        if name.startswith(("/", "\\")) or {"..", "."} & set(re.split(r"[/\\]", name)) or not name.isprintable():
            raise InputRefused(f"{where}: the repository lists a file named {name[:100]!r}")
        if not kind.allowed(name):
            listed[name] = Listed(name, 0, None, None)
            continue
        sha256, blob_id, size = file.get("sha256"), file.get("blob_id"), file.get("size")
        if not (_is_hex(sha256, 64) or (sha256 is None and _is_hex(blob_id, 40))) or type(size) is not int or size < 0:
            raise FetchError(
                f"{where}: the hub gives no size and checksum for {name}, so it can't be checked",
                hint="Check HF_ENDPOINT: not every mirror passes them on.",
            )
        listed[name] = Listed(name, size, sha256, blob_id)
    return commit, listed


def _is_hex(text: Any, digits: int) -> bool:
    return isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) is not None


def _offline(id: str, revision: str, check: Callable[[dict[str, Any]], None] | None) -> Fetched:
    """The model from the cache alone, each file checked against the checksum its blob is named after."""
    folder = offline_snapshot(id, revision, MODEL)
    names = model_folder.entries(folder)
    weights = _lint(folder, names, id, check)
    others = [name for name in model_folder.allowed_files(folder) if not model_folder.WEIGHTS.fullmatch(name)]
    return Fetched(folder, folder.name, None, offline_files(id, folder, [*others, *weights], MODEL))


def _offline_dataset(id: str, revision: str, kind: Kind, file: str | None) -> Fetched:
    """One file of a data set from the cache alone."""
    folder = offline_snapshot(id, revision, kind)
    if file is None:
        raise FetchError(
            f"data set {id}: offline, so the hub can't say which files it has",
            hint=f"Name one that is in the cache, hub:{id}:FILE, or unset HF_HUB_OFFLINE.",
        )
    return Fetched(folder, folder.name, None, offline_files(id, folder, [file], kind))


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _check_endpoint(endpoint: str | None) -> None:
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise UsageError(
            f"HF_ENDPOINT={endpoint[:100]!r}: expected an https:// address",
            hint="http:// is accepted for localhost only.",
        )
    if parts.username or parts.password:
        raise UsageError("HF_ENDPOINT carries a user name or password", hint="Put the token into HF_TOKEN.")
