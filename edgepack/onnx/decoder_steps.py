"""Each step of a build for a decoder: write the ORT GenAI folder, prove it there, measure it on GGUF's windows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.backend import Candidate, Described
from edgepack.errors import StepError
from edgepack.events import step
from edgepack.predict import MB, SPEED_RANGE, Prediction
from edgepack.worker import run
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
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target

# Best first: what the plan tries against the budgets, where the provider takes it.
AUTO = ("fp16", "int8", "int4-mixed", "int4", "int4-small")
# onnxruntime-genai, its libraries and the process that drives them.
RUNTIME_MB = 120
# The providers ORT GenAI names, by what onnxruntime calls them.
PROVIDERS: Mapping[str, str] = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "WebGpuExecutionProvider": "webgpu",
    "NvTensorRTRTXExecutionProvider": "NvTensorRtRtx",
}


def describe(source: Source, target: Target) -> Described:
    """The decoder, if ORT GenAI has a graph for it."""
    from edgepack.checkpoint import open_checkpoint
    from edgepack.onnx.genai_builder import check_architecture

    checkpoint = open_checkpoint(source.path)
    check_architecture(checkpoint)
    positions = int(checkpoint.config.get("max_position_embeddings") or target.runtime.context)
    return Described(
        architecture=str(checkpoint.config["architectures"][0]),
        parameters=checkpoint.parameters,
        context=min(target.runtime.context, positions),
        embedding=False,
        model=checkpoint,
    )


def names(described: Described, target: Target) -> Sequence[str]:
    """Recipes that the provider takes, best first."""
    from edgepack.onnx.decoder_recipes import taken_by

    return [name for name in AUTO if taken_by(name, _provider(target))]


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """A recipe and its predicted size, memory and speed, and the memory that making it takes.

    Raises:
        UsageError: An unknown recipe, one that the provider can't run, or a size that does not belong to it.
    """
    from edgepack.onnx.decoder_recipes import check_options, check_recipe, export_memory, predicted_bytes

    provider = _provider(target)
    recipe = check_recipe(quantize, provider)
    if target.onnx.bits_per_weight and recipe.calibrated:
        check_options({"bits_per_weight": target.onnx.bits_per_weight}, recipe)
    size = predicted_bytes(described.model, quantize, provider=provider, bits_per_weight=target.onnx.bits_per_weight)
    kv = _cache_bytes(described.model.config, described.context, provider)
    bandwidth = target.device.memory_bandwidth_gbs * target.device.bandwidth_efficiency * 1e9
    speed = bandwidth / (size + kv / 2) if bandwidth > 0 else None
    bounds = (speed * SPEED_RANGE[0], speed * SPEED_RANGE[1]) if speed else None
    need = export_memory(described.model, quantize, threads=target.runtime.threads or target.device.cores)
    prediction = Prediction(
        artifact_bytes=size,
        bits_per_weight=8 * size / described.parameters,
        ram_mb=(size + kv) / MB + RUNTIME_MB,
        kv_mb=kv / MB,
        compute_mb=0.0,
        decode_tokens_per_s=speed,
        decode_range=bounds,
        exact=False,
        build_mb=need / MB,
    )
    return Candidate(quantize, prediction)


def _cache_bytes(config: Mapping[str, Any], context: int, provider: str) -> int:
    """The key-value cache: float32 on a CPU, float16 elsewhere."""
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config["num_hidden_layers"]) * kv_heads * width * context * (4 if provider == "cpu" else 2)


def _provider(target: Target) -> str:
    """The target's provider as ORT GenAI names it; its own names are taken as well."""
    return PROVIDERS.get(target.onnx.provider, target.onnx.provider)


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Write model.onnx, its weights, genai_config.json and the tokenizer: one streaming pass.

    Raises:
        StepError: The machine lacks the memory it is predicted to take; nothing was started.
    """
    from edgepack.onnx.decoder_recipes import RECIPES

    more: dict[str, Any] = {"context": plan.context, "threads": shop.threads}
    if RECIPES[plan.quantize].calibrated and plan.target.onnx.bits_per_weight:
        more["bits_per_weight"] = plan.target.onnx.bits_per_weight
    options = {"recipe": plan.quantize, "provider": _provider(plan.target), "options": more}
    with step(shop.listener, "export", f"{stem}", unit="weights") as handle:

        def make(folder: Path) -> None:
            _refuse_without_memory(plan)
            before = stamps(source)
            report = run(
                "edgepack.onnx.decoder:export",
                options | {"model": str(source.path), "folder": str(folder)},
                what="export to ORT GenAI",
                progress=handle.progress,
            )
            refuse_changed(source, before)
            (folder / "report.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")

        entry = shop.store.step("genai-export", keyed(options | {"model": source.files}), make)
        report = json.loads(entry.files["report.json"].path.read_text(encoding="utf-8"))
        files = tuple(sorted(file for file in entry.files if file != "report.json"))
        exported = Exported(entry, files, "model.onnx", report)
        handle.cached = entry.cached
        handle.outcome = f"{stem}  {exported.size / MB:,.1f} MB, {report['bits_per_weight']:.3f} bits/weight"
    return exported


def _refuse_without_memory(plan: Plan) -> None:
    """Refuse before the start what the system would kill in the middle."""
    need, free = int((plan.prediction.build_mb or 0) * MB), available_memory_bytes()
    if need <= free:
        return
    less = min(plan.candidates, key=lambda one: one.prediction.build_mb or 0)
    words = "Free memory, or build on a larger machine."
    if (less.prediction.build_mb or 0) * MB <= free:
        words = f"Free memory, or --quantize {less.quantize}, which takes {less.prediction.build_mb:,.0f} MB."
    raise StepError(
        f"export to ORT GenAI: {plan.quantize} of {plan.parameters / 1e6:,.0f}M parameters takes about "
        f"{need / MB:,.0f} MB of memory, and {free / MB:,.0f} MB are free",
        hint=words,
    )


def conform(shop: Workshop, source: Source, plan: Plan, exported: Exported) -> dict[str, Any]:
    """Token ids and chats of ORT GenAI's own tokenizer against transformers."""
    arguments = {"package": str(exported.path.parent), "source": str(source.path)}
    with step(shop.listener, "conform", "token ids and chat template", unit="texts") as handle:
        found, handle.cached = shop.remember(
            "genai-conform",
            {"artifact": exported.digest, "source": source.files},
            lambda: {
                "tokens": run(
                    "edgepack.conform.onnx_tokens:tokens", arguments, what="token check", progress=handle.progress
                ),
                "chat": run("edgepack.conform.onnx_tokens:chat", arguments, what="chat template check"),
            },
        )
        handle.outcome = f"token ids equal on {found['tokens']['texts']:,} texts, {found['chat']['chats']} chats"
    return dict(found)


