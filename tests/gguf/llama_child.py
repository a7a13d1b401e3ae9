"""Run GGUF files in llama.cpp: a process of its own for tests/gguf/test_architectures.py, because ggml aborts.

Called with a JSON file of jobs; writes one .npz beside each GGUF. The key-value cache is float32, flash attention off:
with llama.cpp's usual float16 cache keys and values are rounded, and logits move by 1e-2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from edgepack.runtimes.llama_cpp import Model


def run(job: dict) -> None:
    arrays = {}
    exact = {"kv_type": "f32", "flash_attention": False}
    with Model(job["gguf"], context=job["context"], threads=2, embeddings=job["embed"], **exact) as model:
        for number, ids in enumerate(job["prompts"]):
            arrays[str(number)] = model.embed([ids])[0] if job["embed"] else model.logits([ids])[0]
    np.savez(Path(job["gguf"]).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
