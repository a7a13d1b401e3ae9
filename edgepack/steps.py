"""The steps of a build, functions of their inputs: each runs in a worker, keeps its result in the store, returns it.

A result is found again when source files, options, edgepack's own code and the toolchain are the same. Results that
are files (the artifact) are store entries; results that are numbers are a `result.json` in one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused
from edgepack.events import Event, Listener, step
from edgepack.planning import gguf_keys
from edgepack.toolchain import code_digest, versions
from edgepack.worker import Limits, run

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.store import Entry, Store
    from edgepack.targets import Target

# A chat template is a program from a stranger: chats render in milliseconds, starting the interpreter takes seconds.
TEMPLATE_LIMITS = Limits(wall_seconds=120, cpu_seconds=60, memory_bytes=8 << 30)
# Part of the free memory a float32 copy of the model may take, in the file cache or in transformers.
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Workshop:
    """What every step needs: where results are kept and who is told.

    Args:
        store: The content-addressed store.
        listener: Told about steps and progress.
        threads: Threads to compute with.
        fresh: Measure again whatever the store holds.
    """

    store: Store
    listener: Listener
    threads: int
    fresh: bool = False

    def remember(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> tuple[Any, bool]:
        """The result of `compute` for these inputs, from the store if it is there.

        Returns:
            The JSON value and whether it came from the store.
        """
        if self.fresh:
            return compute(), False

        def make(folder: Path) -> None:
            (folder / "result.json").write_text(json.dumps(compute()), encoding="utf-8")

        entry = self.store.step(name, keyed(inputs), make)
        return json.loads((entry.files["result.json"].path).read_text(encoding="utf-8")), entry.cached


def keyed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a step with all that may change its result without being one: code and versions."""
    return dict(inputs) | {"code": code_digest(), "toolchain": versions()}


