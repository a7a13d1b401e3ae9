"""The keys of a target profile: every table as a frozen dataclass, every key with its unit, bounds and meaning.

The one place where a key is declared: the loader, the overrides, the reference page and its test all read it from here.

`MB` is 10^6 bytes wherever it stands, on disk and in memory; a device sold with "8 GB" of RAM has 8590 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edgepack.toml_schema import Key, key

# llama.cpp presets and tensor types: names only, so that reading a profile imports no numpy. tests/test_targets.py
# holds them against edgepack.gguf.recipes.PRESETS and edgepack.gguf.types.TYPES.
PRESETS = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S"),
    *("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0", "MXFP4_MOE", "Q2_0", "Q1_0"),
)
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"),
    *("MXFP4", "NVFP4", "Q1_0", "Q2_0"),
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Facts of the device; every number has its source in `[sources]`."""

    arch: str = key("text", "instruction set of the CPU", choices=("x86_64", "arm64"))
    cores: int = key("integer", "CPU cores", unit="cores", low=1, high=1024, needs_source=True)
    ram_mb: int = key("integer", "memory of the device", unit="MB", low=64, high=4_000_000, needs_source=True)
    app_ram_mb: int = key("integer", "memory one app may use", unit="MB", low=16, high=4_000_000, needs_source=True)
    memory_bandwidth_gbs: float = key(
        "number", "peak memory bandwidth", unit="GB/s", low=0.1, high=20_000, needs_source=True
    )
    bandwidth_efficiency: float = key(
        "number", "part of the bandwidth that decoding reaches", unit="1", low=0.01, high=1, needs_source=True
    )
    accelerator: str = key("text", "what the runtime computes on", choices=("none", "cuda", "metal", "vulkan", "npu"))
    is_this_machine: bool = key(
        "switch", "speed and memory measured on the machine that builds count for this target", default=False
    )


@dataclass(frozen=True, kw_only=True)
class Format:
    """File format by kind of model."""

    decoder: str = key("text", "format of language models", default="gguf", choices=("gguf", "onnx"))
    encoder: str = key("text", "format of embedders and classifiers", default="gguf", choices=("gguf", "onnx"))


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The engine and how it loads the model."""

    engine: str = key("text", "what runs the model", default="llama.cpp", choices=("llama.cpp", "onnxruntime"))
    min_version: str = key("text", "oldest engine the package is meant for", default="2026-08-14 (commit 6fed9f6f)")
    threads: int = key("integer", "CPU threads; 0 = all physical cores", unit="threads", high=1024, default=0)
    context: int = key("integer", "context length", unit="tokens", low=32, high=4_194_304, default=4096)
    gpu_layers: int = key(
        "integer", "layers on the accelerator; -1 = all", unit="layers", low=-1, high=10_000, default=0
    )


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Which quantizations the device runs well, best first."""

    default: str = key("text", "a preset, a size (4.5bpw, 2.0GB), or auto: what fills the budgets best", default="auto")
    candidates: tuple[str, ...] = key(
        "names",
        "presets that auto may choose, best first",
        choices=PRESETS,
        default=("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"),
    )
    imatrix: str | None = key("text", "path of an importance matrix (GGUF)", default=None, optional=True)
    calibration: str | None = key(
        "text",
        "text to calibrate on: a file, a folder or hub:org/dataset; none = the one that ships",
        default=None,
        optional=True,
    )
    calibration_windows: int | None = key(
        "integer", "windows of 512 tokens to calibrate on; none = by the size of the model", unit="windows", low=2,
        high=100_000, default=None, optional=True,
    )  # fmt: skip
    types: tuple[str, ...] = key(
        "names", "types a tensor of a calibrated GGUF may be given; none = those of the candidates", choices=TYPES,
        default=(),
    )  # fmt: skip
    feedback: bool = key("switch", "write calibrated GGUF types with column feedback", default=True)
    refine: int | None = key(
        "integer", "tokens to train the codes of a GGUF on, towards the source; none = not at all", unit="tokens",
        low=1024, high=1_000_000_000_000, default=None, optional=True,
    )  # fmt: skip
    allow_nonfinite: bool = key("switch", "build although a weight is NaN or infinite", default=False)
    tensors: Mapping[str, str] = field(default_factory=dict)  # the table [quantize.tensors]: name pattern = type


