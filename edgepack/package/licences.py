"""LICENSES/: the texts found beside the source, and one page that says what is known and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepack.package.layout import NOTICE, safe_name


def licence_files(source: Mapping[str, Any], texts: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of LICENSES/, always at least the notice.

    Args:
        source: The manifest's `source`.
        texts: File name -> content of the licence files beside the source (`LICENSE`, `NOTICE`, ...).

    Returns:
        Path in the package -> content.
    """
    files = {f"LICENSES/{safe_name(name)}": data for name, data in sorted(texts.items())}
    stated = source.get("licence")
    origin = source.get("id") or source.get("name")
    commit = f" at commit {source['commit']}" if source.get("commit") else ""
    lines = [
        f"The model in this package was made from {one_line(origin)}{commit}.",
        f"Licence stated by the source: {one_line(stated)}."
        if stated
        else "The source states no licence. Without one you have no right to pass the model on: ask its authors.",
        "Its texts, as found beside the source: " + ", ".join(path.rpartition("/")[2] for path in files) + "."
        if files
        else "No licence text was found beside the source.",
        "Quantizing changes the form of a model, not its terms: they hold for this package as for the source.",
    ]
    if NOTICE in files:  # the source's own NOTICE.txt keeps its name
        return files | {"LICENSES/EDGEPACK-NOTICE.txt": _page(lines)}
    return files | {NOTICE: _page(lines)}


def one_line(text: Any) -> str:
    """Text from a stranger on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:200]


def _page(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()
