"""GGUF files for tests of what runs them: the example model, a small random embedder, and spoiled copies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edgepack.gguf.convert import export
from edgepack.gguf.file import read_gguf
from edgepack.worker import no_progress


def exported(model: Path, preset: str, folder: Path) -> Path:
    """`model` as a GGUF of the preset, in `folder`."""
    report = export(
        model=str(model),
        preset=preset,
        overrides={},
        imatrix=None,
        shard_mb=None,
        folder=str(folder),
        stem=f"{model.name}-{preset}",
        threads=2,
        allow_nonfinite=True,
        extra_metadata={},
        progress=no_progress,
    )
    return folder / report["files"][0]


def with_weight(path: Path, tensor: str, value: float, to: Path) -> Path:
    """A copy of a float32 GGUF whose `tensor` has `value` as first weight."""
    header = read_gguf(path)
    data = bytearray(path.read_bytes())
    place = header.data_offset + header.tensors[tensor].offset
    data[place : place + 4] = np.float32(value).tobytes()
    to.write_bytes(bytes(data))
    return to


def random_bert(folder: Path) -> Path:
    """A random two-layer BERT with a WordPiece vocabulary of letters, mean pooling by sentence-transformers' files."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?()'-"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *("##" + letter for letter in letters),
        "the",
        "##ing",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = BertModel(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    settings = json.loads(config_path.read_text()) | {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    config_path.write_text(json.dumps(settings))
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    return folder
