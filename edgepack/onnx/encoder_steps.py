"""Each step of a build for an encoder: export the graph, quantize it, prove it in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.backend import Candidate, Described
from edgepack.errors import UsageError
from edgepack.events import step
from edgepack.predict import MB, Prediction
from edgepack.worker import run
from edgepack.workshop import Exported, Workshop, keyed, machine_facts, refuse_changed, sha256, stamps

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target

# What the plan chooses from, best first: 8 bits lose next to nothing and are the fastest on every CPU.
NAMES = ("int8", "int4")
# A graph without weights, and what onnxruntime and the process that drives it hold before a model is loaded.
GRAPH_BYTES = 400_000
RUNTIME_MB = 90
# onnxruntime packs matrices for its kernels when it loads them: file and packed copy are resident together at the peak.
LOADED_COPIES = 2.0
SAMPLES = 200
# Files an app needs to make the model's input, beside tokenizer.json.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "sentence_bert_config.json",
    "config_sentence_transformers.json", "modules.json", "preprocessor_config.json", "config.json",
)  # fmt: skip


def describe(source: Source, target: Target) -> Described:
    """The encoder and the task it will be exported for."""
    from edgepack.checkpoint import open_checkpoint
    from edgepack.onnx.tasks import task_of

    checkpoint = open_checkpoint(source.path)
    task = task_of(checkpoint.config, checkpoint.path, target.onnx.task)
    classes = checkpoint.config.get("architectures") or [checkpoint.model_type]
    positions = checkpoint.config.get("max_position_embeddings") or 0
    return Described(
        architecture=str(classes[0]),
        parameters=checkpoint.parameters,
        context=min(target.runtime.context, int(positions)) if positions else target.runtime.context,
        embedding=True,
        model=task,
    )


def names(described: Described, target: Target) -> tuple[str, ...]:
    """Recipes, best first."""
    return NAMES


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """A recipe and its estimated size."""
    from edgepack.onnx.recipes import recipe_named

    bits = recipe_named(quantize).weight_bits
    size = int(described.parameters * bits / 8 * (1.02 if bits < 16 else 1)) + GRAPH_BYTES
    ram = size * LOADED_COPIES / MB + RUNTIME_MB
    prediction = Prediction(size, 8 * size / described.parameters, ram, 0.0, 0.0, None, None, exact=False)
    return Candidate(quantize, prediction)


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Export the float graph, then quantize it."""
    graph = _float_graph(shop, source, plan)
    options = _quantizer_options(source, plan)
    inputs = {key: value for key, value in options.items() if key not in ("source", "calibration")} | {
        "graph": graph.digest, "model": source.files, "calibration": sha256(calibration(plan.target)),
    }  # fmt: skip

    def write(folder: Path, handle: Any) -> dict[str, Any]:
        arguments = options | {"model": str(graph.path.parent), "folder": str(folder)}
        report = run("edgepack.onnx.quantize:quantize", arguments, what="quantization", progress=handle.progress)
        return dict(report)

    return _stored(shop, "quantize", f"{stem}.onnx", inputs, write, extra=graph.report)


def _float_graph(shop: Workshop, source: Source, plan: Plan) -> Exported:
    onnx = plan.target.onnx
    options = {"task": onnx.task, "batch": onnx.batch, "sequence": onnx.sequence}

    def write(folder: Path, handle: Any) -> dict[str, Any]:
        before = stamps(source)
        arguments = options | {"model": str(source.path), "folder": str(folder)}
        report = run("edgepack.onnx.export:export", arguments, what="export to ONNX", progress=handle.progress)
        refuse_changed(source, before)
        return dict(report)

    return _stored(shop, "export", f"{source.name} in float32", options | {"model": source.files}, write)


