"""Size, memory and speed of an artifact, predicted before any weight is read.

Bytes are exact (the file is laid out, header and all). Memory and speed are estimates and say so: they are shown beside
the measurement in every package, so that a user sees how far to trust them.

    ram           = file + repacked copy + key-value cache + compute buffer + runtime
    ms per token  = bytes read per token / (bandwidth x efficiency) + overhead per layer

llama.cpp maps the file and, on a CPU, keeps a second copy of the matrices whose type it has interleaved kernels for
(ggml-cpu/repack.cpp): mapped pages count as resident although the system may drop them. Bytes read per token are the
weights of every layer and the output matrix plus the key-value cache, not the embedding rows: those are looked up (a
tied embedding is read whole, as the output matrix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepack.figures import significant

if TYPE_CHECKING:
    from edgepack.gguf.convert import Layout
    from edgepack.gguf.model import ModelSpec
    from edgepack.target_keys import Device
    from edgepack.targets import Target

MB = 1_000_000

# llama.cpp reserves its graph for a full micro-batch whose every position asks for logits (llama-context.cpp,
# graph_reserve). Floats alive per token at the two widest points, output matrix and feed-forward, fitted to the sizes
# llama.cpp reports for tiny-llama-5m, ref-llama-37m and a 1B model at contexts from 512 to 2048 (equal to 0.1 MiB).
UBATCH = 512
# What a process that loads a model holds before: Python, numpy, llama.cpp's libraries (x86-64 Linux).
RUNTIME_MB = 45
# Types with interleaved kernels for AVX2, and for NEON with dot products (ggml_repack_get_optimal_repack_type).
REPACKED = {
    "x86_64": frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}),
    "arm64": frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"}),
}
# Time per layer and token that does not depend on bytes: graph dispatch and thread barriers (x86-64, 2 threads).
OVERHEAD_MS_PER_LAYER = 0.04
# Published tokens/s lie between these factors of the estimate (docs/targets.md, "Where the numbers are from").
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
        exact: False when the bytes are an estimate too.
        build_mb: Resident memory that making it takes, in MB; None where no step is predicted.
    """

    artifact_bytes: int
    bits_per_weight: float
    ram_mb: float
    kv_mb: float
    compute_mb: float
    decode_tokens_per_s: float | None
    decode_range: tuple[float, float] | None
    exact: bool = True
    build_mb: float | None = None

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
            **({} if self.exact else {"artifact_bytes_exact": False}),
            **({} if self.build_mb is None else {"build_mb": round(self.build_mb, 1)}),
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
    compute = _compute_bytes(model, context)
    ram = layout.total_bytes + _repacked_bytes(layout, target) + kv_bytes + compute + RUNTIME_MB * MB
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


def _compute_bytes(model: ModelSpec, context: int) -> int:
    rows = {tensor.name: tensor.rows for tensor in model.tensors}
    width = _largest(model, "embedding_length")
    vocabulary = 0 if model.embedding else rows.get("output.weight", rows.get("token_embd.weight", 0))
    output = vocabulary + 2 * width
    feed_forward = 4 * width + 3 * _largest(model, "feed_forward_length") + context / 2  # the mask, in half precision
    return int(UBATCH * 4 * max(output, feed_forward))


def _largest(model: ModelSpec, key: str) -> int:
    """A size of the architecture; the largest where it differs between layers."""
    value = model.metadata.get(f"{model.architecture}.{key}")
    if value is None:
        return 0
    return int(max(value.value) if value.element is not None else value.value)


def _repacked_bytes(layout: Layout, target: Target) -> int:
    """The second copy of the matrices that the CPU reads interleaved; the embedding is looked up and stays as it is."""
    types = REPACKED.get(target.device.arch, frozenset()) if target.device.accelerator == "none" else frozenset()
    entries = (entry for shard in layout.shards for entry in shard.entries)
    return sum(e.nbytes for e in entries if e.type.name in types and e.name != "token_embd.weight")


def _decode_speed(model: ModelSpec, layout: Layout, target: Target, kv_bytes: int) -> float | None:
    lookup_only = {"position_embd.weight", "token_types.weight"} | (set() if model.tied else {"token_embd.weight"})
    read = sum(e.nbytes for shard in layout.shards for e in shard.entries if e.name not in lookup_only)
    return decode_rate(read, kv_bytes, model.layers, target.device)


def decode_rate(read_bytes: float, kv_bytes: float, layers: int, device: Device) -> float | None:
    """Tokens per second of one running answer; None when the device does not state its memory bandwidth.

    Args:
        read_bytes: Weights read for every token.
        kv_bytes: Key-value cache at the whole context.
        layers: Transformer layers.
        device: Whose bandwidth.
    """
    bandwidth = device.memory_bandwidth_gbs * device.bandwidth_efficiency * 1e9
    if bandwidth <= 0:
        return None
    # Half the cache: the average over a generation that fills the context from empty.
    milliseconds = (read_bytes + kv_bytes / 2) / bandwidth * 1e3 + OVERHEAD_MS_PER_LAYER * layers
    return 1e3 / milliseconds


def _rounded(value: float | None) -> float | None:
    return None if value is None else significant(value, 3)
