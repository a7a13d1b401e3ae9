"""What the user calls MODEL: a folder, a GGUF file, or `org/name@revision` on the hub; and exactly which bytes it is.

`resolve` finds it (and downloads it if it must), `hash_source` adds the sha256 of every file that can reach the
artifact. Knows nothing of what the files contain.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgepack import hub, licence, model_folder
from edgepack.digest import sha256_of
from edgepack.errors import InputRefused, UsageError
from edgepack.worker import Progress, no_progress

_MAX_CARD_BYTES = 4 << 20
_GGUF_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Source:
    """A model as it was found.

    Args:
        kind: `folder`, `gguf`, or `hub` (a folder of the Hugging Face cache).
        name: Last part of the name, made of `[A-Za-z0-9._-]`; packages are named after it.
        path: The folder, or the GGUF file (the first of a split one).
        id: Hub id.
        revision: As the user gave it; `main` if he gave none.
        commit: What the revision was, 40 hexadecimal digits.
        licence: SPDX identifier, or the model card's word; None when unknown.
        gated: As the hub says: False, "auto", "manual"; None when not known.
        files: Relative name -> sha256; empty until `hash_source`.
    """

    kind: Literal["folder", "gguf", "hub"]
    name: str
    path: Path
    id: str | None = None
    revision: str | None = None
    commit: str | None = None
    licence: str | None = None
    gated: bool | str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def resolve(model: str, progress: Progress = no_progress) -> Source:
    """Find a model.

    Args:
        model: Path of a folder or a .gguf file; an existing path wins. Else a hub id, `org/name` or
            `org/name@revision`.
        progress: Told about a download, in bytes.

    Returns:
        The source; from the hub, with the sha256 of its files.

    Raises:
        UsageError: No such path, and no hub id.
        FetchError: The hub, see `edgepack/hub.py`.
        InputRefused: The model was refused before it was downloaded, or its bytes are wrong.
    """
    path = Path(model)
    kind = _kind(path) if model else None
    if kind == "folder":
        return _local("folder", path)
    if kind == "file" and path.suffix == ".gguf":
        return _local("gguf", path)
    if kind == "file" and model_folder.PICKLES.fullmatch(path.name):
        raise InputRefused(
            f"{model}: a pickle checkpoint, which can run code; edgepack never opens them",
            hint="Give a folder with the weights as *.safetensors.",
        )
    if kind == "file":
        hint = f"Give its folder: {path.parent}" if path.suffix in (".safetensors", ".json") else None
        raise UsageError(f"{model}: expected a model folder, a .gguf file or a hub id, found a file", hint=hint)
    if kind == "special":
        raise InputRefused(f"{model}: expected a model folder or a .gguf file, found a special file")
    parsed = hub.parse_id(model)
    if parsed is None or _looks_local(model, path):
        raise _not_found(model, path)
    id, revision = parsed
    fetched = hub.fetch(id, revision, check=_supported, progress=progress)
    return Source(
        kind="hub",
        name=_plain(id.split("/")[1]),
        path=fetched.path,
        id=id,
        revision=revision,
        commit=fetched.commit,
        licence=_licence(fetched.path),
        gated=fetched.gated,
        files=fetched.files,
    )


def hash_source(source: Source, progress: Progress = no_progress) -> Source:
    """Add the sha256 of every file that can reach the artifact.

    Args:
        source: From `resolve`. A hub source has been hashed while it was checked and comes back as it is.
        progress: Called with (bytes done, bytes of all files).

    Raises:
        InputRefused: A file is missing, a link out of the folder, or changes while it is read.
        StorageError: The file system refused.
    """
    if source.files:
        return source
    files = dict(_gguf_files(source.path) if source.kind == "gguf" else _folder_files(source.path))
    return replace(source, files=sha256_of(files, progress))


def _kind(path: Path) -> Literal["folder", "file", "special"] | None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # no permission, a name too long, a loop of links, a NUL
        if isinstance(error, NotADirectoryError):
            return None
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{str(path)[:200]!r}: can't be used as a path: {reason}") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


def _local(kind: Literal["folder", "gguf"], path: Path) -> Source:
    real = path.resolve()
    name = real.stem if kind == "gguf" else real.name
    id = commit = None
    if kind == "gguf" and (shard := _GGUF_SHARD.fullmatch(real.name)):
        name = shard[1]
    if kind == "folder" and real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        # A snapshot of the Hugging Face cache: its folder name is a commit, the repository's says what it is.
        id, commit = "/".join(real.parent.parent.name.split("--")[1:]), real.name
        name = id.split("/")[-1]
    return Source(
        kind=kind,
        name=_plain(name),
        path=path,
        id=id,
        commit=commit if commit and re.fullmatch(r"[0-9a-f]{40}", commit) else None,
        licence=_licence(path) if kind == "folder" else None,
    )


def _plain(name: str) -> str:
    """A file name every system takes: other characters than `[A-Za-z0-9._-]` become `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:96] or "model"


def _folder_files(folder: Path) -> Iterator[tuple[str, Path]]:
    from edgepack.checkpoint import weight_files

    weights = set(weight_files(folder))
    names = {name for name in model_folder.allowed_files(folder) if not model_folder.WEIGHTS.fullmatch(name)}
    for name in sorted(names | weights):
        real = model_folder.locate(folder, name)
        if real is None:
            raise InputRefused(f"{folder}: {name} is missing", hint="The download is incomplete; fetch it again.")
        yield name, real


def _gguf_files(path: Path) -> Iterator[tuple[str, Path]]:
    shard = _GGUF_SHARD.fullmatch(path.name)
    count = int(shard[3]) if shard else 1
    names = [f"{shard[1]}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)] if shard else [path.name]
    for name in names:
        file = path.parent / name
        if not file.is_file():
            raise InputRefused(f"{file}: missing, one of {count} files of a split GGUF")
        yield name, file.resolve()


def _licence(folder: Path) -> str | None:
    card = model_folder.locate(folder, "README.md")
    if card is not None and card.stat().st_size <= _MAX_CARD_BYTES:
        text = model_folder.read_capped(card, _MAX_CARD_BYTES).decode("utf-8", errors="replace")
        if found := licence.from_card(text):
            return found
    for name in model_folder.allowed_files(folder):
        if name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            file = model_folder.locate(folder, name)
            if file is not None and file.stat().st_size <= _MAX_CARD_BYTES:
                text = model_folder.read_capped(file, _MAX_CARD_BYTES).decode("utf-8", errors="replace")
                if found := licence.from_text(text):
                    return found
    return None


def _supported(config: dict[str, Any]) -> None:
    """Refuse an architecture before its weights are downloaded."""
    from edgepack.checkpoint import Checkpoint
    from edgepack.gguf.architectures import find_architecture

    find_architecture(Checkpoint(Path(), config, {}))


def _looks_local(model: str, path: Path) -> bool:
    """True when a hub id was more likely meant as a path: `./x/y`, `x/y.gguf`, or a misspelt folder that is there."""
    if model.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors"):
        return True
    return "@" not in model and path.parent.is_dir() and bool(_near(path))


def _near(path: Path) -> list[str]:
    try:
        names = [name for name in model_folder.entries(path.parent) if not name.startswith(".")]
    except InputRefused:  # no such folder, not readable, or too many entries to guess among
        return []
    folders = [name for name in names if (path.parent / name).is_dir() or name.endswith(".gguf")]
    return difflib.get_close_matches(path.name, folders, n=1, cutoff=0.7)


def _not_found(model: str, path: Path) -> UsageError:
    hint = "Give a model folder, a .gguf file, or a hub id: org/name or org/name@revision."
    if url := re.match(r"(?:https://huggingface\.co/|hf://(?:models/)?)([^/]+/[^/?#@]+)", model):
        return UsageError(f"{model}: expected a hub id, found an address", hint=f"Give {url[1]}")
    if near := _near(path):
        hint = f"Did you mean {path.parent / near[0]}?"
        if hub.parse_id(model):
            hint += f" (For the model on the hub, give {model}@main.)"
    elif not path.parent.is_dir():
        hint = f"There is no folder {path.parent} either. {hint}"
    return UsageError(f"{model}: no such folder or file, and no hub id", hint=hint)
