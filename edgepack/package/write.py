"""Writes a package into a folder of its own, so that equal inputs give equal bytes.

No time, path, host name, locale or umask reaches a file outside `evidence/`; the one time there is in
`evidence/validation.json` and is `SOURCE_DATE_EPOCH` where that is set
(https://reproducible-builds.org/specs/source-date-epoch/).
The folder is the caller's to publish: it is built beside its final place and renamed once it is whole.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.canonical import canonical_json
from edgepack.errors import StepError, UsageError
from edgepack.files import sha256_of, storage_errors
from edgepack.measurement import Measurement, overall
from edgepack.package.card import Evidence, card
from edgepack.package.how_to_run import modelfile
from edgepack.package.layout import (
    CARD,
    DETAILS,
    DRAFT_FOLDER,
    FILE_MODE,
    FOLDER_MODE,
    MANIFEST,
    MODELFILE,
    PLAN,
    REPORT,
    RUNTIME,
    SAMPLES,
    SCHEMA_VERSION,
    SUMS,
    VALIDATION,
    path_problem,
    sums_text,
)
from edgepack.package.licences import licence_files
from edgepack.package.manifest import Package, artifact_digest, manifest_problems, package_digest
from edgepack.report import package_document, render

if TYPE_CHECKING:
    from edgepack.source import Source
    from edgepack.targets import Target

Artifact = Sequence[Path] | Callable[[Path], object]


def write_package(
    folder: Path,
    *,
    name: str,
    target: Target,
    source: Source,
    recipe: Mapping[str, Any],
    toolchain: Mapping[str, Any],
    runtime: Mapping[str, Any],
    measurements: Sequence[Measurement],
    measured_on: Mapping[str, Any],
    plan: Mapping[str, Any],
    artifact: Artifact = (),
    conformance: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    details: Mapping[str, Any] | None = None,
    pictures: Mapping[str, Any] | None = None,
    licences: Mapping[str, bytes] | None = None,
    known_sha256: Mapping[str, str] | None = None,
) -> Package:
    """Write every file of a package and the manifest last.

    Args:
        folder: Made if it is not there; if it is, it holds nothing but `model/`. The caller renames it into place
            when this returns, and removes it when this raises.
        name: The model's name, for people; `<name>-<target>` is what the caller calls the folder.
        target: The profile with its overrides; its text goes into the manifest whole.
        source: The hashed source.
        recipe: Every option that shaped the artifact; `quantize` among them.
        toolchain: Versions of everything that did.
        runtime: Load options: `engine`, `min_version`, `threads`, `context`, `gpu_layers`; `embedding` is true for an
            embedder, `chat` where the model has a chat template.
        measurements: Judged rows.
        measured_on: Facts of the machine the measurements are from; no host name, no path.
        plan: The plan's JSON.
        artifact: The model files: paths that are moved into `model/`, or a function that is given `model/` and fills
            it; empty when they are there already. Nothing is copied here. A draft model lies in `model/draft/`.
        conformance: What the checks against the source found: `tokens`, `chat`, `logits`, `reference`; it stands in
            `validation.json` beside the measurements.
        tokenizer: File name -> content, for formats that do not embed the tokenizer.
        samples: Golden samples, one line each in `evidence/samples.jsonl`.
        details: Where in the text artifact and source part, for `evidence/details.json` and the report.
        pictures: Further parts of the report's document (see `edgepack.report`): `points`, `waterfall`.
        licences: File name -> text, as found beside the source.
        known_sha256: Path in the package -> sha256, for model files whose digest the caller has just computed; others
            are read.

    Returns:
        The package as written, at `folder`.

    Raises:
        UsageError: `folder` holds something else, a file name that a package can't have, a bad SOURCE_DATE_EPOCH.
        StepError: There is no model file, or one has another hard link.
        StorageError: The file system refused.
    """
    with storage_errors(folder):
        _prepare(folder)
        _place(folder, artifact)
        model_files = _model_files(folder)
    main = _main_file(model_files)
    verdict = overall(measurements)
    rows = [_finite(row) for row in measurements]
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "target_name": target.name,
        "target": target.text,
        "overrides": [_without_path(pair) for pair in target.overrides],
        "require_on_device": target.budget.require_on_device,
        "source": source_record(source),
        "recipe": dict(recipe),
        "toolchain": dict(toolchain),
        "measured_on": dict(measured_on),
        "verdict": verdict,
        "artifact": main,
    }
    runtime_file = {"schema_version": 1, "model": main, **runtime}
    texts = licence_files(manifest["source"], licences or {})
    files = {
        RUNTIME: canonical_json(runtime_file),
        VALIDATION: _validation(manifest, rows, conformance or {}),
        PLAN: canonical_json(dict(plan)),
        **({MODELFILE: modelfile(main, runtime_file, texts)} if main.endswith(".gguf") else {}),
        **{f"tokenizer/{path}": data for path, data in (tokenizer or {}).items()},
        **({SAMPLES: _lines(samples)} if samples else {}),
        **({DETAILS: canonical_json(dict(details))} if details else {}),
        REPORT: render(package_document(manifest, rows, plan, details=details, extra=pictures)).encode(),
        **texts,
    }
    evidence = Evidence(tuple(rows), plan, conformance or {})
    with storage_errors(folder):
        _write(folder, files)
        known = known_sha256 or {}
        records = [_record(folder, path, known.get(path)) for path in model_files]
        records += [_record(folder, path) for path in files]
        manifest["artifact_digest"] = artifact_digest(records)
        _write(folder, {CARD: card(manifest, evidence, runtime_file, sorted(texts)).encode()})
        records.append(_record(folder, CARD))
        manifest["files"] = sorted(records, key=lambda record: str(record["path"]))
        manifest["package_digest"] = package_digest(manifest)
        _finish(folder, manifest)
    return Package(folder, manifest, verdict, tuple(rows))


def _validation(manifest: Mapping[str, Any], rows: Sequence[Measurement], conformance: Mapping[str, Any]) -> bytes:
    return canonical_json(
        {
            "schema_version": 1,
            "created": _created(),
            "measured_on": manifest["measured_on"],
            "verdict": manifest["verdict"],
            "conformance": dict(conformance),
            "measurements": [row.as_json() for row in rows],
        }
    )


def _finite(row: Measurement) -> Measurement:
    """A row as JSON can hold it: NaN and infinity have no form there, so the note says what the value was."""
    if row.value is None or math.isfinite(row.value):
        return row
    return replace(row, value=None, ci95=None, note=f"the value is {row.value}" + (f"; {row.note}" if row.note else ""))


def _lines(samples: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(canonical_json(dict(sample)) + b"\n" for sample in samples)


def source_record(source: Source) -> dict[str, Any]:
    """What the manifest says of the source: never a path of this machine."""
    return {
        "kind": source.kind,
        "name": source.name,
        "id": source.id,
        "revision": source.revision,
        "commit": source.commit,
        "licence": source.licence,
        "gated": source.gated,
        "files": dict(sorted(source.files.items())),
    }


def _created() -> str:
    """`SOURCE_DATE_EPOCH` where it is set, else this moment; UTC, to the second."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UsageError(f"SOURCE_DATE_EPOCH is {ascii(text)[:40]}; expected whole seconds since 1970")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(text) if text else time.time()))