def physical_cores() -> int:
    """Cores this process may run on, counting two hardware threads of one core once (Linux; elsewhere all CPUs)."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    siblings = set()
    for cpu in allowed:
        listing = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(listing.read_text().strip() if listing.is_file() else str(cpu))
    return len(siblings) or 1


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> tuple[Entry, dict[str, Any]]:
    """Write the artifact: one streaming pass from safetensors to the quantized GGUF.

    Returns:
        The store entry that holds the files, and the worker's report: `files`, `types`, `bits_per_weight`, ...
    """
    arguments = _export_arguments(source, plan, stem)
    imatrix = arguments["imatrix"]
    inputs = arguments | {"model": source.files, "imatrix": sha256(imatrix) if imatrix else None}

    with step(shop.listener, "export", f"{stem}.gguf", unit="bytes") as handle:

        def make(folder: Path) -> None:
            before = _stamps(source)
            report = run(
                "edgepack.gguf.convert:export",
                arguments | {"folder": str(folder), "threads": shop.threads},
                what="export to GGUF",
                progress=handle.progress,
            )
            _refuse_changed(source, before)
            (folder / "export.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")

        entry = shop.store.step("export", keyed(inputs), make)
        report = json.loads(entry.files["export.json"].path.read_text(encoding="utf-8"))
        handle.cached = entry.cached
        size = sum(record.size for name, record in entry.files.items() if name.endswith(".gguf"))
        handle.outcome = f"{stem}.gguf  {size / 1e6:,.1f} MB, {report['bits_per_weight']:.3f} bits/weight"
    return entry, report


def _stamps(source: Source) -> dict[str, tuple[int, int, int]]:
    """Size, modification time and inode of every source file: cheap witnesses that nobody wrote to it meanwhile."""
    places = {
        name: source.path / name if source.path.is_dir() else source.path.with_name(name) for name in source.files
    }
    status = {name: place.stat() for name, place in places.items()}
    return {name: (found.st_size, found.st_mtime_ns, found.st_ino) for name, found in status.items()}


def _refuse_changed(source: Source, before: Mapping[str, tuple[int, int, int]]) -> None:
    """What was exported must be what was hashed: a source that changes under the build is refused."""
    changed = [name for name, stamp in _stamps(source).items() if stamp != before[name]]
    if changed:
        raise InputRefused(
            f"{source.name}: {changed[0]} changed while the model was exported",
            hint="Build again when nobody writes to it.",
        )


def _export_arguments(source: Source, plan: Plan, stem: str) -> dict[str, Any]:
    target = plan.target
    return {
        "model": str(source.path),
        "preset": plan.quantize,
        "overrides": dict(target.quantize.tensors),
        "imatrix": target.quantize.imatrix,
        "shard_mb": target.delivery.shard_mb,
        "stem": stem,
        "allow_nonfinite": target.quantize.allow_nonfinite,
        "extra_metadata": gguf_keys(source, plan.quantize),
    }


def conform(shop: Workshop, source: Source, artifact: Path, artifact_sha256: str) -> dict[str, Any]:
    """Token ids and chat rendering of the artifact against its source.

    Returns:
        `{"tokens": ..., "chat": ...}` as the two checks report.

    Raises:
        ConformanceError: The first differing place.
    """
    if source.kind == "gguf":
        note = "the source is a GGUF: its vocabulary and template are copied as they are"
        return {"tokens": {"texts": 0, "note": note}, "chat": {"chats": 0, "note": note}}
    where = {"artifact": str(artifact), "source": str(source.path)}

    def compute() -> dict[str, Any]:
        return {
            "tokens": run("edgepack.conform.tokens:tokens", where, what="token check", progress=handle.progress),
            "chat": run("edgepack.conform.chat:chat", where, what="chat template check", limits=TEMPLATE_LIMITS),
        }

    with step(shop.listener, "conform", "token ids and chat template", unit="texts") as handle:
        found, handle.cached = shop.remember("conform", {"artifact": artifact_sha256, "source": source.files}, compute)
        handle.outcome = _conformance_in_words(found)
        for difference in found["tokens"].get("differences", []):
            shop.listener(Event("note", "conform", f"{difference['texts']} texts differ: {difference['reason']}"))
    return dict(found)


def _conformance_in_words(found: Mapping[str, Any]) -> str:
    tokens, chats = found["tokens"], found["chat"]["chats"]
    equal = tokens.get("equal", tokens["texts"])
    return f"token ids equal on {equal:,} of {tokens['texts']:,} texts, chat ids equal on {chats} chats"


def samples(shop: Workshop, plan: Plan, artifact: Path, artifact_sha256: str) -> list[dict[str, Any]]:
    """Load the artifact in llama.cpp and keep what it says to fixed prompts."""
    arguments = {"artifact": str(artifact), "embedding": plan.embedding, "threads": shop.threads}
    with step(shop.listener, "samples", artifact.name, unit="prompts") as handle:
        found, handle.cached = shop.remember(
            "samples",
            {"artifact": artifact_sha256, "threads": shop.threads},
            lambda: run("edgepack.measure.samples:samples", arguments, what="first run", progress=handle.progress),
        )
        handle.outcome = f"loaded by llama.cpp, {len(found)} prompts"
    return list(found)


def fidelity(
    shop: Workshop, source: Source, target: Target, artifact: Path, artifact_sha256: str, text: Path, *, parameters: int
) -> dict[str, Any]:
    """KL divergence, perplexity and agreement of the artifact with its source, both read by llama.cpp.

    The reference is a float32 GGUF of the source, made for the occasion and removed afterwards; it is first compared
    with transformers itself, so that a wrong conversion can't hide by being wrong twice.

    Returns:
        `{"rows": [...], "reference": {...}, "logits": {...}}`.
    """
    kind = reference_type(target, source, parameters)
    settings = {
        "windows": target.measure.windows,
        "window_tokens": target.measure.window_tokens,
        "threads": shop.threads,
    }
    inputs = settings | {"artifact": artifact_sha256, "source": source.files, "text": sha256(text), "reference": kind}

    def compute() -> dict[str, Any]:
        with _reference(shop, source, kind) as reference:
            logits = _logits(shop, source, reference, kind, parameters)
            handle.progress(0, settings["windows"])
            measured = run(
                "edgepack.measure.fidelity:fidelity",
                settings | {"reference": str(reference), "candidate": str(artifact), "text": str(text)},
                what="fidelity measurement",
                progress=handle.progress,
            )
        return dict(measured) | {"logits": logits, "reference": {"type": kind, "read_by": "llama.cpp"}}

    with step(shop.listener, "fidelity", f"{artifact.name} against {kind} source", unit="windows") as handle:
        found, handle.cached = shop.remember("fidelity", inputs, compute)
        handle.outcome = _fidelity_in_words(found["rows"], kind)
    return dict(found)


def latency(shop: Workshop, target: Target, artifact: Path, artifact_sha256: str, context: int) -> dict[str, Any]:
    """Time to first token and decode rate (latency for an embedder), load time and peak memory on this machine."""
    measure = target.measure
    settings = {
        "prompt_tokens": min(measure.prompt_tokens, max(1, context - measure.decode_tokens)),
        "decode_tokens": min(measure.decode_tokens, max(2, context // 2)),
        "repetitions": measure.repetitions,
        "warmups": measure.warmups,
        "pause_seconds": measure.pause_seconds,
        "threads": shop.threads,
        "context": context,
        "gpu_layers": target.runtime.gpu_layers,
    }
    with step(shop.listener, "latency", f"{artifact.name}, {shop.threads} threads", unit="runs") as handle:
        found, handle.cached = shop.remember(
            "latency",
            settings | {"artifact": artifact_sha256},
            lambda: run(
                "edgepack.measure.latency:latency",
                settings | {"artifact": str(artifact)},
                what="latency measurement",
                progress=handle.progress,
            ),
        )
        handle.outcome = _latency_in_words(found["rows"])
    return dict(found)


def reference_type(target: Target, source: Source, parameters: int) -> str:
    """The number format of the reference: `f32`, or `bf16` where float32 would not fit in the free memory.

    A BF16 GGUF rounds activations in llama.cpp's matrix products: its KL divergence from float32 is about 1e-4, a floor
    under every measured value; a float32 one agrees with transformers to 1e-8. A GGUF as input is its own reference.
    """
    if source.kind == "gguf":
        return "source"
    if target.measure.reference != "auto":
        return str(target.measure.reference)
    return "f32" if parameters * 4 < MEMORY_SHARE * available_memory_bytes() else "bf16"


def available_memory_bytes() -> int:
    """Memory that can be used without swapping (Linux MemAvailable; elsewhere half of the physical memory)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@contextmanager
