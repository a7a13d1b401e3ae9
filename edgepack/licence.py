"""Under which licence a model is offered, as far as its folder says.

The model card's front matter (`license:`) counts first, in SPDX where the hub's word has one; else a LICENSE file that
is recognised by its own title; else unknown, which is None and never a guess. Source of the words: Hugging Face hub
docs, "Licenses"; of the identifiers: https://spdx.org/licenses/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_SPDX: Mapping[str, str] = MappingProxyType(
    {
        "apache-2.0": "Apache-2.0",
        "mit": "MIT",
        "bsd": "BSD-3-Clause",
        "bsd-2-clause": "BSD-2-Clause",
        "bsd-3-clause": "BSD-3-Clause",
        "bsl-1.0": "BSL-1.0",
        "isc": "ISC",
        "unlicense": "Unlicense",
        "wtfpl": "WTFPL",
        "zlib": "Zlib",
        "mpl-2.0": "MPL-2.0",
        "gpl-2.0": "GPL-2.0-only",
        "gpl-3.0": "GPL-3.0-only",
        "agpl-3.0": "AGPL-3.0-only",
        "lgpl-2.1": "LGPL-2.1-only",
        "lgpl-3.0": "LGPL-3.0-only",
        "cc0-1.0": "CC0-1.0",
        "cc-by-4.0": "CC-BY-4.0",
        "cc-by-sa-4.0": "CC-BY-SA-4.0",
        "cc-by-nc-4.0": "CC-BY-NC-4.0",
        "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
        "cc-by-nc-nd-4.0": "CC-BY-NC-ND-4.0",
        "cc-by-nd-4.0": "CC-BY-ND-4.0",
    }
)

# Titles of licence texts; the first match counts, so LGPL and AGPL stand before GPL.
_TITLES: tuple[tuple[str, str], ...] = (
    (r"apache license\s+version 2\.0", "Apache-2.0"),
    (r"mit license|permission is hereby granted, free of charge, to any person", "MIT"),
    (r"mozilla public license,? version 2\.0", "MPL-2.0"),
    (r"gnu affero general public license\s+version 3", "AGPL-3.0-only"),
    (r"gnu lesser general public license\s+version 3", "LGPL-3.0-only"),
    (r"gnu general public license\s+version 3", "GPL-3.0-only"),
    (r"gnu general public license\s+version 2", "GPL-2.0-only"),
    (r"attribution-noncommercial-sharealike 4\.0 international", "CC-BY-NC-SA-4.0"),
    (r"attribution-noncommercial 4\.0 international", "CC-BY-NC-4.0"),
    (r"attribution-sharealike 4\.0 international", "CC-BY-SA-4.0"),
    (r"attribution 4\.0 international", "CC-BY-4.0"),
    (r"llama 2 community license agreement", "llama2"),
    (r"llama 3\.1 community license agreement", "llama3.1"),
    (r"llama 3\.2 community license agreement", "llama3.2"),
    (r"llama 3\.3 community license agreement", "llama3.3"),
    (r"llama 3 community license agreement", "llama3"),
    (r"gemma terms of use", "gemma"),
)
_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_WORD = r"[\"']?([A-Za-z0-9][A-Za-z0-9._+-]{0,79})[\"']?\s*(?:#.*)?"


def from_card(text: str) -> str | None:
    """The licence of a model card: SPDX where there is one, else the hub's word (`llama3.1`, `gemma`), else None.

    `license: other` gives `license_name` if the card has it. Several licences are joined with " AND ", the reading
    under which none is broken.
    """
    block = _FRONT_MATTER.match(text)
    if block is None:
        return None
    # Four keys do not justify a YAML parser: keys stand at the start of a line in every card the hub accepts.
    words = _values(block[1], "license")
    if words == ["other"]:
        words = _values(block[1], "license_name") or words
    words = [word for word in words if word != "unknown"]
    return " AND ".join(_SPDX.get(word.lower(), word) for word in words) or None


def _values(block: str, key: str) -> list[str]:
    if single := re.search(rf"^{key}:[ \t]*{_WORD}$", block, re.MULTILINE):
        return [single[1]]
    if inline := re.search(rf"^{key}:[ \t]*\[([^\]\n]*)\]", block, re.MULTILINE):
        return re.findall(r"[A-Za-z0-9][A-Za-z0-9._+-]*", inline[1])
    if several := re.search(rf"^{key}:[ \t]*\r?\n((?:[ \t]*- .*\r?\n?)+)", block, re.MULTILINE):
        return re.findall(rf"^[ \t]*- {_WORD}$", several[1], re.MULTILINE)
    return []


def from_text(text: str) -> str | None:
    """Recognise a licence text by its title within the first 2,000 characters; None when it is none of the known."""
    start = " ".join(text[:2000].lower().split())
    for pattern, licence in _TITLES:
        if re.search(pattern, start):
            return licence
    if "redistribution and use in source and binary forms" in start:
        return "BSD-3-Clause" if "neither the name" in " ".join(text.lower().split()) else "BSD-2-Clause"
    return None
