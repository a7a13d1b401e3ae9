#!/usr/bin/env python3
"""What a draft model can gain on this machine at best, by the type of the artifact's weights; or what one gains.

    benchmarks/drafting.py [--layers N] [--types Q4_K_M F32]
    benchmarks/drafting.py --pair ARTIFACT.gguf DRAFT.gguf

At best: an artifact is made whose draft is always right, but for rounding. It is a random Llama of N layers of which
all above the second add nothing, and the draft is its first two. What is left is the cost of proposing and of checking
several tokens in one pass. Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from convert import ROOT

from edgepack.text import default_evaluation_text
from edgepack.worker import run
from edgepack.workshop import physical_cores

TOKENIZER = ROOT / "examples/models/tiny-llama-5m"
KEPT = 2  # layers that do something


def make_models(folder: Path, layers: int, width: int) -> tuple[Path, Path]:
    """Artifact and draft as Hugging Face folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 256 * 256,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[KEPT:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    artifact, draft = folder / "artifact", folder / "draft"
    model.to(torch.bfloat16).save_pretrained(artifact)
    model.model.layers = model.model.layers[:KEPT]
    model.config.num_hidden_layers = KEPT
    model.save_pretrained(draft)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        for place in (artifact, draft):
            shutil.copy(TOKENIZER / name, place)
    return artifact, draft


def exported(model: Path, preset: str, folder: Path) -> str:
    """The model as a GGUF."""
    arguments = {
        "model": str(model),
        "preset": preset,
        "overrides": {},
        "imatrix": None,
        "shard_mb": None,
        "folder": str(folder),
        "stem": f"{model.name}-{preset}",
        "threads": physical_cores(),
        "allow_nonfinite": False,
        "extra_metadata": {},
    }
    report = run("edgepack.gguf.convert:export", arguments, what="export")
    return str(folder / report["files"][0])


def measured(artifact: str, draft: str, threads: int, *, prompts: int, tokens: int) -> dict[str, Any]:
    """Both side by side: every length on four prompts, the best one on others."""
    arguments = {
        "artifact": artifact,
        "draft": draft,
        "text": str(default_evaluation_text()),
        "lengths": [2, 4, 8],
        "prompts": prompts,
        "tuning_prompts": 4,
        "prompt_tokens": tokens,
        "tokens": tokens,
        "threads": threads,
        "gpu_layers": 0,
    }
    return dict(run("edgepack.measure.speculative:speculative", arguments, what="measurement"))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, metavar=("ARTIFACT", "DRAFT"), help="two GGUF files to measure instead")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--types", nargs="*", default=["Q4_K_M", "Q8_0", "F16", "F32"])
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()
    print("| artifact | MB | drafted | accepted | tokens per pass | cost of a pass | of a drafted token | speed-up |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    if arguments.pair:
        found = measured(*arguments.pair, arguments.threads, prompts=12, tokens=64)
        for row in (found, *found["tried"]):
            print(_row(f"{row['n']} prompts", Path(arguments.pair[0]).stat().st_size, row))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = make_models(folder, arguments.layers, arguments.width)
        for preset in arguments.types:
            artifact, draft = (exported(model, preset, folder) for model in models)
            for row in measured(artifact, draft, arguments.threads, prompts=2, tokens=32)["tried"]:
                print(_row(preset, Path(artifact).stat().st_size, row), flush=True)


def _row(preset: str, size: int, row: dict[str, Any]) -> str:
    gain = row["speed_up"]
    cells = [
        preset,
        f"{size / 1e6:,.0f}",
        str(row["length"]),
        f"{100 * row['acceptance']['value']:.0f} %",
        f"{row['tokens_per_pass']:.2f}",
        f"{row['pass_cost']:.2f}",
        f"{row['draft_cost']:.2f}",
        f"{gain['value']:.2f} ({gain['ci95'][0]:.2f} to {gain['ci95'][1]:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
