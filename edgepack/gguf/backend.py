"""GGUF behind the pipeline: what can be planned, and each step of a build, for llama.cpp.

Every step runs in a worker process, keeps its result in the store, and returns it. The functions are the contract of
`edgepack/backend.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.backend import Candidate, Described
from edgepack.events import Event, step
from edgepack.predict import MB, effective_context, predict
from edgepack.toolchain import versions
from edgepack.worker import Limits, run, side_by_side
from edgepack.workshop import (
    Exported,
    Workshop,
    available_memory_bytes,
    keyed,
    machine_facts,
    refuse_changed,
    sha256,
    stamps,
)

if TYPE_CHECKING:
    from edgepack.gguf.file import Metadata
    from edgepack.gguf.imatrix import Imatrix
    from edgepack.gguf.model import ModelSpec
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target

# A chat template is a program from a stranger: chats render in milliseconds, starting the interpreter takes seconds.
TEMPLATE_LIMITS = Limits(wall_seconds=120, cpu_seconds=60, memory_bytes=8 << 30)
# Part of the free memory a float32 copy of the model may take, in the file cache or in transformers.
MEMORY_SHARE = 0.7


def describe(source: Source, target: Target) -> Described:
    """The model as it would be written, from headers alone."""
    from edgepack.gguf import refining
    from edgepack.gguf.model import describe as describe_model

    model = describe_model(source.path)
    refining.refuse_impossible(model, source, target)
    return Described(
        architecture=model.architecture,
        parameters=model.parameters,
        context=effective_context(model, target),
        embedding=model.embedding,
        model=(model, _imatrix(model, source, target)),
        notes=(refining.sentence(model, target.quantize.refine),) if target.quantize.refine else (),
    )


def names(described: Described, target: Target) -> tuple[str, ...]:
    """Presets to choose from, best first: the profile's."""
    return target.quantize.candidates


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """The exact layout at one preset, or the room there is at one size, and what it is predicted to cost."""
    from edgepack.gguf import calibrated, refining
    from edgepack.gguf.convert import plan_layout
    from edgepack.gguf.presets import find_preset
    from edgepack.gguf.size import is_size

    model, imatrix = described.model
    if is_size(quantize):
        return calibrated.candidate(model, source, target, quantize, _own_metadata(source, quantize))
    name = find_preset(quantize).name
    layout = plan_layout(
        model,
        name,
        overrides=dict(target.quantize.tensors),
        imatrix=imatrix,
        shard_bytes=target.delivery.shard_mb * MB if target.delivery.shard_mb else None,
        extra_metadata=_own_metadata(source, name),
    )
    if target.quantize.refine:
        refining.refuse_types((kind.name for kind in layout.types.values()), name)
    return Candidate(name, predict(model, layout, target))


def filling(
    described: Described, source: Source, target: Target, fits: Callable[[Candidate], bool]
) -> tuple[Candidate | None, str | None]:
    """The largest calibrated file within the budgets, where the model can be calibrated here in reasonable time."""
    from edgepack.gguf import calibrated

    model, _ = described.model
    return calibrated.filling(model, source, target, lambda name: _own_metadata(source, name), fits)


def _own_metadata(source: Source, quantize: str) -> Metadata:
    from edgepack.gguf.values import string

    return {key: string(value) for key, value in _own_keys(source, quantize).items()}


def _own_keys(source: Source, quantize: str) -> dict[str, str]:
    """Keys of edgepack's own in the file: what made it and from what (llama.cpp ignores keys it does not know)."""
    keys = {"edgepack.version": versions()["edgepack"] or "unknown", "edgepack.quantize": quantize}
    return keys | ({"edgepack.source_commit": source.commit} if source.commit else {})


