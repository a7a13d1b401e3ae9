"""Random checkpoints of a few kilobytes, one per family, and models with parts bypassed by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from edgepack.checkpoint import open_checkpoint
from edgepack.prune.cut import Cut
from edgepack.prune.folder import write_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
LAYERS = 4
VOCABULARY = 2048

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
_WINDOWED = {"layer_types": None, "sliding_window": 8}

# Class, config over SIZES.
DECODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "untied": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": LAYERS, "n_embd": 64, "n_head": 4, "n_positions": 128, "n_inner": 96}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 8}),
    "starcoder2": ("Starcoder2ForCausalLM", {"use_bias": True, "sliding_window": None}),
}
ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "roberta": ("RobertaModel", {"pad_token_id": 1, "max_position_embeddings": 130}),
    "distilbert": (
        "DistilBertModel",
        {"n_layers": LAYERS, "dim": 64, "hidden_dim": 96, "n_heads": 4},
    ),
    "mpnet": ("MPNetModel", {"pad_token_id": 1, "max_position_embeddings": 130}),
    "electra": ("ElectraModel", {"embedding_size": 64}),
    "modernbert": ("ModernBertModel", {"global_attn_every_n_layers": 3, "local_attention": 8}),
    "classifier": ("BertForSequenceClassification", {"num_labels": 3}),
}


def make(name: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """Save a random checkpoint of a family, with the example model's tokenizer."""
    import transformers

    class_name, config = {**DECODERS, **ENCODERS}[name]
    torch.manual_seed(seed)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**{**SIZES, **config, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(EXAMPLE / file, folder / file)
    return folder


def cut(source: Path, folder: Path, **stays: Any) -> Path:
    """Write what stays of a checkpoint."""
    folder.mkdir()
    write_folder(open_checkpoint(source), Cut(**stays), folder)
    return folder


def load(folder: Path, class_name: str | None = None) -> Any:
    """The model in transformers, in float32; every tensor of the folder must have a place."""
    import transformers

    name = class_name or json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def layers_of(model: Any, count: int = LAYERS) -> list[Any]:
    """The transformer layers."""
    return list(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count))


def bypass(model: Any, gone: Collection[int]) -> Any:
    """Make layers give what they get, by hooks on their outputs."""

    def give_back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    for number in gone:
        layers_of(model)[number].register_forward_hook(give_back, with_kwargs=True)
    return model


def answers(model: Any, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """What the model makes of fixed random ids, some of them far apart in windows."""
    ids = torch.randint(8, min(vocabulary, 1000), (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