def samples(shop: Workshop, plan: Plan, exported: Exported) -> list[dict[str, Any]]:
    """Load the folder in ORT GenAI and keep what it says to fixed prompts."""
    if not _runs_here(plan.target):
        return []
    arguments = {"artifact": str(exported.path.parent), "threads": shop.threads}
    with step(shop.listener, "samples", exported.main, unit="prompts") as handle:
        found, handle.cached = shop.remember(
            "genai-samples",
            {"artifact": exported.digest, "threads": shop.threads},
            lambda: run(
                "edgepack.measure.onnx_samples:generate", arguments, what="first run", progress=handle.progress
            ),
        )
        handle.outcome = f"loaded by ORT GenAI, {len(found)} prompts"
    return list(found)


def fidelity(
    shop: Workshop, source: Source, target: Target, artifact: Path, digest: str, text: Path, *, parameters: int
) -> dict[str, Any]:
    """The rows of GGUF, on the same windows, against transformers in float32."""
    if not _runs_here(target):
        return {"rows": []}
    settings = {
        "windows": target.measure.windows,
        "window_tokens": target.measure.window_tokens,
        "threads": shop.threads,
    }
    inputs = settings | {"artifact": digest, "source": source.files, "text": sha256(text)}
    arguments = settings | {"candidate": str(artifact.parent), "source": str(source.path), "text": str(text)}
    with step(shop.listener, "fidelity", "against transformers in float32", unit="windows") as handle:
        found, handle.cached = shop.remember(
            "genai-fidelity",
            inputs,
            lambda: dict(
                run("edgepack.measure.onnx_fidelity:decoder_fidelity", arguments, what="fidelity measurement",
                    progress=handle.progress)
            ) | {"reference": {"type": "f32", "read_by": "transformers"}, "machine": machine_facts()},
        )  # fmt: skip
        values = {row["name"]: row["value"] for row in found["rows"]}
        handle.outcome = ", ".join(
            f"{name} {values[name]:.4g}" for name in ("mean_kld", "perplexity") if values.get(name)
        )
    return dict(found)


def latency(shop: Workshop, target: Target, artifact: Path, digest: str, context: int) -> dict[str, Any]:
    """Time to first token, decode rate, load time and memory through ORT GenAI."""
    if not _runs_here(target):
        return {"rows": [], "machine": machine_facts()}
    measure = target.measure
    settings = {
        "prompt_tokens": min(measure.prompt_tokens, max(1, context - measure.decode_tokens - 1)),
        "decode_tokens": min(measure.decode_tokens, max(2, context // 2)),
        "repetitions": measure.repetitions,
        "warmups": measure.warmups,
        "pause_seconds": measure.pause_seconds,
        "threads": shop.threads,
        "context": context,
    }
    with step(shop.listener, "latency", f"ORT GenAI, {shop.threads} threads", unit="runs") as handle:
        found, handle.cached = shop.remember(
            "genai-latency",
            settings | {"artifact": digest},
            lambda: {
                "machine": machine_facts(),
                **run("edgepack.measure.onnx_latency:decoder_latency", settings | {"artifact": str(artifact.parent)},
                      what="latency measurement", progress=handle.progress),
            },
        )  # fmt: skip
        values = {row["name"]: row["value"] for row in found["rows"]}
        handle.outcome = f"first token {values['ttft_ms_p50']:.0f} ms, {values['decode_tokens_per_s_p50']:.0f} tokens/s"
    return dict(found)


def runtime(plan: Plan, exported: Exported) -> dict[str, Any]:
    """Load options for `runtime.json`."""
    return {
        "engine": "onnxruntime-genai",
        "min_version": "0.18",
        "threads": plan.target.runtime.threads,
        "context": plan.context,
        "gpu_layers": 0,
        "embedding": False,
        "provider": plan.target.onnx.provider,
    }


def tokenizer(source: Source, exported: Exported) -> dict[str, bytes]:
    """Nothing: ORT GenAI wants its tokenizer beside the model."""
    return {}


def recipe(exported: Exported) -> dict[str, Any]:
    """What came of the options, for the manifest."""
    keys = ("recipe", "provider", "bytes_by_part", "formats", "weights_by_format", "calibration")
    return {key: exported.report[key] for key in keys if exported.report.get(key) is not None}


def _runs_here(target: Target) -> bool:
    """A graph for another provider can be built here and not run."""
    return _provider(target) == "cpu"