def _stored(
    shop: Workshop,
    name: str,
    detail: str,
    inputs: Mapping[str, Any],
    write: Callable[[Path, Any], dict[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> Exported:
    """Run one writing step through the store; its report lies beside the files."""
    with step(shop.listener, name, detail, unit="parts") as handle:

        def make(folder: Path) -> None:
            report = dict(extra or {}) | write(folder, handle)
            (folder / "report.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")

        entry = shop.store.step(f"onnx-{name}", keyed(inputs), make)
        report = json.loads(entry.files["report.json"].path.read_text(encoding="utf-8"))
        files = tuple(sorted(file for file in entry.files if file != "report.json"))
        exported = Exported(entry, files, "model.onnx", report | {"bits_per_weight": 0.0})
        bits = 8 * exported.size / report["parameters"]
        exported = Exported(entry, files, "model.onnx", report | {"bits_per_weight": bits})
        handle.cached = entry.cached
        chosen = report.get("recipe") or f"opset {report['opset']}"
        handle.outcome = f"{detail}  {exported.size / MB:,.1f} MB, {chosen}"
    return exported


def _quantizer_options(source: Source, plan: Plan) -> dict[str, Any]:
    target = plan.target
    return {
        "recipe": plan.quantize,
        "calibration": str(calibration(target)),
        "arch": target.device.arch,
        "provider": target.onnx.provider,
        "source": str(source.path),
    }


def calibration(target: Target) -> Path:
    """The text quantizers are calibrated on: never the evaluation text."""
    from edgepack.text import default_calibration_text

    return Path(target.quantize.calibration) if target.quantize.calibration else default_calibration_text()


def conform(shop: Workshop, source: Source, plan: Plan, exported: Exported) -> dict[str, Any]:
    """The tokenizer that travels in the package against the source's, and the graph against transformers."""
    report = exported.report
    graph = {"max_abs_diff": report["max_abs_diff"], "shapes": report["compared"]}
    if report.get("image"):
        return {"graph": graph}
    arguments = {"package": str(source.path), "source": str(source.path)}
    with step(shop.listener, "conform", "token ids", unit="texts") as handle:
        found, handle.cached = shop.remember(
            "onnx-conform",
            {"source": source.files},
            lambda: run("edgepack.conform.onnx_tokens:tokens", arguments, what="token check", progress=handle.progress),
        )
        handle.outcome = f"token ids equal on {found['texts']:,} texts, graph within {graph['max_abs_diff']:.1e}"
    return {"tokens": dict(found), "graph": graph}


def samples(shop: Workshop, plan: Plan, exported: Exported) -> list[dict[str, Any]]:
    """Load the artifact in onnxruntime and keep its outputs for fixed inputs."""
    arguments = {"artifact": str(exported.path), "threads": shop.threads, "provider": plan.target.onnx.provider}
    with step(shop.listener, "samples", exported.main, unit="inputs") as handle:
        found, handle.cached = shop.remember(
            "onnx-samples",
            {"artifact": exported.digest, "threads": shop.threads},
            lambda: run("edgepack.measure.onnx_samples:samples", arguments, what="first run", progress=handle.progress),
        )
        handle.outcome = f"loaded by onnxruntime, {len(found)} inputs"
    return list(found)


def fidelity(
    shop: Workshop, source: Source, target: Target, artifact: Path, digest: str, text: Path, *, parameters: int
) -> dict[str, Any]:
    """Cosines, neighbours and labels against transformers in float32."""
    settings = {
        "task": target.onnx.task, "samples": SAMPLES, "threads": shop.threads, "provider": target.onnx.provider,
    }  # fmt: skip
    inputs = settings | {"artifact": digest, "source": source.files, "text": sha256(text)}
    arguments = settings | {"reference": str(source.path), "candidate": str(artifact), "text": str(text)}
    with step(shop.listener, "fidelity", "against transformers in float32", unit="samples") as handle:
        found, handle.cached = shop.remember(
            "onnx-fidelity",
            inputs,
            lambda: dict(
                run("edgepack.measure.encoder_fidelity:encoder_fidelity", arguments, what="fidelity measurement",
                    progress=handle.progress)
            ) | {"reference": {"type": "f32", "read_by": "transformers"}, "machine": machine_facts()},
        )  # fmt: skip
        values = {row["name"]: row["value"] for row in found["rows"]}
        shown = [f"{name} {value:.5g}" for name, value in values.items() if value is not None]
        handle.outcome = ", ".join(shown[:3])
    return dict(found)


def latency(shop: Workshop, target: Target, artifact: Path, digest: str, context: int) -> dict[str, Any]:
    """Latency at batch 1, by length, and memory."""
    settings = {
        "batch": target.onnx.batch or 1,
        "lengths": [target.onnx.sequence or min(target.measure.prompt_tokens, context)],
        "repetitions": target.measure.repetitions,
        "threads": shop.threads,
        "provider": target.onnx.provider,
    }
    with step(shop.listener, "latency", f"{artifact.name}, {shop.threads} threads", unit="runs") as handle:
        found, handle.cached = shop.remember(
            "onnx-latency",
            settings | {"artifact": digest},
            lambda: {
                "machine": machine_facts(),
                **run("edgepack.measure.onnx_latency:encoder_latency", settings | {"artifact": str(artifact.parent)},
                      what="latency measurement", progress=handle.progress),
            },
        )  # fmt: skip
        values = {row["name"]: row["value"] for row in found["rows"]}
        handle.outcome = f"{values['latency_ms_p50']:.2f} ms, {values['peak_rss_mb']:.0f} MB"
    return dict(found)


def runtime(plan: Plan) -> dict[str, Any]:
    """Load options for `runtime.json`."""
    options = plan.target.runtime
    return {
        "engine": "onnxruntime",
        "min_version": "1.31",
        "threads": options.threads,
        "context": plan.context,
        "gpu_layers": 0,
        "embedding": True,
        "provider": plan.target.onnx.provider,
    }


def tokenizer(source: Source, exported: Exported) -> dict[str, bytes]:
    """What an app needs to make the graph's input: the files of the source, and the class names."""
    found = {name: (source.path / name).read_bytes() for name in TOKENIZER_FILES if (source.path / name).is_file()}
    found.pop("modules.json", None)  # pooling is inside the graph
    if exported.report.get("labels"):
        found["labels.json"] = json.dumps(exported.report["labels"], ensure_ascii=False, indent=1).encode()
    if not exported.report.get("image") and "tokenizer.json" not in found:
        raise UsageError(
            f"{source.name}: there is no tokenizer.json for the app",
            hint="Save the tokenizer with transformers' fast class.",
        )
    return found


def recipe(exported: Exported) -> dict[str, Any]:
    """What came of the options, for the manifest."""
    keys = ("task", "inputs", "outputs", "opset", "recipe", "kept", "twice", "sentence")
    return {key: exported.report[key] for key in keys if exported.report.get(key) is not None}
