"""Where a source was last seen on this machine, so that `validate` finds it again.

A package names its source by sha256 and never by a path of somebody's machine. The store keeps the other half: which
folder held those files. An entry is a hint: whoever uses it checks the files again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgepack.source import Source
    from edgepack.store import Store

FOLDER = "sources"


def remember(store: Store, source: Source) -> None:
    """Note where `source` lies."""
    from edgepack.files import write_atomic

    entry = _entry(store, source.files)
    entry.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(entry, json.dumps({"path": str(source.path.resolve())}).encode())


def find(store: Store, files: Mapping[str, str]) -> Path | None:
    """The place where files with these digests were last seen, if something is still there."""
    entry = _entry(store, files)
    if not entry.is_file():
        return None
    path = Path(json.loads(entry.read_text(encoding="utf-8"))["path"])
    return path if path.exists() else None


def _entry(store: Store, files: Mapping[str, str]) -> Path:
    from edgepack.canonical import digest

    return store.root / FOLDER / f"{digest(dict(files))}.json"
