"""A model folder of a few kilobytes, for tests of what happens before any weight is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float32",
    "_name_or_path": "acme/base",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
}


def weights(seed: int = 0, names: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight")) -> bytes:
    """A safetensors file, written by the safetensors library."""
    generator = np.random.default_rng(seed)
    tensors = {name: generator.standard_normal((32, 8), dtype=np.float32) for name in names}
    return save(tensors, metadata={"format": "pt"})


def files() -> dict[str, bytes]:
    """Names and contents of a whole model."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": b'{"max_length": 64}',
        "model.safetensors": weights(),
        "tokenizer_config.json": json.dumps(
            {"model_max_length": 1000000000000000019884624838656, "tokenizer_class": "PreTrainedTokenizerFast"}
        ).encode(),
        "README.md": b"---\nlicense: apache-2.0\n---\n# pico\n",
    }


def sharded() -> dict[str, bytes]:
    """The same model in two shards with an index."""
    found = files()
    del found["model.safetensors"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {
        "metadata": {"total_size": 2048},
        "weight_map": {"model.embed_tokens.weight": first, "model.norm.weight": second},
    }
    return found | {
        first: weights(1, ("model.embed_tokens.weight",)),
        second: weights(2, ("model.norm.weight",)),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def write(folder: Path, contents: dict[str, bytes] | None = None) -> Path:
    """Lay the files out in a folder."""
    for name, data in (files() if contents is None else contents).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def config(**changes: Any) -> bytes:
    """config.json with some keys changed; a value of `...` removes the key."""
    return json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not ...}).encode()
