"""Where things stand in a package, and which names its files may have. Knows nothing of what they hold."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Mapping, Sequence

SCHEMA_VERSION = 1
MANIFEST = "edgepack.json"
SUMS = "SHA256SUMS"
RUNTIME = "runtime.json"
CARD = "README.md"
MODELFILE = "Modelfile"
VALIDATION = "evidence/validation.json"
PLAN = "evidence/plan.json"
SAMPLES = "evidence/samples.jsonl"
DETAILS = "evidence/details.json"
REPORT = "evidence/report.html"
NOTICE = "LICENSES/NOTICE.txt"
DRAFT_FOLDER = "model/draft/"  # inside model/: it is run on the device too, and older readers count it in
# A file in these is part of `artifact_digest`: what a device runs, and nothing that was measured.
ARTIFACT_FOLDERS = ("model/", "tokenizer/")

MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 10_000
FILE_MODE, FOLDER_MODE = 0o644, 0o755

_PUNCTUATION = "._-+@=,~() "
# Names Windows keeps for devices, with any extension (Microsoft: "Naming Files, Paths, and Namespaces").
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))}


def name_problem(name: str) -> str | None:
    """Why `name` can't be the name of a file in a package, or None when it can.

    Letters and digits of any script and a little punctuation: a name that every shell, every `sha256sum` and every file
    system takes as it stands, and that can't leave its folder.
    """
    if not name or name in (".", ".."):
        return "is no file name"
    if len(name.encode("utf-8", "surrogatepass")) > 200:
        return "is longer than 200 bytes"
    strange = next((c for c in name if not (c.isalnum() or c in _PUNCTUATION)), None)
    if strange is not None:
        return f"holds {strange!a}"
    if name != unicodedata.normalize("NFC", name):
        return "is not in Unicode form NFC"
    if name[0] in "- ." or name[-1] in " .":
        return f"starts or ends with {name[0] if name[0] in '- .' else name[-1]!a}"
    if name.partition(".")[0].lower() in _RESERVED:
        return "is a device name on Windows"
    return None


def path_problem(path: str) -> str | None:
    """Why `path` can't be a file of a package (relative, `/` between names, no `..`), or None when it can."""
    if path.startswith("/"):
        return "is an absolute path"
    if path.count("/") > 3:
        return "lies too deep"
    for name in path.split("/"):
        problem = name_problem(name)
        if problem:
            return problem
    return None


def safe_name(name: str) -> str:
    """`name` as a file name of a package: what a name may not hold becomes `-`.

    >>> safe_name("org/My model*")
    'org-My model-'
    """
    text = unicodedata.normalize("NFC", name)
    kept = "".join(c if c.isalnum() or c in _PUNCTUATION else "-" for c in text).lstrip("- .").rstrip(" .")
    while len(kept.encode()) > 120:
        kept = kept[:-1].rstrip(" .")
    return kept if kept and name_problem(kept) is None else f"model-{kept}".rstrip("-")


def mode_problem(status: os.stat_result) -> str | None:
    """What is odd about the mode of a file or folder, or None.

    Packages are written 0644 and 0755. Copies may lose group and other bits (umask 077) or gain group write (umask
    002); what no ordinary copy makes is refused: setuid, setgid on a file, sticky, executable files, write for others.
    """
    if os.name == "nt":
        return None
    odd = 0o5002 if stat.S_ISDIR(status.st_mode) else 0o7113
    mode = stat.S_IMODE(status.st_mode)
    return f"has mode {mode:04o}" if mode & odd else None


def in_artifact(path: str) -> bool:
    """True for a file that is part of `artifact_digest`."""
    return path.startswith(ARTIFACT_FOLDERS) or path == RUNTIME


def sums_text(sha256_by_path: Mapping[str, str]) -> str:
    """The text of SHA256SUMS, in the form of GNU coreutils: digest, two spaces, path; sorted by path."""
    return "".join(f"{sha256_by_path[path]}  {path}\n" for path in sorted(sha256_by_path))


def clashes(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of paths that are one file on a file system that ignores case."""
    seen: dict[str, str] = {}
    found = []
    for path in paths:
        other = seen.setdefault(path.casefold(), path)
        if other is not path:
            found.append((other, path))
    return found
