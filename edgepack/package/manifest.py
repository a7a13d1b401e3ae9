"""`edgepack.json`: its form, its two digests, and reading a package by it.

    artifact_digest = sha256 of the canonical JSON of the records of model/, tokenizer/ and runtime.json:
                      the same for the same inputs, options and toolchain, wherever and whenever it was built
    package_digest  = sha256 of the canonical JSON of the manifest without package_digest itself:
                      everything, measurements included

Canonical JSON is RFC 8785. A digest is written `sha256:<64 hex digits>`, as OCI registries write it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepack import strict_json
from edgepack.canonical import canonical_json, digest
from edgepack.errors import InputRefused, UsageError
from edgepack.measurement import Measurement, PackageVerdict, from_json
from edgepack.package.layout import (
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    SUMS,
    VALIDATION,
    clashes,
    in_artifact,
    path_problem,
)

if TYPE_CHECKING:
    from edgepack.targets import Target

VERDICTS = ("pass", "fail", "incomplete")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Package:
    """A package as its manifest and its evidence describe it; `verify` says whether that is true.

    Args:
        path: The folder.
        manifest: `edgepack.json`.
        verdict: `pass`, `fail` or `incomplete`.
        measurements: Every row of `evidence/validation.json`.
    """

    path: Path
    manifest: dict[str, Any]
    verdict: PackageVerdict
    measurements: tuple[Measurement, ...]

    @property
    def artifact(self) -> Path:
        """The file the runtime opens: the only model file, or the first shard."""
        return self.path / str(self.manifest["artifact"])

    @property
    def artifact_digest(self) -> str:
        """Digest of what the device runs; equal for equal builds."""
        return str(self.manifest["artifact_digest"])

    @property
    def package_digest(self) -> str:
        """Digest of everything, evidence included."""
        return str(self.manifest["package_digest"])


def artifact_digest(files: Iterable[Mapping[str, Any]]) -> str:
    """The digest over the records (`path`, `size`, `sha256`) of what the device runs, sorted by path."""
    records = [
        {key: record[key] for key in ("path", "size", "sha256")} for record in files if in_artifact(record["path"])
    ]
    return "sha256:" + digest(sorted(records, key=lambda record: str(record["path"])))


def package_digest(manifest: Mapping[str, Any]) -> str:
    """The digest over the whole manifest, `package_digest` itself left out."""
    return "sha256:" + digest({key: value for key, value in manifest.items() if key != "package_digest"})


def packaged_target(manifest: Mapping[str, Any]) -> Target:
    """The target a package was built for: the profile it carries with the overrides it was built with.

    Raises:
        InputRefused: The profile in the manifest is not valid.
    """
    from edgepack.errors import ProfileError
    from edgepack.targets import parse_target

    try:
        return parse_target(manifest["target"], f"{MANIFEST}: target", overrides=tuple(manifest["overrides"]))
    except ProfileError as error:
        raise InputRefused(error.message, hint="The package was made by another version, or by hand.") from error


def read_package(path: str | Path) -> Package:
    """Open a package: manifest and measurements, in form; no file is hashed.

    Args:
        path: The package folder.

    Returns:
        The package.

    Raises:
        UsageError: No such folder.
        InputRefused: Not a package, made by a newer edgepack, or malformed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder", hint="Give the folder that holds edgepack.json.")
    manifest = strict_json.parse_object(read_small(folder, MANIFEST), f"{folder / MANIFEST}")
    problems = manifest_problems(manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputRefused(
            f"{folder / MANIFEST}: {problems[0]}{more}", hint=f"`edgepack verify {folder}` lists them all."
        )
    where = f"{folder / VALIDATION}"
    validation = strict_json.parse_object(read_small(folder, VALIDATION), where)
    rows = validation.get("measurements")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise InputRefused(f"{where}: measurements: expected a list of rows with name, value, unit and measured_on")
    return Package(folder, manifest, cast(PackageVerdict, manifest["verdict"]), tuple(from_json(row) for row in rows))


def read_small(folder: Path, name: str) -> bytes:
    """A JSON file of a package, capped in size, not through a link.

    Raises:
        InputRefused: Missing, a link, not a regular file, or too large.
    """
    path = folder / name
    if path.is_symlink() or any(parent.is_symlink() for parent in _inner_parents(folder, path)):
        raise InputRefused(f"{path}: is a symbolic link")
    if not path.is_file():
        hint = "Give the folder that `edgepack build` wrote." if name == MANIFEST else None
        raise InputRefused(f"{path}: missing, or no regular file", hint=hint)
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputRefused(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_MANIFEST_BYTES:,} are read")
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES)
    except OSError as error:
        raise InputRefused(f"{path}: can't be read: {error.strerror}") from error


