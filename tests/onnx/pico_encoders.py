"""Random encoders of a few thousand weights, one of every family, saved as a user would find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 70,
    "pad_token_id": 1,
    "num_labels": 3,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 48,
    "patch_size": 16,
    "num_labels": 5,
}
# model_type -> configuration; ModernBERT's sliding window is shorter than the test's longest text.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "distilbert": {"vocab_size": 101, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}
    | {"max_position_embeddings": 70, "num_labels": 3},
    "roberta": _TEXT | {"type_vocab_size": 1},
    "xlm-roberta": _TEXT | {"type_vocab_size": 1, "num_hidden_layers": 1},
    "mpnet": _TEXT,
    "deberta-v2": _TEXT
    | {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    | {"pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1, "position_biased_input": False}
    | {"type_vocab_size": 0, "pooler_hidden_size": 32},
    "modernbert": _TEXT
    | {"num_hidden_layers": 4, "local_attention": 16, "cls_token_id": 2, "sep_token_id": 3}
    | {"bos_token_id": 2, "eos_token_id": 3},
    "electra": _TEXT | {"embedding_size": 24, "num_hidden_layers": 1},
    "albert": _TEXT | {"embedding_size": 16},  # one set of weights for all layers
    "vit": _VISION,
    "deit": _VISION,
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.35, "num_labels": 5},
    "convnext": {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
}


def write(folder: Path, model_type: str, head: str = "AutoModel", **changes: Any) -> Path:
    """Save a random model with every weight drawn anew, so that no norm is the identity and no bias is zero."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(FAMILIES[model_type] | changes))
    config.architectures = []
    model = getattr(transformers, head).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    if "image_size" not in config.to_dict() and model_type in ("resnet", "convnext"):
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 64}}))
    return folder


def sentence_transformer(folder: Path, pooling: dict[str, Any], *more: str, model_type: str = "bert") -> Path:
    """A sentence-transformers folder: the encoder, one pooling, and the steps named after it."""
    write(folder, model_type)
    steps = ["Transformer", "Pooling", *more]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(steps) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(steps, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))
    return folder
