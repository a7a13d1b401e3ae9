"""Random decoders of every architecture, and what the tests run on them in a process of its own (a worker)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
    "initializer_range": 0.1,
}
# Class of transformers -> what its configuration has beyond COMMON.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Ernie4_5ForCausalLM": {"head_dim": 16},
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "Gemma3ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "GemmaForCausalLM": {"head_dim": 16},
    "GraniteForCausalLM": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "MistralForCausalLM": {"sliding_window": None},
    "NemotronForCausalLM": {"partial_rotary_factor": 0.5, "head_dim": 32},
    "Phi3ForCausalLM": {"original_max_position_embeddings": 128},
    "PhiForCausalLM": {"partial_rotary_factor": 0.5, "num_attention_heads": 2, "num_key_value_heads": 2},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 16},
}
# Variants of one architecture: what else its configuration can ask for.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, untied, with biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3 positions": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "linear positions": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "long positions": (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + 0.5 * i for i in range(8)],
            },
        },
    ),
    "dynamic positions": (
        "HunYuanDenseV1ForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}},
    ),
    "Mistral with a window": ("MistralForCausalLM", {"sliding_window": 16}),
    "Gemma 2 with a window": ("Gemma2ForCausalLM", {"sliding_window": 16}),
}


def make(folder: Path, architecture: str, *, dtype: str = "float32", **changes: Any) -> Path:
    """A random model with the example's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(7)
    kind = getattr(transformers, architecture)
    config = kind.config_class(**(COMMON | ARCHITECTURES[architecture] | changes))
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases: not all the same
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


def differences(*, folder: str, recipe: str, architectures: list[str], progress: Any) -> dict[str, Any]:
    """Export random models and compare logits with transformers, first all at once, then after a prefix.

    Returns:
        Architecture -> largest difference of a logit and largest logit, or the error.
    """
    import torch
    import transformers

    from edgepack.onnx.decoder import export

    found: dict[str, Any] = {}
    for name in architectures:
        architecture, changes = VARIANTS.get(name, (name, {}))
        source = make(Path(folder) / name, architecture, **changes)
        target = Path(folder) / f"{name}-onnx"
        target.mkdir()
        report = export(model=str(source), folder=str(target), recipe=recipe, options={"threads": 1})
        ids = torch.randint(4, 2048, (1, 60), generator=torch.Generator().manual_seed(1))
        kind = getattr(transformers, architecture)
        model = kind.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[0].numpy()
        # Factors of long positions start at 32 tokens, for those before as well: a prompt has to be longer.
        logits = in_steps(target, ids[0].tolist(), first=40 if name == "long positions" else 25)
        found[name] = {
            "difference": float(abs(logits - expected).max()),
            "largest": float(abs(expected).max()),
            "streamed": report["streamed"],
        }
    return found


def in_steps(folder: Path, ids: list[int], first: int = 25) -> Any:
    """Logits as onnxruntime-genai computes them: a prompt of `first` tokens, some more, the others one by one."""
    import numpy as np

    from edgepack.runtimes.genai import Decoder

    parts = []
    with Decoder(folder, context=len(ids) + 1, threads=1) as decoder:
        for start, stop in [(0, first), (first, first + 5), *((at, at + 1) for at in range(first + 5, len(ids)))]:
            decoder.feed(ids[start:stop])
            parts.append(np.array(decoder._generator.get_output("logits")[0]))
    return np.concatenate(parts)


def config_of(folder: Path) -> dict[str, Any]:
    """genai_config.json."""
    return dict(json.loads((folder / "genai_config.json").read_text()))


def exports(*, jobs: list[dict[str, Any]], progress: Any) -> list[dict[str, Any]]:
    """Run exports one after another in one process; what each returned, or its error."""
    from edgepack.errors import EdgepackError
    from edgepack.onnx.decoder import export

    found = []
    for job in jobs:
        seen: list[tuple[int, int]] = []
        folder = Path(job["folder"])
        folder.mkdir(exist_ok=True)
        try:
            result = export(**job, progress=lambda done, total, seen=seen: seen.append((done, total)))
            found.append({"result": result, "progress": [seen[0], seen[-1]], "sorted": seen == sorted(seen)})
        except EdgepackError as error:
            found.append({"error": error.as_json(), "left": sorted(path.name for path in folder.iterdir())})
    return found


def dying_export(*, how: str, progress: Any, **arguments: Any) -> Any:
    """An export whose process dies when the first weights are written: graph, tokenizer and data file are there."""
    import os
    import resource
    import signal
    import sys

    from edgepack.onnx.decoder import export

    def die(done: int, total: int) -> None:
        left = {path.name for path in Path(arguments["folder"]).iterdir()}
        assert {"genai_config.json", "model.onnx.data"} <= left
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "terminate":
            sys.stderr.write("terminate called after throwing: weights are lost\n")
            sys.stderr.flush()
            os.abort()
        with Path("/proc/self/statm").open() as held:
            now = int(held.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), now + (64 << 20)))
        bytearray(1 << 30)

    return export(**arguments, progress=die)
