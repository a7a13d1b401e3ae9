"""Two artifacts of one model side by side where at least one is ONNX; `compare.py` hands them over.

Packages say what an artifact was made from: two whose weights have other digests are refused. An encoder needs its
package, because task and tokenizer stand there; a decoder's folder of ORT GenAI has both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.errors import UsageError
from edgepack.events import Listener, step
from edgepack.files import sha256_of
from edgepack.strict_json import parse_object
from edgepack.text import WINDOW_TOKENS
from edgepack.worker import run

# Sentences for each window: what `fidelity.py` takes for embedders.
PER_WINDOW = 5


@dataclass(frozen=True)
class OnnxSide:
    """One artifact.

    Args:
        name: Package, folder or file name.
        artifact: `model.onnx`, or a GGUF.
        decoder: True for a language model.
        nbytes: Of all its model files.
        types: Bytes by element type, or tensors by GGUF type.
        manifest: Of its package; None for a bare folder or file.
        context: Longest text, 0 where nothing says it.
    """

    name: str
    artifact: Path
    decoder: bool
    nbytes: int
    types: dict[str, int]
    manifest: dict[str, Any] | None
    context: int

    @property
    def gguf(self) -> bool:
        """True for llama.cpp's side."""
        return self.artifact.suffix == ".gguf"

    @property
    def place(self) -> Path:
        """What its runtime opens."""
        return self.artifact if self.gguf or not self.decoder else self.artifact.parent

    @property
    def tokenizer(self) -> Path:
        """An encoder's tokenizer.json."""
        return self.artifact.parent.parent / "tokenizer" / "tokenizer.json"

    def as_json(self) -> dict[str, Any]:
        """What stands in the result for this side."""
        facts = {"name": self.name, "bytes": self.nbytes, "types": self.types}
        return facts | {"format": "gguf" if self.gguf else "onnx"}


def is_onnx(path: Path) -> bool:
    """True for an ONNX file, a folder of ORT GenAI, or a package with an ONNX artifact."""
    if path.is_dir() and (path / "edgepack.json").is_file():
        from edgepack.package import read_package

        return read_package(path).artifact.suffix == ".onnx"
    return path.suffix == ".onnx" or (path / "genai_config.json").is_file()


def compare_onnx(
    first: Path,
    second: Path,
    *,
    text: Path,
    source: str | None,
    windows: int,
    speed: bool,
    threads: int,
    listener: Listener,
) -> dict[str, Any]:
    """Compare two artifacts; arguments, result and errors are those of `compare.compare`.

    Raises:
        UsageError: They are not of one model, or an encoder without its package.
    """
    a, b = _side(first), _side(second)
    _same_model(a, b)
    folder = _source(source)
    rows = [{"name": "artifact_bytes", "unit": "bytes", "a": a.nbytes, "b": b.nbytes}]
    common = {"first": str(a.place), "second": str(b.place), "source": folder, "text": str(text), "threads": threads}
    unit = "windows" if a.decoder else "samples"
    with step(listener, "fidelity", f"{a.name}, {b.name}", unit=unit) as handle:
        if a.decoder:
            length = min([WINDOW_TOKENS, *(side.context for side in (a, b) if side.context)])
            arguments = common | {"windows": windows, "window_tokens": length}
            function = "edgepack.measure.mixed_pair:decoders"
        else:
            arguments = common | _encoder_arguments(a, b) | {"samples": PER_WINDOW * windows, "speed": speed}
            function = "edgepack.measure.mixed_pair:encoders"
        rows += run(function, arguments, what="comparison", progress=handle.progress)
    notes = ["difference from the source model" if source else "no source given: B is held against A"]
    if a.decoder and speed:
        notes.append("speed is not compared between runtimes here: `edgepack validate` measures each by itself")
    elif speed and not (a.gguf or b.gguf):
        notes.append(f"{threads} threads, runs in turns A B A B, on the CPU provider")
    return {
        "a": a.as_json(),
        "b": b.as_json(),
        "rows": [row | {"ratio": _ratio(row)} for row in rows],
        "notes": notes,
    }