def _reference(shop: Workshop, source: Source, kind: str) -> Iterator[Path]:
    """A full-precision GGUF of the source for the time of a measurement."""
    if kind == "source":
        yield source.path
        return
    with shop.store.scratch() as folder:
        report = run(
            "edgepack.gguf.convert:export",
            {
                "model": str(source.path),
                "preset": kind.upper(),
                "overrides": {},
                "imatrix": None,
                "shard_mb": None,
                "folder": str(folder),
                "stem": "reference",
                "threads": shop.threads,
                "allow_nonfinite": True,
                "extra_metadata": {},
            },
            what="reference for the fidelity measurement",
        )
        yield folder / report["files"][0]


def _logits(shop: Workshop, source: Source, reference: Path, kind: str, parameters: int) -> dict[str, Any]:
    """Compare the reference with transformers, unless that can't be: then say why."""
    from edgepack.conform.logits import memory_bytes

    if kind != "f32":
        return {"compared": False, "note": f"the reference is {kind}: transformers is compared with a float32 one only"}
    need, free = memory_bytes(parameters), available_memory_bytes()
    if need > free:
        note = f"transformers needs about {need / 1e9:.1f} GB for the source in float32, {free / 1e9:.1f} GB are free"
        shop.listener(Event("note", "logits", f"not compared with transformers: {note}"))
        return {"compared": False, "note": note}
    found = run(
        "edgepack.conform.logits:logits",
        {"reference_gguf": str(reference), "source": str(source.path), "threads": shop.threads},
        what="comparison with transformers",
    )
    return {"compared": True} | dict(found)


def _fidelity_in_words(rows: list[Mapping[str, Any]], kind: str) -> str:
    values = {row["name"]: row["value"] for row in rows}
    if "cosine_mean" in values:
        return f"cosine {values['cosine_mean']:.5f} against the {kind} source"
    shown = [
        f"{name} {values[name]:.4g}"
        for name in ("mean_kld", "perplexity", "top1_agreement")
        if values.get(name) is not None
    ]
    return ", ".join(shown) + f" against the {kind} source"


def _latency_in_words(rows: list[Mapping[str, Any]]) -> str:
    values = {row["name"]: row["value"] for row in rows}
    shown = (
        ("ttft_ms_p50", "first token {:.0f} ms"),
        ("decode_tokens_per_s_p50", "{:.0f} tokens/s"),
        ("peak_rss_mb", "{:.0f} MB"),
    )
    return ", ".join(words.format(values[name]) for name, words in shown if values.get(name) is not None)


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    from edgepack.files import sha256_of

    return sha256_of(Path(path))