def _imatrix(model: ModelSpec, source: Source, target: Target) -> Imatrix | None:
    """The one that was given; where text was given to make one from, a stand-in of the same names and sizes."""
    from edgepack.calibrate.imatrix_file import refuse_other_model
    from edgepack.gguf import calibrated
    from edgepack.gguf.imatrix import read_imatrix

    if target.quantize.imatrix is not None:
        found = read_imatrix(Path(target.quantize.imatrix))
        refuse_other_model(found, {tensor.name: tensor.shape for tensor in model.tensors}, target.quantize.imatrix)
        return found
    return calibrated.promised_imatrix(model, source, target) if target.quantize.calibration else None


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Write the artifact: one streaming pass from safetensors to the quantized GGUF."""
    tuned, evidence, statistics = _tuned(shop, source, plan)
    arguments = _export_arguments(source, plan, stem) | tuned
    imatrix = arguments["imatrix"]
    inputs = arguments | {
        "model": source.files,
        "imatrix": sha256(imatrix) if imatrix else None,
        "statistics": statistics,
    }

    with step(shop.listener, "export", f"{stem}.gguf", unit="bytes") as handle:

        def make(folder: Path) -> None:
            before = stamps(source)
            report = run(
                "edgepack.gguf.convert:export",
                arguments | {"folder": str(folder), "threads": shop.threads},
                what="export to GGUF",
                progress=handle.progress,
            )
            refuse_changed(source, before)
            (folder / "export.json").write_text(json.dumps(report | evidence, sort_keys=True), encoding="utf-8")

        entry = shop.store.step("export", keyed(inputs), make)
        report = json.loads(entry.files["export.json"].path.read_text(encoding="utf-8"))
        files = tuple(sorted(name for name in entry.files if name.endswith(".gguf")))
        exported = Exported(entry, files, files[0], report)
        handle.cached = entry.cached
        handle.outcome = f"{stem}.gguf  {exported.size / 1e6:,.1f} MB, {report['bits_per_weight']:.3f} bits/weight"
    if not plan.target.quantize.refine:
        return exported
    from edgepack.gguf import refining

    return refining.refined(shop, source, plan.target, exported)


def _tuned(shop: Workshop, source: Source, plan: Plan) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """What calibration changes of the export: its arguments, what the manifest says of it, the statistics' key."""
    from edgepack.gguf import calibrated
    from edgepack.gguf.size import is_size

    target = plan.target
    sized = is_size(plan.quantize)
    if not sized and not target.quantize.calibration:
        return {}, {}, None
    statistics = calibrated.calibrate(shop, source, target)
    arguments: dict[str, Any] = {"imatrix": str(statistics.path / "imatrix.gguf")}
    evidence: dict[str, Any] = {"calibration": calibrated.facts(statistics)}
    if not sized:
        return arguments, evidence, None
    limits = target.limits() if plan.chosen_by == "budgets" else {}
    own_keys = _own_metadata(source, plan.quantize)
    chosen = calibrated.allocation(shop, source, target, plan.quantize, statistics, own_keys, limits)
    arguments |= {"preset": chosen.base, "overrides": dict(chosen.types)}
    if target.quantize.feedback:
        arguments["statistics"] = str(statistics.path)
    return arguments, evidence | {"allocation": chosen.as_json()}, statistics.key


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
        "extra_metadata": _own_keys(source, plan.quantize),
    }


def conform(shop: Workshop, source: Source, plan: Plan, exported: Exported) -> dict[str, Any]:
    """Token ids and chat rendering of the artifact against its source.

    Returns:
        `{"tokens": ..., "chat": ...}` as the two checks report.

    Raises:
        ConformanceError: The first differing place.
    """
    if source.kind == "gguf":
        note = "the source is a GGUF: its vocabulary and template are copied as they are"
        return {"tokens": {"texts": 0, "note": note}, "chat": {"chats": 0, "note": note}}
    where = {"artifact": str(exported.path), "source": str(source.path)}

    def compute() -> dict[str, Any]:
        return {
            "tokens": run("edgepack.conform.tokens:tokens", where, what="token check", progress=handle.progress),
            "chat": run("edgepack.conform.chat:chat", where, what="chat template check", limits=TEMPLATE_LIMITS),
        }

    with step(shop.listener, "conform", "token ids and chat template", unit="texts") as handle:
        found, handle.cached = shop.remember("conform", {"artifact": exported.digest, "source": source.files}, compute)
        handle.outcome = _conformance_in_words(found)
        for difference in found["tokens"].get("differences", []):
            shop.listener(Event("note", "conform", f"{difference['texts']} texts differ: {difference['reason']}"))
    return dict(found)


def _conformance_in_words(found: Mapping[str, Any]) -> str:
    tokens, chats = found["tokens"], found["chat"]["chats"]
    equal = tokens.get("equal", tokens["texts"])
    return f"token ids equal on {equal:,} of {tokens['texts']:,} texts, chat ids equal on {chats} chats"


def samples(shop: Workshop, plan: Plan, exported: Exported) -> list[dict[str, Any]]:
    """Load the artifact in llama.cpp and keep what it says to fixed prompts."""
    arguments = {"artifact": str(exported.path), "embedding": plan.embedding, "threads": shop.threads}
    with step(shop.listener, "samples", exported.main, unit="prompts") as handle:
        found, handle.cached = shop.remember(
            "samples",
            {"artifact": exported.digest, "threads": shop.threads},
            lambda: run("edgepack.measure.samples:samples", arguments, what="first run", progress=handle.progress),
        )
        handle.outcome = f"loaded by llama.cpp, {len(found)} prompts"
    return list(found)


