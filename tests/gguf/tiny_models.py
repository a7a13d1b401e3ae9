"""Small random checkpoints of every supported family, and what transformers computes with them.

Weights are drawn so that nothing is near its default: norms away from one, biases and positions away from zero, logits
a few nats wide. A forgotten `+ 1`, bias, offset or permutation then moves every logit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 320  # 256 bytes and some; the rest of the embedding rows has no token
Tokenizer = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A family member to prove.

    Args:
        family: Prefix of transformers' class names: `Llama` -> LlamaConfig.
        model: Suffix of the class that is saved: `ForCausalLM`, `LMHeadModel`, `Model`, `ForMaskedLM`.
        config: Over the sizes common to all.
        rewrite: Changes config.json after saving (the form older checkpoints have).
        lengths: Tokens of the prompts.
        context: Of the llama.cpp context; matters where the graph chooses by it.
        gelu: The float16 GELU table of the engine is in the path.
        pooling: For embedders, the mode and, where the folder says so, its file.
    """

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    model: str = "ForCausalLM"
    rewrite: Callable[[dict[str, Any]], None] | None = None
    lengths: tuple[int, ...] = (7, 90)
    context: int = 512
    gelu: bool = False
    pooling: str | None = None
    modules: bool = True
    tokenizer: str = "bpe"


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make(case: Case, folder: Path, seed: int) -> Any:
    """Save a random checkpoint of the case and return the transformers model, in float32 and eager attention."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{case.family}Config")
    config = config_class(**{**SIZES, **case.config})
    config._attn_implementation = "eager"
    name = case.family.removesuffix("Text") + case.model
    model = getattr(transformers, name)(config).float().eval()
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    if case.rewrite:
        case.rewrite(saved)
        path.write_text(json.dumps(saved))
        # the same weights as transformers understands the other config.json
        auto = transformers.AutoModel if case.pooling else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    TOKENIZERS[case.tokenizer](folder)
    if case.pooling and case.modules:
        write_pooling(folder, case.pooling)
    return model


_LAST = re.compile(r"down_proj|mlp\.c_proj|layer\.\d+\.output\.dense")


def randomise(model: Any, generator: Any) -> None:
    """Every parameter random: matrices by fan-in, everything one-dimensional around the value it starts with.

    The scale is chosen so that the float16 GELU table of llama.cpp stays within the 2e-3 of the tests: logits about one
    nat wide, the feed-forward branch at half strength. Stronger weights leave that bound (docs/architectures.md).
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise - (0.5 if "post_feedforward" in name else 0.0))
            elif "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                parameter.copy_(noise * 0.12)
            else:
                parameter.copy_(noise * ((0.6 if _LAST.search(name) else 1.2) / parameter.shape[-1] ** 0.5))


def prompts(case: Case, seed: int) -> list[list[int]]:
    """Random ids of the lengths of the case, ids of special tokens left out."""
    random = np.random.default_rng(seed)
    return [random.integers(8, VOCAB - 20, size=length).tolist() for length in case.lengths]


def gelu_by_table(model: Any) -> None:
    """Make every GELU of the model round as llama.cpp's does (ggml/src/ggml-cpu/vec.h, ggml_vec_gelu_f32).

    The tanh form, from a float16 argument, to float16; beyond +-10 the identity and zero.
    """
    import torch

    class Table(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, rounded))

    for module in model.modules():
        for name in ("act_fn", "act", "intermediate_act_fn"):
            if hasattr(module, name):
                setattr(module, name, Table())


def logits(model: Any, ids: list[int]) -> np.ndarray:
    """float32 logits [positions, vocabulary]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def embedding(model: Any, ids: list[int], pooling: str) -> np.ndarray:
    """The pooled vector of one text."""
    import torch

    with torch.no_grad():
        hidden = (getattr(model, model.base_model_prefix, model))(torch.tensor([ids])).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
    return pooled.float().numpy()


def write_pooling(folder: Path, mode: str) -> None:
    """The files of a sentence-transformers folder."""
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(steps)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    settings = {"word_embedding_dimension": 64} | {flag: name == mode for name, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def _bpe(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _wordpiece(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    settings |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _unigram(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0 - i / 10) for i, letter in enumerate(letters)]
    pieces += [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "XLMRobertaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


TOKENIZERS: Mapping[str, Tokenizer] = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}