def _inner_parents(folder: Path, path: Path) -> list[Path]:
    return [parent for parent in path.parents if folder in parent.parents]


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and (row.get("value") is None or type(row["value"]) in (int, float))
        and isinstance(row.get("unit"), str)
        and (row.get("measured_on") is None or isinstance(row["measured_on"], str))
        and (row.get("ci95") is None or _is_pair(row["ci95"]))
        and (row.get("budget") is None or isinstance(row["budget"], dict))
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# Key -> (what it must be, in words, and the test). A manifest may have more keys than these.
_FORM: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("text", lambda x: isinstance(x, str) and bool(x)),
    "target": ("the profile's text", lambda x: isinstance(x, str)),
    "target_name": ("text", lambda x: isinstance(x, str) and bool(x)),
    "overrides": ("a list of texts", _texts),
    "require_on_device": ("true or false", lambda x: isinstance(x, bool)),
    "source": ("an object", lambda x: isinstance(x, dict)),
    "recipe": ("an object", lambda x: isinstance(x, dict)),
    "toolchain": ("an object", lambda x: isinstance(x, dict)),
    "measured_on": ("an object", lambda x: isinstance(x, dict)),
    "files": ("a list of records", lambda x: isinstance(x, list)),
    "artifact": ("the path of a model file", lambda x: isinstance(x, str)),
    "artifact_digest": ("sha256:<64 hex digits>", lambda x: isinstance(x, str) and bool(_DIGEST.fullmatch(x))),
    "package_digest": ("sha256:<64 hex digits>", lambda x: isinstance(x, str) and bool(_DIGEST.fullmatch(x))),
    "verdict": ("one of " + ", ".join(VERDICTS), lambda x: x in VERDICTS if isinstance(x, str) else False),
}


def manifest_problems(manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the form of a manifest, each with its key; empty when nothing is."""
    version = manifest.get("schema_version")
    if type(version) is not int or version < 1:
        return [f"schema_version: expected {SCHEMA_VERSION}, found {ascii(version)[:40]}"]
    if version > SCHEMA_VERSION:
        return [f"schema_version {version} is newer than this edgepack reads ({SCHEMA_VERSION}): upgrade edgepack"]
    problems = []
    for key, (expected, test) in _FORM.items():
        if key not in manifest:
            problems.append(f"{key}: missing")
        elif not test(manifest[key]):
            problems.append(f"{key}: expected {expected}, found {strict_json.kind(manifest[key])}")
    try:
        canonical_json(manifest)
    except (ValueError, RecursionError) as error:  # a number beyond 2^53, a lone surrogate, endless nesting
        problems.append(f"has no canonical form: {str(error)[:120]}")
    if isinstance(manifest.get("files"), list):
        problems += _file_problems(manifest["files"], manifest.get("artifact"))
    return problems


def _file_problems(files: list[Any], artifact: Any) -> list[str]:
    if len(files) > MAX_FILES:
        return [f"files: {len(files):,} records; a package has at most {MAX_FILES:,}"]
    problems = []
    paths: list[str] = []
    for index, record in enumerate(files):
        reason = _record_problem(record)
        if reason:
            problems.append(f"files[{index}]: {reason}")
        else:
            paths.append(record["path"])
    problems += [f"files: {path} is listed twice" for path, count in sorted(Counter(paths).items()) if count > 1]
    problems += [f"files: {a} and {b} differ in case only" for a, b in clashes(sorted(set(paths)))]
    if isinstance(artifact, str) and (artifact not in paths or not artifact.startswith("model/")):
        problems.append(f"artifact: {ascii(artifact)[:120]} is not one of the model files")
    return problems


def _record_problem(record: Any) -> str | None:
    if not isinstance(record, dict) or set(record) != {"path", "size", "sha256"}:
        return "expected an object with path, size and sha256"
    path, size, sha256 = record["path"], record["size"], record["sha256"]
    if not isinstance(path, str):
        return "path: expected text"
    reason = path_problem(path)
    if reason:
        return f"path {ascii(path)[:120]} {reason}"
    if path in (MANIFEST, SUMS):
        return f"path {path}: a manifest does not list itself or {SUMS}"
    if type(size) is not int or size < 0:
        return f"{path}: size: expected bytes"
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        return f"{path}: sha256: expected 64 hex digits"
    return None