def _side(path: Path) -> OnnxSide:
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected a GGUF, a folder of ORT GenAI or a package folder")
    manifest, artifact = None, path
    if path.is_dir() and (path / "edgepack.json").is_file():
        from edgepack.package import read_package

        package = read_package(path)
        manifest, artifact = dict(package.manifest), package.artifact
    elif path.is_dir():
        from edgepack.onnx.inspect_onnx import genai_model

        artifact = genai_model(path)
    name = path.resolve().name
    if artifact.suffix == ".gguf":
        from edgepack.compare import gguf_side

        side = gguf_side(artifact)
        return OnnxSide(name, artifact, not side.pooled, side.file_bytes, side.types(), manifest, side.context)
    from edgepack.onnx.check import check_model

    facts = check_model(artifact, libraries=False)
    decoder = (artifact.parent / "genai_config.json").is_file()
    if manifest is None and not decoder:
        raise UsageError(
            f"{path}: an encoder by itself; its task and its tokenizer are in its package",
            hint="Give the package folder.",
        )
    context = int((manifest or {}).get("recipe", {}).get("context") or 0)
    return OnnxSide(name, artifact, decoder, facts.total_bytes, facts.bytes_by_type, manifest, context)


def _same_model(a: OnnxSide, b: OnnxSide) -> None:
    hint = "compare puts two artifacts of the same model side by side."
    if a.decoder != b.decoder:
        kinds = ["a language model" if side.decoder else "an encoder" for side in (a, b)]
        raise UsageError(f"{a.name} and {b.name} are not of one model: {kinds[0]} and {kinds[1]}", hint=hint)
    if a.manifest is None or b.manifest is None:
        return
    for what, left, right in (
        ("weights", _weights(a.manifest), _weights(b.manifest)),
        ("number of weights", a.manifest["recipe"].get("parameters"), b.manifest["recipe"].get("parameters")),
        ("task", *(side.manifest["recipe"].get("task") if side.manifest else None for side in (a, b))),
    ):
        if left and right and left != right:
            shown = f": {left} and {right}" if what != "weights" else " of other digests"
            raise UsageError(f"{a.name} and {b.name} are not of one model: {what}{shown}", hint=hint)


def _weights(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Digests of the source's weight files; empty for a source that is itself a GGUF."""
    files = manifest["source"].get("files") or {}
    return tuple(sorted(digest for name, digest in files.items() if name.endswith(".safetensors")))


def _encoder_arguments(a: OnnxSide, b: OnnxSide) -> dict[str, Any]:
    onnx = [side for side in (a, b) if not side.gguf]
    task = next(side.manifest["recipe"]["task"] for side in onnx if side.manifest)
    present = [side.tokenizer for side in onnx if side.tokenizer.is_file()]
    if len({sha256_of(path) for path in present}) > 1:
        raise UsageError(
            f"{a.name} and {b.name} have different tokenizers",
            hint="Their inputs would not be the same: they are not of one model.",
        )
    limits = [limit for side in onnx if (limit := _max_tokens(side)) is not None]
    return {
        "task": task,
        "tokenizer": str(present[0]) if present else None,
        "longest": min(limits, default=None),
    }


def _max_tokens(side: OnnxSide) -> int | None:
    """Longest input, as the package's `runtime.json` has it."""
    path = side.artifact.parent.parent / "runtime.json"
    if not path.is_file():
        return None
    limit = (parse_object(path.read_bytes(), str(path)).get("text") or {}).get("max_tokens")
    return limit if isinstance(limit, int) and limit > 0 else None


def _source(source: str | None) -> str | None:
    """The folder of the source model."""
    if source is None:
        return None
    from edgepack.source import resolve

    found = resolve(source)
    if found.kind == "gguf":
        raise UsageError(
            f"--source {source}: a GGUF; an ONNX artifact is held against the checkpoint it was made from",
            hint="Give the model folder.",
        )
    return str(found.path)


def _ratio(row: dict[str, Any]) -> float | None:
    a, b = row.get("a"), row.get("b")
    return float(b) / float(a) if a and b is not None else None
