"""Two artifacts of one model side by side: bytes, bits per weight, types, perplexity, divergence, speed.

Either may be a GGUF or a package (where one is ONNX, `compare_onnx.py` takes over). What is measured runs in workers,
on the same windows and in alternating turns;
without a source model B is held against A. A result for reading and for machines: it judges nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.compare_onnx import compare_onnx, is_onnx
from edgepack.errors import UsageError
from edgepack.events import Listener, silent, step
from edgepack.gguf.file import GgufFile, read_gguf_shards
from edgepack.text import WINDOW_TOKENS
from edgepack.worker import run
from edgepack.workshop import physical_cores

# One turn of the speed comparison: a prompt and an answer as in the built-in profiles, five counted turns of each.
SPEED = {"prompt_tokens": 128, "decode_tokens": 64, "repetitions": 5}


@dataclass(frozen=True)
class Side:
    """One artifact.

    Args:
        name: File or package name.
        path: The GGUF, or its first shard.
        shards: The headers.
    """

    name: str
    path: Path
    shards: tuple[GgufFile, ...]

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Weights in all tensors."""
        return sum(_weights(shape) for shard in self.shards for shape in (t.shape for t in shard.tensors.values()))

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight, headers not counted."""
        return 8 * sum(t.nbytes for shard in self.shards for t in shard.tensors.values()) / self.parameters

    @property
    def context(self) -> int:
        """Longest context the model was made for."""
        return int(self.shards[0].get(f"{self.shards[0].architecture}.context_length", 0))

    @property
    def pooled(self) -> bool:
        """True for an embedder."""
        return bool(self.shards[0].get(f"{self.shards[0].architecture}.pooling_type", 0))

    def types(self) -> dict[str, int]:
        """Tensors of each type, most frequent first."""
        return dict(Counter(t.type.name for shard in self.shards for t in shard.tensors.values()).most_common())

    def as_json(self) -> dict[str, Any]:
        """What stands in the result for this side."""
        return {
            "name": self.name,
            "bytes": self.file_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "parameters": self.parameters,
            "types": self.types(),
        }


def compare(
    first: Path,
    second: Path,
    *,
    text: Path,
    source: str | None = None,
    windows: int = 40,
    speed: bool = True,
    threads: int | None = None,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Compare two artifacts.

    Args:
        first: A: GGUF file, first shard, folder of ORT GenAI, or package folder.
        second: B.
        text: Evaluation text.
        source: Full-precision model both are held against: folder, hub id or float GGUF; None holds B against A.
        windows: Most evaluation windows.
        speed: Time both.
        threads: CPU threads; None takes the physical cores.
        listener: Told about steps and progress.

    Returns:
        `a`, `b` (name, bytes, types), `rows` (`name`, `unit`, `a`, `b`, `ratio`, and what is known of their difference)
        and `notes`.

    Raises:
        UsageError: They are not of one model: architecture or number of weights differ.
        InputRefused: A file is no sound GGUF, or the text is too short.
        StepError: A measurement failed.
    """
    count = threads or physical_cores()
    if is_onnx(first) or is_onnx(second):
        return compare_onnx(
            first, second, text=text, source=source, windows=windows, speed=speed, threads=count, listener=listener
        )
    a, b = gguf_side(first), gguf_side(second)
    _same_model(a, b)
    rows: list[dict[str, Any]] = [
        {"name": "artifact_bytes", "unit": "bytes", "a": a.file_bytes, "b": b.file_bytes},
        {"name": "bits_per_weight", "unit": "1", "a": a.bits_per_weight, "b": b.bits_per_weight},
    ]
    rows += _fidelity(a, b, source, text, windows, count, listener)
    if speed and not a.pooled:
        rows += _speed(a, b, count, listener)
    notes = [_types_note(a, b), f"{count} threads, runs in turns A B A B" if speed and not a.pooled else ""]
    notes.append("divergence from the source model" if source else "no source given: B is held against A")
    return {
        "a": a.as_json(),
        "b": b.as_json(),
        "rows": [row | {"ratio": _ratio(row)} for row in rows],
        "notes": [note for note in notes if note],
    }