def _limit(meaning: str, unit: str, *, low: float = 0, high: float = math.inf) -> Any:
    return key("number", meaning, unit=unit, low=low, high=high, default=None, optional=True)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a package is held to. A key that is missing is not gated."""

    disk_mb: float | None = _limit("most bytes of all model files", "MB")
    ram_mb: float | None = _limit("most resident memory at peak", "MB")
    load_ms: float | None = _limit("longest load time", "ms")
    ttft_ms_p50: float | None = _limit("longest time to first token, median", "ms")
    ttft_ms_p90: float | None = _limit("longest time to first token, 90 % quantile", "ms")
    prefill_tokens_per_s: float | None = _limit("least prompt speed", "tokens/s")
    decode_tokens_per_s_p50: float | None = _limit("least decode speed, median", "tokens/s")
    decode_tokens_per_s_p10: float | None = _limit("least decode speed, 10 % quantile", "tokens/s")
    mean_kld: float | None = _limit("most mean KL divergence from the source model", "nats/token", high=100)
    median_kld: float | None = _limit("most median KL divergence", "nats/token", high=100)
    kld_p99: float | None = _limit("most KL divergence, 99 % quantile", "nats/token", high=100)
    top1_agreement: float | None = _limit("least share of tokens with the same first choice", "1", high=1)
    perplexity: float | None = _limit("most perplexity", "1")
    cosine_mean: float | None = _limit("least mean cosine of embeddings", "1", high=1)
    cosine_p01: float | None = _limit("least cosine of embeddings, 1 % quantile", "1", high=1)
    neighbour_agreement: float | None = _limit("least share of nearest neighbours kept", "1", high=1)
    rank_agreement: float | None = _limit("least share of pairs a reranker puts in the same order", "1", high=1)
    label_agreement: float | None = _limit("least share of labels kept", "1", high=1)
    latency_ms_p50: float | None = _limit("longest encoder latency, median", "ms")
    latency_ms_p90: float | None = _limit("longest encoder latency, 90 % quantile", "ms")
    require_on_device: bool = key(
        "switch",
        "a verdict of `incomplete` is an error too: every budget must be measured on the device",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The workload of the measurements."""

    fidelity: bool = key("switch", "compare with the source model", default=True)
    latency: bool = key("switch", "time the artifact on this machine", default=True)
    windows: int = key("integer", "evaluation windows", unit="windows", low=1, high=1_000_000, default=40)
    window_tokens: int = key("integer", "length of a window", unit="tokens", low=8, high=1_048_576, default=512)
    reference: str = key(
        "text",
        "precision of the source model; auto = f32 where it fits",
        default="auto",
        choices=("auto", "f32", "bf16"),
    )
    prompt_tokens: int = key("integer", "prompt of a timed run", unit="tokens", low=1, high=1_048_576, default=128)
    decode_tokens: int = key(
        "integer", "tokens generated in a timed run", unit="tokens", low=2, high=65_536, default=64
    )
    repetitions: int = key("integer", "timed runs", unit="runs", low=1, high=10_000, default=5)
    warmups: int = key("integer", "untimed runs before them", unit="runs", low=0, high=1000, default=1)
    pause_seconds: float = key("number", "rest between runs", unit="s", low=0, high=3600, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Limits on the way to the device."""

    shard_mb: int | None = key(
        "integer", "split the model into files of at most this size", unit="MB", low=1, high=10_000_000, default=None,
        needs_source=True, optional=True,
    )  # fmt: skip
    download_soft_limit_mb: int | None = key(
        "integer", "above this, stores ask the user before a mobile download", unit="MB", low=1, high=10_000_000,
        default=None, needs_source=True, optional=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Onnx:
    """Choices that only ONNX has."""

    task: str | None = key(
        "text", "task of an encoder; none = what the checkpoint was made for", default=None, optional=True
    )
    batch: int | None = key(
        "integer", "fixed rows of every input", unit="rows", low=1, high=4096, default=None, optional=True
    )
    sequence: int | None = key(
        "integer", "fixed tokens of every row", unit="tokens", low=1, high=1_048_576, default=None, optional=True
    )
    provider: str = key("text", "execution provider of the runtime", default="CPUExecutionProvider")
    recipe: str | None = key(
        "text", "recipe of an encoder where `quantize.default` leaves the choice; none = found by the budgets",
        default=None, optional=True,
    )  # fmt: skip
    bits_per_weight: float | None = key(
        "number", "size of a decoder in int4-mixed, everything included; none = 5.1",
        unit="bits/weight", low=4.5, high=9, default=None, optional=True,
    )  # fmt: skip
    ort: bool = key(
        "switch", "write model.ort and its operator list too, for minimal builds of onnxruntime", default=False
    )


TABLES: Mapping[str, type] = {
    "device": Device,
    "format": Format,
    "runtime": Runtime,
    "quantize": Quantize,
    "budget": Budget,
    "measure": Measure,
    "delivery": Delivery,
    "onnx": Onnx,
}
# name, description, date and aliases stand above the first table.
TOP: Mapping[str, Key] = {
    "name": Key("text", "how the profile is called: lower case, digits, '.', '_', '-'"),
    "description": Key("text", "one line: which device, in which mode"),
    "date": Key("text", 'when the profile was written, "YYYY-MM-DD"'),
    "aliases": Key("names", "other names of it"),
}


class Limit(NamedTuple):
    """Where a budget key bites: the measurement, the side, and the factor from the key's unit to the measurement's."""

    measurement: str
    side: str
    factor: float = 1


# A budget key not named here limits the measurement of its own name from above.
LIMITS: Mapping[str, Limit] = {
    "disk_mb": Limit("artifact_bytes", "max", 1e6),
    "ram_mb": Limit("peak_rss_mb", "max"),
    **{
        name: Limit(name, "min")
        for name in (
            *("prefill_tokens_per_s", "decode_tokens_per_s_p50", "decode_tokens_per_s_p10"),
            *("top1_agreement", "cosine_mean", "cosine_p01", "neighbour_agreement", "label_agreement"),
            "rank_agreement",
        )
    },
}
