"""The steps from source to artifact: what each took away, what it cost, and how fast the model is after it.

One row a step: bytes, parameters, floating-point operations per token, divergence from the source, perplexity,
agreement, and tokens per second as predicted for the target and as measured. Rows before the last are of weights in the
source's own number format, their fidelity measured in transformers; the last row is the artifact in its runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepack.figures import significant
from edgepack.predict import decode_rate
from edgepack.preparing import Prepared
from edgepack.targets import Target

_SIZES = ("step", "bytes", "parameters", "flops_per_token", "layers")
_FIDELITY = ("mean_kld", "perplexity", "top1_agreement", "cosine_mean", "cosine_p01")
# Rows of a package's measurements that say how fast it is, decoders first.
_SPEED = ("decode_tokens_per_s_p50", "ttft_ms_p50", "latency_ms_p50")


def in_manifest(prepared: Prepared) -> dict[str, Any]:
    """What the recipe says: `prune` and `heal`, without scores, lists of tokens, and times."""
    if not prepared.changed:
        return {}
    documents = prepared.pruning
    removed = {
        name: {key: value for key, value in gone.items() if key != "kept"}
        for document in documents
        for name, gone in document["removed"].items()
    }
    prune = {
        "requests": [document["request"] for document in documents],
        "kept_layers": documents[-1]["kept_layers"],
        "removed": removed,
        "text": documents[-1]["text"],
        "steps": _before_quantization(prepared),
    }
    if prepared.healing is None:
        return {"prune": prune}
    healing = {key: value for key, value in prepared.healing.items() if key not in ("cost", "held_out")}
    return {"prune": prune, "heal": healing}


def rows(
    prepared: Prepared,
    target: Target,
    *,
    quantize: str,
    artifact_bytes: int,
    kv_bytes: float,
    predicted_rate: float | None,
    measured: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """The steps of a package; empty where there was none before quantization.

    Args:
        prepared: What was done before quantization.
        target: Where it will run.
        quantize: The last step's name.
        artifact_bytes: Size of the artifact.
        kv_bytes: Key-value cache of the artifact at the target's context.
        predicted_rate: Tokens per second predicted for the artifact.
        measured: Values of the package's measurements by name.
    """
    if not prepared.changed:
        return []
    found = _before_quantization(prepared)
    layers = found[-1].get("layers") or 1
    for row in found:
        row |= _predicted(_rate(row, target, kv_bytes * (row.get("layers") or layers) / layers, predicted_rate))
    last = {key: found[-1][key] for key in _SIZES if key in found[-1]} | {"step": quantize, "bytes": artifact_bytes}
    last |= {name: measured[name] for name in _FIDELITY if measured.get(name) is not None}
    last |= _predicted(predicted_rate)
    last |= {name: measured[name] for name in _SPEED if measured.get(name) is not None}
    return [*found, last]


def _before_quantization(prepared: Prepared) -> list[dict[str, Any]]:
    first = prepared.pruning[0]["before"]
    steps = [first, *(row for document in prepared.pruning for row in document["steps"])]
    found = [{key: row[key] for key in (*_SIZES, *_FIDELITY) if key in row} for row in steps]
    if prepared.healing is not None:
        after = prepared.healing["evaluation"]["after"]
        healed = {key: found[-1][key] for key in _SIZES if key in found[-1]} | {"step": "heal"}
        found.append(healed | {key: after[key] for key in _FIDELITY if key in after})
    return found


def _rate(row: Mapping[str, Any], target: Target, kv_bytes: float, artifact: float | None) -> float | None:
    """Tokens per second of weights as they are: read once per token, all that a token is multiplied by."""
    if artifact is None or not row.get("layers") or not row.get("parameters"):
        return None
    read = row["flops_per_token"] / 2 * row["bytes"] / row["parameters"]
    return decode_rate(read, kv_bytes, row["layers"], target.device)


def _predicted(rate: float | None) -> dict[str, float]:
    return {} if rate is None else {"predicted_decode_tokens_per_s": significant(rate, 3)}