def gguf_side(path: Path) -> Side:
    """What the headers of a GGUF, or of a package that holds one, say.

    Raises:
        UsageError: Nothing is there.
        InputRefused: No sound GGUF.
    """
    if path.is_dir():
        from edgepack.package import read_package

        package = read_package(path)
        return Side(path.resolve().name, package.artifact, read_gguf_shards(package.artifact))
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected a GGUF or a package folder")
    return Side(path.name, path, read_gguf_shards(path))


def _same_model(a: Side, b: Side) -> None:
    for what, left, right in (
        ("architecture", a.shards[0].architecture, b.shards[0].architecture),
        ("number of weights", a.parameters, b.parameters),
    ):
        if left != right:
            raise UsageError(
                f"{a.name} and {b.name} are not of one model: {what} {left} and {right}",
                hint="compare puts two quantizations of the same model side by side.",
            )


def _fidelity(
    a: Side, b: Side, source: str | None, text: Path, windows: int, threads: int, listener: Listener
) -> list[dict[str, Any]]:
    length = min(WINDOW_TOKENS, a.context or WINDOW_TOKENS)
    with (
        step(listener, "fidelity", f"{a.name}, {b.name}", unit="windows") as handle,
        _reference(source, threads) as reference,
    ):
        if a.pooled:
            return _cosines(a, b, reference, text, windows, length, threads)
        arguments = {
            "first": str(a.path),
            "second": str(b.path),
            "reference": str(reference) if reference else None,
            "text": str(text),
            "windows": windows,
            "window_tokens": length,
            "threads": threads,
        }
        found = run("edgepack.measure.pair:pair", arguments, what="comparison of logits", progress=handle.progress)
    return list(found)


def _cosines(
    a: Side, b: Side, reference: Path | None, text: Path, windows: int, length: int, threads: int
) -> list[dict[str, Any]]:
    """Embedders: cosines of each with the source, or of B with A."""
    sides = {"a": a, "b": b} if reference else {"b": b}
    rows: dict[str, dict[str, Any]] = {}
    for key, side in sides.items():
        found = run(
            "edgepack.measure.fidelity:fidelity",
            {
                "reference": str(reference or a.path),
                "candidate": str(side.path),
                "text": str(text),
                "windows": windows,
                "window_tokens": length,
                "threads": threads,
            },
            what="comparison of embeddings",
        )
        for row in found["rows"]:
            entry = rows.setdefault(row["name"], {"name": row["name"], "unit": row["unit"], "a": None, "n": row["n"]})
            entry[key] = row["value"]
    return list(rows.values())


def _speed(a: Side, b: Side, threads: int, listener: Listener) -> list[dict[str, Any]]:
    prompt = min(SPEED["prompt_tokens"], max(1, (a.context or 4096) - SPEED["decode_tokens"]))
    with step(listener, "speed", f"{a.name}, {b.name}", unit="runs") as handle:
        found = run(
            "edgepack.measure.pair:speed",
            SPEED | {"first": str(a.path), "second": str(b.path), "threads": threads, "prompt_tokens": prompt},
            what="comparison of speed",
            progress=handle.progress,
        )
    return list(found)


@contextmanager
def _reference(source: str | None, threads: int) -> Iterator[Path | None]:
    """A float32 GGUF of the source for the time of the comparison; a float GGUF is taken as it is."""
    if source is None:
        yield None
        return
    from edgepack.source import resolve
    from edgepack.store import Store

    found = resolve(source)
    if found.kind == "gguf":
        yield found.path
        return
    with Store().scratch() as folder:
        arguments: dict[str, Any] = {"model": str(found.path), "preset": "F32", "overrides": {}, "imatrix": None}
        arguments |= {"folder": str(folder), "stem": "reference", "threads": threads, "shard_mb": None}
        arguments |= {"allow_nonfinite": True, "extra_metadata": {}}
        report = run("edgepack.gguf.convert:export", arguments, what="reference for the comparison")
        yield folder / report["files"][0]


def _types_note(a: Side, b: Side) -> str:
    words = (
        f"{label}: " + ", ".join(f"{n} {name}" for name, n in side.types().items())
        for label, side in (("A", a), ("B", b))
    )
    return "tensors by type, " + "; ".join(words)


def _ratio(row: dict[str, Any]) -> float | None:
    a, b = row.get("a"), row.get("b")
    return float(b) / float(a) if a and b is not None else None


def _weights(shape: tuple[int, ...]) -> int:
    count = 1
    for width in shape:
        count *= width
    return count