def _without_path(pair: str) -> str:
    """An override as it may stand in a manifest: an importance matrix by its file name, never its path."""
    key, equals, value = pair.partition("=")
    if key.strip() in ("quantize.imatrix", "quantize.calibration") and value.strip() != "none":
        return f"{key}{equals}{Path(value.strip()).name}"
    return pair


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name != "model")
    if others:
        raise UsageError(f"{folder}: holds {', '.join(others[:3])}; a package is written into a folder of its own")
    (folder / "model").mkdir(exist_ok=True)


def _place(folder: Path, artifact: Artifact) -> None:
    if callable(artifact):
        artifact(folder / "model")
        return
    for path in artifact:
        shutil.move(path, folder / "model" / path.name)  # a rename where it can be one


def _model_files(folder: Path) -> list[str]:
    """The files of the artifact, and those of a draft model in a folder of its own."""
    places = [path for path in (folder / "model").iterdir() if path != folder / DRAFT_FOLDER]
    draft = (folder / DRAFT_FOLDER).iterdir() if (folder / DRAFT_FOLDER).is_dir() else ()
    return sorted(path.relative_to(folder).as_posix() for path in (*places, *draft))


def _main_file(model_files: list[str]) -> str:
    """The file a runtime opens: the first shard of a GGUF, the graph of an ONNX, the only file; never a draft."""
    for path in model_files:
        problem = path_problem(path)
        if problem:
            raise UsageError(f"{path!a}: the file name {problem}")
    own = (path for path in model_files if not path.startswith(DRAFT_FOLDER))
    found = next((path for path in own if path.endswith((".gguf", ".onnx"))), None)
    if found is None:
        raise StepError("there is no .gguf or .onnx file in model/: nothing to package")
    return found


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        problem = path_problem(path)
        if problem:
            raise UsageError(f"{path!a}: the file name {problem}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / path).open("xb") as file:
            file.write(data)


def _record(folder: Path, path: str, sha256: str | None = None) -> dict[str, Any]:
    status = (folder / path).lstat()
    # A file of the caller's may have a second name until it is published (a release from the store takes its own away
    # then); `verify` has the last word.
    if sha256 is None and status.st_nlink > 1:
        raise StepError(f"{path} has {status.st_nlink} hard links: a package's files are its own")
    return {"path": path, "size": status.st_size, "sha256": sha256 or sha256_of(folder / path)}


def _finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The manifest, the sums, and every mode as it should be, whatever the umask."""
    problems = manifest_problems(manifest)
    if problems:
        raise StepError(f"the manifest of {folder.name} would not be valid: {problems[0]}")
    data = canonical_json(manifest)
    _write(folder, {MANIFEST: data})
    sums = {record["path"]: record["sha256"] for record in manifest["files"]} | {MANIFEST: sha256_of(folder / MANIFEST)}
    _write(folder, {SUMS: sums_text(sums).encode()})
    for path in [folder, *folder.rglob("*")]:
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