def fidelity(
    shop: Workshop, source: Source, target: Target, artifact: Path, digest: str, text: Path, *, parameters: int
) -> dict[str, Any]:
    """KL divergence, perplexity and agreement of the artifact with its source, both read by llama.cpp.

    The reference is a float32 GGUF of the source, made for the occasion and removed afterwards; it is first compared
    with transformers itself, so that a wrong conversion can't hide by being wrong twice.

    Returns:
        `{"rows": [...], "reference": {...}, "logits": {...}, "machine": {...}}`.
    """
    kind = reference_type(target, source, parameters)
    settings = {
        "windows": target.measure.windows,
        "window_tokens": target.measure.window_tokens,
        "threads": shop.threads,
    }
    inputs = settings | {"artifact": digest, "source": source.files, "text": sha256(text), "reference": kind}

    def compute() -> dict[str, Any]:
        with _reference(shop, source, kind) as reference:
            arguments = settings | {"reference": str(reference), "candidate": str(artifact), "text": str(text)}
            measured, logits = side_by_side(
                lambda: run(
                    "edgepack.measure.fidelity:fidelity",
                    arguments,
                    what="fidelity measurement",
                    progress=handle.progress,
                ),
                lambda: _logits(shop, source, reference, kind, parameters),  # remembered: of the source alone
            )
        reference_facts = {"type": kind, "read_by": "llama.cpp"}
        return dict(measured) | {"logits": logits, "reference": reference_facts, "machine": machine_facts()}

    with step(shop.listener, "fidelity", f"{artifact.name} against {_named(kind)}", unit="windows") as handle:
        found, handle.cached = shop.remember("fidelity", inputs, compute)
        handle.outcome = _fidelity_in_words(found["rows"], kind)
    return dict(found)


def conversion(shop: Workshop, source: Source, target: Target, *, parameters: int) -> dict[str, Any]:
    """A float32 GGUF of the source against transformers: needed where fidelity is measured against another model."""
    kind = reference_type(target, source, parameters)
    with (
        step(shop.listener, "conversion", f"{_named(kind)} against transformers") as handle,
        _reference(shop, source, kind) as reference,
    ):
        found = _logits(shop, source, reference, kind, parameters)
        handle.outcome = f"mean_kld {found['mean_kld']:.2g}" if found["compared"] else str(found["note"])
    return found


def latency(shop: Workshop, target: Target, artifact: Path, digest: str, context: int) -> dict[str, Any]:
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
            settings | {"artifact": digest},
            lambda: {
                "machine": machine_facts(),
                **run(
                    "edgepack.measure.latency:latency",
                    settings | {"artifact": str(artifact)},
                    what="latency measurement",
                    progress=handle.progress,
                ),
            },
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
    arguments = {"reference_gguf": str(reference), "source": str(source.path), "threads": shop.threads}
    found, _ = shop.remember(
        "logits",
        {"source": source.files, "reference": kind, "threads": shop.threads},
        lambda: run("edgepack.conform.logits:logits", arguments, what="comparison with transformers"),
    )
    return {"compared": True} | dict(found)


def _fidelity_in_words(rows: list[Mapping[str, Any]], kind: str) -> str:
    values = {row["name"]: row["value"] for row in rows}
    if "cosine_mean" in values:
        return f"cosine {values['cosine_mean']:.5f} against {_named(kind)}"
    shown = [
        f"{name} {values[name]:.4g}"
        for name in ("mean_kld", "perplexity", "top1_agreement")
        if values.get(name) is not None
    ]
    return ", ".join(shown) + f" against {_named(kind)}"


def _named(kind: str) -> str:
    return "the source itself" if kind == "source" else f"the {kind} source"


def _latency_in_words(rows: list[Mapping[str, Any]]) -> str:
    values = {row["name"]: row["value"] for row in rows}
    shown = (
        ("ttft_ms_p50", "first token {:.0f} ms"),
        ("decode_tokens_per_s_p50", "{:.0f} tokens/s"),
        ("peak_rss_mb", "{:.0f} MB"),
    )
    return ", ".join(words.format(values[name]) for name, words in shown if values.get(name) is not None)


def runtime(plan: Plan, exported: Exported) -> dict[str, Any]:
    """Load options for `runtime.json`."""
    options = plan.target.runtime
    return {
        "engine": "llama.cpp",
        "min_version": options.min_version,
        "threads": options.threads,
        "context": plan.context,
        "gpu_layers": options.gpu_layers,
        "embedding": plan.embedding,
    }


def tokenizer(source: Source, exported: Exported) -> dict[str, bytes]:
    """Nothing: a GGUF embeds its tokenizer."""
    return {}


def recipe(exported: Exported) -> dict[str, Any]:
    """What came of the options, for the manifest."""
    names = ("types", "nonfinite", "calibration", "allocation", "feedback", "refine")
    return {name: exported.report[name] for name in names if exported.report.get(name) is not None}


def toolchain(exported: Exported) -> dict[str, Any]:
    """What wrote the bytes, beyond Python packages."""
    return {"ggml": exported.report["ggml"]}
