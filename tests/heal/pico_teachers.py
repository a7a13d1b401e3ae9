"""Random encoders of a few thousand weights that tell texts apart, with a tokenizer of their own, and pruned copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from edgepack.checkpoint import open_checkpoint
from edgepack.prune.cut import Cut
from edgepack.prune.folder import write_folder, write_sidecar
from edgepack.text import default_calibration_text

LAYERS = 4
VOCABULARY = 400
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A WordPiece tokenizer that puts texts between [CLS] and [SEP], learned on the text that ships."""
    engine = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    engine.train_from_iterator([default_calibration_text().read_text("utf-8")[:20_000]], trainer)
    sep, cls = (engine.token_to_id(token) for token in ("[SEP]", "[CLS]"))
    engine.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    engine.save(str(folder / "tokenizer.json"))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(zip(names, SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def teacher(folder: Path, class_name: str = "BertModel", *, seed: int = 0, pooling: str = "", **changes: Any) -> Path:
    """Save a random teacher.

    Args:
        folder: Where.
        class_name: Of transformers.
        seed: Of its weights.
        pooling: Makes it a sentence-transformers folder of that mode.
        changes: Of the configuration.
    """
    torch.manual_seed(seed)
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # far enough apart that layers matter and answers differ
                parameter.normal_(0.0, 1.0 if "embedding" in name else 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if pooling:
        steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{step}"}
            for place, (path, step) in enumerate(steps)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    return folder


def pruned(source: Path, folder: Path, kept: Sequence[int] = (0, 1, 3)) -> Path:
    """A copy with some layers, as `edgepack prune` leaves it."""
    folder.mkdir()
    write_folder(open_checkpoint(source), Cut(layers=tuple(kept)), folder)
    gone = [number for number in range(LAYERS) if number not in kept]
    removed = {"depth": {"layers": gone, "of": LAYERS}}
    write_sidecar(folder, {"kept_layers": list(kept), "removed": removed, "pruned_before": None})
    return folder


def load(folder: Path) -> Any:
    """The model as transformers loads it, every tensor in its place."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    return model.eval()
