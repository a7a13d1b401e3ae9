"""Where the large files of an entry went: `released/<key>.json`, written before the file goes there.

A place that is remembered is only looked at, never trusted: `entries.read` hashes what it finds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgepack.canonical import canonical_json
from edgepack.errors import InputRefused
from edgepack.strict_json import parse_object

_PLACES_KEPT = 8  # of a file; each is hashed when the entry is read


class Releases:
    """The records in one folder of a store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, key: str) -> dict[str, list[Path]]:
        """Places of the released files of an entry, latest first. None are known where the record can't be read."""
        path = self._path(key)
        try:
            document = parse_object(path.read_bytes(), str(path))
            return {str(file): [Path(place) for place in places] for file, places in document["files"].items()}
        except (OSError, InputRefused, KeyError, TypeError, AttributeError):
            return {}  # its files are missing then, which makes the entry damaged

    def with_places(self, key: str, file: str, places: Sequence[Path]) -> tuple[Path, bytes]:
        """The record's path, and what to write there so that `places` come before those known of a file."""
        known = self.of(key)
        known[file] = list(dict.fromkeys([*(place.absolute() for place in places), *known.get(file, [])]))[
            :_PLACES_KEPT
        ]
        files = {name: [str(place) for place in its] for name, its in known.items()}
        return self._path(key), (canonical_json({"schema_version": 1, "files": files}))

    def forget(self, key: str) -> None:
        """Remove the record of an entry that is no more."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


def link(source: Path, destination: Path) -> bool:
    """Give a file a second name; False where that can't be: another file system, or one without links.

    Raises:
        FileExistsError: The destination exists.
    """
    try:
        os.link(source, destination, follow_symlinks=False)
        return True
    except FileExistsError:
        raise
    except OSError:
        return False


def took_over(place: Path, own: Path) -> bool:
    """Whether `place` makes the entry's own file superfluous: the same file, or a copy of it on another file system."""
    try:
        there, here = place.lstat(), own.lstat()
    except OSError:
        return False
    return os.path.samestat(there, here) or (there.st_dev != here.st_dev and there.st_size == here.st_size)
