"""Size, memory and speed of an artifact, predicted before any weight is read.

Bytes are exact (the file is laid out, header and all). Memory and speed are estimates and say so: they are shown beside
the measurement in every package, so that a user sees how far to trust them.

    ram           = file + key-value cache + compute buffer + runtime
    ms per token  = bytes read per token / (bandwidth x efficiency) + overhead per layer

Bytes read per token are the weights of every layer and the output matrix plus the key-value cache, not the embedding
rows: those are looked up (a tied embedding is read whole, as the output matrix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgepack.gguf.convert import Layout
    from edgepack.gguf.model import ModelSpec
    from edgepack.targets import Target

MB = 1_000_000

# llama.cpp reserves its graph for a full micro-batch whose every position asks for logits (llama-context.cpp,
# graph_reserve).
UBATCH = 512
# Live activations at the widest point of a layer, in floats per token and row of its widest matrix.
LIVE_ROWS = 2.5
# llama.cpp's libraries, the vocabulary's tables and the process that drives them, measured on x86-64 Linux.
RUNTIME_MB = 60
# Time per layer and token that does not depend on bytes: graph dispatch and thread barriers (x86-64, 2 threads).
OVERHEAD_MS_PER_LAYER = 0.04
# Observed tokens/s lie between these factors of the estimate, over the published rows in docs/targets.md.
SPEED_RANGE = (0.75, 1.35)


@dataclass(frozen=True)
class Prediction:
    """What an artifact is expected to cost on the target.

    Args:
        artifact_bytes: Bytes of all model files; exact.
        bits_per_weight: Tensor bits over parameters; exact.
        ram_mb: Resident memory at the target's context, in MB (10^6 bytes).
        kv_mb: Key-value cache part of it.
        compute_mb: Compute buffer part of it.
        decode_tokens_per_s: Mid estimate; None when the target does not state its memory bandwidth.
        decode_range: Low and high estimate.
    """

    artifact_bytes: int
    bits_per_weight: float
    ram_mb: float
    kv_mb: float
    compute_mb: float
    decode_tokens_per_s: float | None
    decode_range: tuple[float, float] | None

    def as_json(self) -> dict[str, object]:
        """The prediction as it stands in `plan.json`."""
        return {
            "artifact_bytes": self.artifact_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "ram_mb": round(self.ram_mb, 1),
            "kv_mb": round(self.kv_mb, 1),
            "compute_mb": round(self.compute_mb, 1),
            "decode_tokens_per_s": _rounded(self.decode_tokens_per_s),
            "decode_tokens_per_s_range": [_rounded(x) for x in self.decode_range] if self.decode_range else None,
        }


def predict(model: ModelSpec, layout: Layout, target: Target) -> Prediction:
    """Predict what `layout` costs on `target`.

    Args:
        model: The described model.
        layout: Its exact file layout at one quantization.
        target: The device; its context (capped by the model's) sizes the key-value cache.

    Returns:
        The prediction.
    """
    context = effective_context(model, target)
    kv_bytes = 0 if model.embedding else model.kv_bytes(context)
    compute = _compute_bytes(model)
    ram = layout.total_bytes + kv_bytes + compute + RUNTIME_MB * MB
    speed = None if model.embedding else _decode_speed(model, layout, target, kv_bytes)
    return Prediction(
        artifact_bytes=layout.total_bytes,
        bits_per_weight=layout.bits_per_weight,
        ram_mb=ram / MB,
        kv_mb=kv_bytes / MB,
        compute_mb=compute / MB,
        decode_tokens_per_s=speed,
        decode_range=(speed * SPEED_RANGE[0], speed * SPEED_RANGE[1]) if speed else None,
    )


def effective_context(model: ModelSpec, target: Target) -> int:
    """The target's context, or the model's own where that is shorter."""
    return min(target.runtime.context, model.context_length)


def _compute_bytes(model: ModelSpec) -> int:
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    embedding = shapes.get("token_embd.weight", (0, 0))
    widest = max((t.rows for t in model.tensors if t.name.startswith("blk.")), default=0)
    vocabulary = 0 if model.embedding else embedding[0]
    return int(UBATCH * 4 * (vocabulary + LIVE_ROWS * widest + 4 * embedding[1]))


def _decode_speed(model: ModelSpec, layout: Layout, target: Target, kv_bytes: int) -> float | None:
    bandwidth = target.device.memory_bandwidth_gbs * target.device.bandwidth_efficiency * 1e9
    if bandwidth <= 0:
        return None
    lookup_only = {"position_embd.weight", "token_types.weight"} | (set() if model.tied else {"token_embd.weight"})
    read = sum(e.nbytes for shard in layout.shards for e in shard.entries if e.name not in lookup_only)
    # Half the cache: the average over a generation that fills the context from empty.
    milliseconds = (read + kv_bytes / 2) / bandwidth * 1e3 + OVERHEAD_MS_PER_LAYER * model.layers
    return 1e3 / milliseconds


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
