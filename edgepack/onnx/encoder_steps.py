"""Each step of a build for an encoder: export the graph, find the precision that pays, prove it in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.backend import Candidate, Described
from edgepack.errors import UsageError
from edgepack.events import step
from edgepack.onnx.recipes import AUTO, DEFAULT_BUDGETS, recipe_named, tried
from edgepack.predict import MB, Prediction
from edgepack.worker import run
from edgepack.workshop import Exported, Workshop, keyed, machine_facts, refuse_changed, sha256, stamps

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target

# A graph without weights, and what onnxruntime and the process that drives it hold before a model is loaded.
GRAPH_BYTES = 400_000
RUNTIME_MB = 90
# onnxruntime packs matrices for its kernels when it loads them: file and packed copy are resident together at the peak.
LOADED_COPIES = 2.0
SAMPLES = 300  # three beyond a 1 % quantile
LENGTHS = (16, 64, 128, 512)  # tokens timed beside the profile's own: a query, a sentence or two, a passage, the most
# RoBERTa and its kin number positions from the padding index on (create_position_ids_from_input_ids): a table of 514
# rows is for 512 tokens. MPNet's padding index is 1 whatever its configuration says (modeling_mpnet.py).
_POSITIONS_AFTER_PADDING = frozenset(
    ["camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xmod"]
)
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
    positions = _positions(checkpoint.config, checkpoint.model_type)
    return Described(
        architecture=str(classes[0]),
        parameters=checkpoint.parameters,
        context=min(target.runtime.context, positions) if positions else target.runtime.context,
        embedding=True,
        model=task,
        defaults=_default_budgets(task.name, _classes(checkpoint.config), target),
    )


def _positions(config: Mapping[str, Any], model_type: str) -> int:
    """Most tokens the model has positions for; 0: any number."""
    positions = int(config.get("max_position_embeddings") or 0)
    if positions <= 0 or model_type not in _POSITIONS_AFTER_PADDING:
        return max(positions, 0)
    padding = 1 if model_type == "mpnet" else int(config.get("pad_token_id", 1) or 0)
    return positions - padding - 1


def _classes(config: Mapping[str, Any]) -> int:
    """Classes of a classifier; 2 where nothing is said (transformers, PretrainedConfig)."""
    return len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)


def _default_budgets(task: str, classes: int, target: Target) -> tuple[str, ...]:
    """Fidelity that is asked for where the profile does not say."""
    names = {"feature-extraction": ("cosine_mean", "cosine_p01"), "sentence-similarity": ("cosine_mean", "cosine_p01")}
    single = task == "text-classification" and classes == 1
    wanted = names.get(task, ("rank_agreement",) if single else ("label_agreement",))
    limits = target.limits()
    return tuple(f"budget.{name}={DEFAULT_BUDGETS[name]}" for name in wanted if name not in limits)


def names(described: Described, target: Target) -> tuple[str, ...]:
    """One name: the search decides by measuring, not by prediction."""
    return (AUTO,)


def candidate(described: Described, source: Source, target: Target, quantize: str) -> Candidate:
    """A recipe and its estimated size; `auto` is what it finds when 8 bits suffice, or 4 where 8 don't fit."""
    if quantize == AUTO:
        found = [candidate(described, source, target, name) for name in ("int8", "int4")]
        most = target.limits().get("artifact_bytes", {}).get("max", float("inf"))
        fitting = [one for one in found if one.prediction.artifact_bytes <= most]
        return Candidate(AUTO, (fitting or found[-1:])[0].prediction)
    bits = recipe_named(quantize).weight_bits
    size = int(described.parameters * bits / 8 * (1.02 if bits < 16 else 1)) + GRAPH_BYTES
    ram = size * LOADED_COPIES / MB + RUNTIME_MB
    prediction = Prediction(size, 8 * size / described.parameters, ram, 0.0, 0.0, None, None, exact=False)
    return Candidate(quantize, prediction)


