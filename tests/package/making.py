"""Makes small packages for the tests: a fake artifact of a few bytes, everything else real."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepack.measurement import Measurement, judge
from edgepack.package import write_package
from edgepack.targets import load_target, with_overrides

ARTIFACT = b"GGUF" + bytes(range(256)) * 2


@dataclass(frozen=True)
class FakeSource:
    """Has the fields of `edgepack.source.Source` that a package takes."""

    kind: str = "hub"
    name: str = "tiny-llama-5m"
    id: str | None = "example/tiny-llama-5m"
    revision: str | None = "main"
    commit: str | None = "0123456789abcdef0123456789abcdef01234567"
    licence: str | None = "Apache-2.0"
    gated: Any = False
    path: Path = Path("/home/someone/secret/model")
    files: dict[str, str] = field(default_factory=lambda: {"model.safetensors": "ab" * 32, "config.json": "cd" * 32})


def rows(target_name: str = "laptop", **values: float | None) -> list[Measurement]:
    limits = load_target(target_name).limits()
    kld = values.get("mean_kld") or 0.0196
    found = [
        Measurement("artifact_bytes", len(ARTIFACT), "bytes", predicted=len(ARTIFACT)),
        Measurement("bits_per_weight", 5.064, "1"),
        Measurement("mean_kld", kld, "nats/token", n=10200, ci95=(kld - 0.0004, kld + 0.0004)),
        Measurement("top1_agreement", 0.9289, "1", n=10200, ci95=(0.925, 0.932)),
        Measurement("source_perplexity", 11.4469, "1"),
        Measurement("perplexity", 11.593, "1"),
    ]
    speed = values.get("speed", 412.0)
    on = None if speed is None else "local"
    found += [
        Measurement("decode_tokens_per_s_p50", speed and speed * 1.1, "tokens/s", measured_on=on, predicted=380.0),
        Measurement("decode_tokens_per_s_p10", speed, "tokens/s", n=320, measured_on=on),
        Measurement("ttft_ms_p90", speed and 61.2, "ms", n=5, measured_on=on),
        Measurement("peak_rss_mb", speed and 118.4, "MB", measured_on=on, predicted=131.0),
    ]
    return [judge(row, limits.get(row.name)) for row in found]


def make(folder: Path, **changes: Any) -> Any:
    """A package in `folder`; `changes` are arguments of write_package, and `overrides`, `speed`, ..."""
    target_name = changes.pop("target_name", "laptop")
    values = {key: changes.pop(key) for key in ("speed", "mean_kld") if key in changes}
    arguments: dict[str, Any] = {
        "name": "tiny-llama-5m",
        "target": with_overrides(load_target(target_name), changes.pop("overrides", [])),
        "source": FakeSource(),
        "recipe": {
            "quantize": "Q4_K_M",
            "overrides": {"blk.*.attn_v.weight": "Q6_K"},
            "imatrix_sha256": None,
            "types": {"token_embd.weight": "Q6_K", "blk.0.attn_v.weight": "Q6_K", "blk.0.attn_q.weight": "Q4_K"},
        },
        "toolchain": {"edgepack": "0.1.0", "llama-cpp-python": "0.3.36", "platform": "linux-x86_64"},
        "runtime": {
            "engine": "llama.cpp",
            "min_version": "2026-08-14 (commit 6fed9f6f)",
            "threads": 4,
            "context": 512,
            "gpu_layers": 0,
            "chat": True,
        },
        "measurements": rows(target_name, **values),
        "measured_on": {"cpu": "Example CPU", "cores": 4},
        "plan": {"schema_version": 1, "parameters": 5_000_000, "architecture": "llama"},
        "artifact": lambda model: (model / "tiny-llama-5m-Q4_K_M.gguf").write_bytes(ARTIFACT),
        "conformance": {
            "tokens": {"texts": 120, "tokens": 4711, "differences": []},
            "chat": {"chats": 3},
            "logits": {"compared": True, "mean_kld": 3.1e-9, "max_abs_dlogp": 2.4e-6, "texts": 3, "positions": 192},
            "reference": {"type": "f32", "read_by": "llama.cpp"},
        },
        "samples": [{"prompt": "Once", "ids": [1, 2, 3]}],
        "licences": {"LICENSE": b"Apache License\nVersion 2.0\n"},
    }
    return write_package(folder, **(arguments | changes))


if __name__ == "__main__":
    print(make(Path(sys.argv[1])).artifact_digest)
