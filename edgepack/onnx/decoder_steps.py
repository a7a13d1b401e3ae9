"""Each step of a build for a decoder: write the ORT GenAI folder, prove it there, measure it on GGUF's windows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.backend import Candidate, Described
from edgepack.events import step
from edgepack.predict import MB, SPEED_RANGE, Prediction
from edgepack.worker import run
from edgepack.workshop import Exported, Workshop, keyed, machine_facts, refuse_changed, sha256, stamps

if TYPE_CHECKING:
    from edgepack.checkpoint import Checkpoint
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target

# Best first: what the plan tries against the budgets.
AUTO = ("int8", "int4-mixed", "int4", "int4-small")
# Graph and genai_config.json of a small model.
GRAPH_BYTES = 150_000
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
    """Recipes, best first."""
    return AUTO


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """A recipe and its predicted size, memory and speed."""
    size = _stored_bytes(described.model, quantize)
    kv = _cache_bytes(described.model.config, described.context)
    bandwidth = target.device.memory_bandwidth_gbs * target.device.bandwidth_efficiency * 1e9
    speed = bandwidth / (size + kv / 2) if bandwidth > 0 else None
    ram = (size + kv) / MB + RUNTIME_MB
    bounds = (speed * SPEED_RANGE[0], speed * SPEED_RANGE[1]) if speed else None
    bits = 8 * size / described.parameters
    return Candidate(quantize, Prediction(size, bits, ram, kv / MB, 0.0, speed, bounds, exact=False))


def _stored_bytes(checkpoint: Checkpoint, quantize: str) -> int:
    """Bytes of graph and weights: matrices with a float32 scale per block, vectors in float32."""
    from edgepack.onnx.decoder import RECIPES, check_recipe

    check_recipe(quantize, "cpu")
    recipe = RECIPES[quantize]
    tied = "lm_head.weight" not in checkpoint.tensors
    size = GRAPH_BYTES
    for name, info in checkpoint.tensors.items():
        is_table = name.endswith("embed_tokens.weight")
        stored = recipe.head if name == "lm_head.weight" or (is_table and tied) else recipe.body
        stored = recipe.embedding if is_table and not tied else stored
        weights = math.prod(info.shape)
        size += (
            weights * 4
            if len(info.shape) < 2 or stored is None
            else weights * stored[0] // 8 + 4 * weights // stored[1]
        )
    return size


def _cache_bytes(config: Mapping[str, Any], context: int) -> int:
    """The key-value cache, float32 on a CPU."""
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config["num_hidden_layers"]) * kv_heads * width * context * 4


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Write model.onnx, its weights, genai_config.json and the tokenizer: one streaming pass."""
    options = {
        "recipe": plan.quantize,
        "provider": PROVIDERS.get(plan.target.onnx.provider, plan.target.onnx.provider),
        "options": {"context": plan.context, "threads": shop.threads},
    }
    with step(shop.listener, "export", f"{stem}", unit="parts") as handle:

        def make(folder: Path) -> None:
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


def runtime(plan: Plan) -> dict[str, Any]:
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
    return target.onnx.provider == "CPUExecutionProvider"
