"""The Hugging Face cache: where it is, which commit a revision was, and what can be had from it without a network.

Layout of huggingface_hub, shared with other tools: `models--org--name/{blobs,refs,snapshots/<commit>}`, `datasets--...`
for data sets. Knows nothing of downloads.

Source: huggingface_hub docs, "Understand caching", "Environment variables".
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepack import model_folder
from edgepack.digest import digest
from edgepack.errors import FetchError, InputRefused

COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE_HINT = "Unset HF_HUB_OFFLINE to download it."


@dataclass(frozen=True)
class Kind:
    """A kind of repository: the hub's word for it, and which names in it may be read."""

    word: str
    allowed: Callable[[str], bool]


MODEL = Kind("model", model_folder.is_allowed)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps models: `HF_HUB_CACHE`, else `HF_HOME`/hub, else `XDG_CACHE_HOME`, else ~/.cache."""
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    default = environment.get("HF_HOME") or os.path.join(home, "huggingface")  # noqa: PTH118 (a string to expand)
    text = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{default}/hub"
    return Path(os.path.expandvars(text)).expanduser()


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """True when `HF_HUB_OFFLINE` (or transformers' `TRANSFORMERS_OFFLINE`) is set."""
    return (environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def offline_snapshot(id: str, revision: str, kind: Kind) -> Path:
    """The folder of a revision in the cache."""
    commit = revision
    if not COMMIT.fullmatch(revision):
        ref = repository(id, kind) / "refs" / revision
        commit = ref.read_text(encoding="ascii", errors="replace").strip() if ref.is_file() else ""
        if not COMMIT.fullmatch(commit):
            raise FetchError(f"{id}: offline, and revision {revision!r} is not in {cache_folder()}", hint=_OFFLINE_HINT)
    folder = snapshot(id, commit, kind)
    if not folder.is_dir():
        raise FetchError(f"{id}: offline, and commit {commit[:12]} is not in {cache_folder()}", hint=_OFFLINE_HINT)
    return folder


def offline_files(id: str, folder: Path, names: list[str], kind: Kind) -> dict[str, str]:
    """sha256 of files in the cache, each checked."""
    sha256, where = {}, f"{id} at {folder.name[:12]}"
    for name in names:
        real = model_folder.locate(folder, name, kind.allowed)
        if real is None:
            raise FetchError(f"{where}: offline, and {name} is not in the cache", hint=_OFFLINE_HINT)
        found = digest(real, blob_id=True)
        sha256[name] = found.sha256
        # The blob is named after its ETag: sha256 for LFS files, git's blob id for others.
        named = (folder / name).readlink().name if (folder / name).is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", named) and named not in (found.sha256, found.blob_id):
            raise InputRefused(f"{where}: the cached {name} has other bytes than its checksum says", hint=_OFFLINE_HINT)
    return sha256


def repository(id: str, kind: Kind = MODEL) -> Path:
    """The folder of a repository in the cache."""
    return cache_folder() / f"{kind.word}s--{id.replace('/', '--')}"


def snapshot(id: str, commit: str, kind: Kind = MODEL) -> Path:
    """The folder of one commit of a repository."""
    return repository(id, kind) / "snapshots" / commit


def write_ref(id: str, revision: str, commit: str, kind: Kind = MODEL) -> None:
    """Remember which commit the revision was, as huggingface_hub does, so that offline runs can resolve it."""
    if revision == commit:
        return
    ref = repository(id, kind) / "refs" / revision
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=ref.parent, delete=False, encoding="ascii") as file:
            file.write(commit)
        Path(file.name).replace(ref)
    except OSError:
        # A cache that can't be written still serves this run; only `HF_HUB_OFFLINE` by branch name won't find it.
        with contextlib.suppress(OSError, NameError):
            Path(file.name).unlink()
