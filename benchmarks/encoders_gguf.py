"""edgepack's encoder of block types against ggml's: weights per second and core, and the error ggml minimises.

    python benchmarks/encoders_gguf.py MODEL [TYPE ...]

MODEL is a Hugging Face folder. Both encode the same rows in turns in one thread, timed in CPU seconds; the importance
matrix is drawn at random (gamma, shape 1/2), since only its unevenness matters here.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from edgepack.gguf import blocks, encode, ggml
from edgepack.gguf.model import describe
from edgepack.gguf.types import TYPES, row_bytes

CHUNK = 256  # rows at a time, as the writer hands them out
TENSORS = 6


def compare(tensors: list[np.ndarray], name: str, weighted: bool) -> tuple[float, float, float]:
    """Millions of weights per second of edgepack and of ggml, and the ratio of their weighted squared errors."""
    kind, seconds, errors = TYPES[name], np.zeros(2), np.zeros(2)
    for rows in tensors:
        width = rows.shape[1]
        importance = np.random.default_rng(1).gamma(0.5, 2.0, width).astype(np.float32) if weighted else None
        for start in range(0, len(rows), CHUNK):
            part = np.ascontiguousarray(rows[start : start + CHUNK])
            weights = encode.error_weights(part, kind, importance)
            out = np.empty(len(part) * row_bytes(kind, width), dtype=np.uint8)
            for i, quantize in enumerate((encode.quantize_rows, ggml.quantize_rows)):
                before = time.thread_time()
                quantize(part, kind, out, importance)
                seconds[i] += time.thread_time() - before
                errors[i] += np.sum(weights * np.square(blocks.dequantize(out, kind, width) - part), dtype=np.float64)
    ours, theirs = sum(rows.size for rows in tensors) / seconds / 1e6
    return ours, theirs, errors[0] / errors[1]


def main() -> None:
    specs = [t for t in describe(Path(sys.argv[1])).tensors if not t.keep_f32 and t.width % 256 == 0]
    step = max(len(specs) // TENSORS, 1)
    tensors = [spec.read(0, min(spec.rows, 2048)) for spec in specs[::step]]
    print("| type | importance | edgepack, M weights/s and core | ggml | faster | weighted error |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[2:] or sorted(encode.ENCODABLE):
        for weighted in (True, False):
            compare([tensors[0][:CHUNK]], name, weighted)  # compiles
            ours, theirs, error = compare(tensors, name, weighted)
            given = "yes" if weighted else "no"
            print(f"| {name} | {given} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} x | {error:.3f} |")


if __name__ == "__main__":
    main()