def export(shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
    """Export the float graph, then quantize it as asked, or search for the recipe that meets the budgets."""
    graph = _float_graph(shop, source, plan)
    data = calibration(plan.target, images=bool(graph.report.get("image")))
    options = _quantizer_options(plan, graph.report)
    searching = plan.quantize == AUTO
    if searching:
        options |= _search_options(shop, plan, graph.report)
    inputs = options | {"graph": graph.digest, "model": source.files, "calibration": sha256(data) if data else None}
    function = "edgepack.onnx.search:choose" if searching else "edgepack.onnx.quantize:quantize"

    def write(folder: Path, handle: Any) -> dict[str, Any]:
        places = {"model": str(graph.path.parent), "folder": str(folder), "source": str(source.path)}
        given = {"text" if searching else "calibration": str(data) if data else None}
        report = run(function, options | places | given, what="quantization", progress=handle.progress)
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
        handle.outcome = f"{detail}  {exported.size / MB:,.1f} MB, {_found_in_words(report)}"
    return exported


def _found_in_words(report: Mapping[str, Any]) -> str:
    """What was written, and of a search how it stands."""
    search = report.get("search")
    if search is None:
        return str(report.get("recipe") or f"opset {report['opset']}")
    words = f"{report['recipe']} of {len(search['candidates'])} measured"
    better = len(report["kept"]) + len(report["finer"])
    words += f", {better} nodes in higher precision" if better else ""
    if search["missed"]:
        missed = ", ".join(f"{name} {value:.5g}" for name, value in search["missed"].items())
        words += f"; none meets the budgets, the best reaches {missed}"
    return words


def _quantizer_options(plan: Plan, graph: Mapping[str, Any]) -> dict[str, Any]:
    target = plan.target
    single = graph["task"] == "text-classification" and len(graph.get("labels") or {}) == 1
    common = {"arch": target.device.arch, "provider": target.onnx.provider, "task": graph["task"], "pairs": single}
    return common if plan.quantize == AUTO else common | {"recipe": plan.quantize}


def _search_options(shop: Workshop, plan: Plan, graph: Mapping[str, Any]) -> dict[str, Any]:
    target = plan.target
    counted = {*DEFAULT_BUDGETS, "neighbour_agreement", "artifact_bytes"}
    if target.device.is_this_machine:
        counted.add("latency_ms_p50")
    return {
        "recipes": list(tried(target.onnx.provider, images=bool(graph.get("image")))),
        "budgets": {name: dict(limit) for name, limit in target.limits().items() if name in counted},
        "threads": shop.threads,
        "tokens": _tokens(target, plan.context),
    }


def _tokens(target: Target, context: int) -> int:
    """Tokens of the main latency rows."""
    return target.onnx.sequence or min(target.measure.prompt_tokens, context)


def calibration(target: Target, *, images: bool = False) -> Path | None:
    """What quantizers are calibrated on, never the evaluation text; None for images where the user gave none."""
    from edgepack.text import default_calibration_text

    if target.quantize.calibration:
        return Path(target.quantize.calibration)
    return None if images else default_calibration_text()


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
        "lengths": list(dict.fromkeys([_tokens(target, context), *LENGTHS])),
        "longest": context,
        "image": _image_size(artifact),
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


def _image_size(artifact: Path) -> list[int] | None:
    """Height and width of a model of images, from the report beside the artifact or the package's manifest."""
    report, manifest = artifact.parent / "report.json", artifact.parent.parent / "edgepack.json"
    if report.is_file():
        found = json.loads(report.read_text(encoding="utf-8")).get("image")
    elif manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8")).get("recipe", {}).get("image")
    else:
        found = None
    return [int(side) for side in found] if found else None


def runtime(plan: Plan, exported: Exported) -> dict[str, Any]:
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
    keys = ("task", "inputs", "outputs", "opset", "recipe", "kept", "finer", "sentence", "image", "search")
    found = {key: exported.report[key] for key in keys if exported.report.get(key) is not None}
    return found | {"quantize": exported.report["recipe"]}
