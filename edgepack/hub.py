"""A model on the Hugging Face hub: one commit, allow-listed files only, every byte checked against the hub's listing.

The revision is resolved once and the commit used for everything after. Small files come first, so that a model that is
refused costs kilobytes. `huggingface_hub` checks sizes only (its issue #3643), so each file is hashed here; wrong bytes
are set aside, fetched once more, then refused. Downloads land in the normal Hugging Face cache (`HF_HOME`), where
other tools find them. Talks to the network only through `edgepack/hub_child.py`; knows nothing of architectures.

Source: huggingface_hub docs, "Understand caching", "Environment variables"; API `GET /api/models/{id}/revision/{r}`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgepack import config_lint, model_folder, strict_json, weight_files
from edgepack.digest import digest
from edgepack.errors import FetchError, InputRefused, StorageError, UsageError
from edgepack.hub_process import HubProcess
from edgepack.worker import Progress, no_progress

# The hub's own rules: at most 96 characters a part, no "--", no ".." (huggingface_hub/utils/_validators.py).
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Listed:
    """One file as the hub lists it: name, bytes, and the checksum it has (sha256 for LFS files, else git's blob id)."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Fetched:
    """A model that lies, complete and checked, in the Hugging Face cache.

    Args:
        path: The snapshot folder.
        commit: 40 hexadecimal digits.
        gated: False, "auto" or "manual" as the hub says; None when not known (offline).
        files: Name -> sha256 of every file of the model.
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


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps models: `HF_HUB_CACHE`, else `HF_HOME`/hub, else `XDG_CACHE_HOME`, else ~/.cache."""
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    default = environment.get("HF_HOME") or os.path.join(home, "huggingface")  # noqa: PTH118 (a string to expand)
    text = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{default}/hub"
    return Path(os.path.expandvars(text)).expanduser()


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """True when `HF_HUB_OFFLINE` (or transformers' `TRANSFORMERS_OFFLINE`) is set."""
    return (environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


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
        folder = _snapshot(id, commit)
        weights = _lint(folder, names, id, check)
        for name in weights:
            if name not in listed:
                raise FetchError(f"{id} at {commit[:12]}: the index names {name}, and the repository has no such file")
        download.expect([*small, *weights])
        for name in weights:
            download.one(name)
    _write_ref(id, revision, commit)
    gated = info.get("gated")
    return Fetched(folder, commit, gated if isinstance(gated, bool | str) else None, download.sha256)


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

    def __init__(self, hub: HubProcess, id: str, commit: str, listed: Mapping[str, Listed], progress: Progress) -> None:
        self.sha256: dict[str, str] = {}
        self._hub, self._id, self._commit, self._listed, self._progress = hub, id, commit, listed, progress
        self._done = self._total = 0

    def expect(self, names: list[str]) -> None:
        """Set the total of the progress, and refuse at once what the disk can't hold."""
        self._total = sum(self._listed[name].size for name in names)
        folder = _snapshot(self._id, self._commit)
        missing = sum(self._listed[name].size for name in names if not (folder / name).exists())
        free = shutil.disk_usage(_existing(folder)).free
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
            path = Path(
                self._hub.call("fetch", counting=self._count, id=self._id, commit=self._commit, file=name)["path"]
            )
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
        real = model_folder.locate(_snapshot(self._id, self._commit), file.name)
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


def _checked_listing(info: Mapping[str, Any], where: str) -> tuple[str, dict[str, Listed]]:
    commit, files = info.get("commit"), info.get("files")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise FetchError(f"{where}: the hub gave {str(commit)[:60]!r} where a commit was expected")
    if not isinstance(files, list) or not files:
        raise FetchError(f"{where}: the hub lists no files")
    listed = {}
    for file in files:
        name = str(file["name"])
        if name.startswith(("/", "\\")) or {"..", "."} & set(re.split(r"[/\\]", name)) or not name.isprintable():
            raise InputRefused(f"{where}: the repository lists a file named {name[:100]!r}")
        if not model_folder.is_allowed(name):
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
    hint = "Unset HF_HUB_OFFLINE to download it."
    commit = revision
    if not _COMMIT.fullmatch(revision):
        ref = _repository(id) / "refs" / revision
        commit = ref.read_text(encoding="ascii", errors="replace").strip() if ref.is_file() else ""
        if not _COMMIT.fullmatch(commit):
            raise FetchError(f"{id}: offline, and revision {revision!r} is not in {cache_folder()}", hint=hint)
    folder = _snapshot(id, commit)
    if not folder.is_dir():
        raise FetchError(f"{id}: offline, and commit {commit[:12]} is not in {cache_folder()}", hint=hint)
    names = model_folder.entries(folder)
    weights = _lint(folder, names, id, check)
    sha256 = {}
    others = [name for name in model_folder.allowed_files(folder) if not model_folder.WEIGHTS.fullmatch(name)]
    for name in [*others, *weights]:
        real = model_folder.locate(folder, name)
        if real is None:
            raise FetchError(f"{id} at commit {commit[:12]}: offline, and {name} is not in the cache", hint=hint)
        found = digest(real, blob_id=True)
        sha256[name] = found.sha256
        # The blob is named after its ETag: sha256 for LFS files, git's blob id for others.
        named = (folder / name).readlink().name if (folder / name).is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", named) and named not in (found.sha256, found.blob_id):
            raise InputRefused(
                f"{id} at {commit[:12]}: the cached {name} has other bytes than its checksum says", hint=hint
            )
    return Fetched(folder, commit, None, sha256)


def _repository(id: str) -> Path:
    return cache_folder() / f"models--{id.replace('/', '--')}"


def _snapshot(id: str, commit: str) -> Path:
    return _repository(id) / "snapshots" / commit


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _write_ref(id: str, revision: str, commit: str) -> None:
    """Remember which commit the revision was, as huggingface_hub does, so that offline runs can resolve it."""
    if revision == commit:
        return
    ref = _repository(id) / "refs" / revision
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=ref.parent, delete=False, encoding="ascii") as file:
            file.write(commit)
        Path(file.name).replace(ref)
    except OSError:
        # A cache that can't be written still serves this run; only `HF_HUB_OFFLINE` by branch name won't find it.
        with contextlib.suppress(OSError, NameError):
            Path(file.name).unlink()


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
