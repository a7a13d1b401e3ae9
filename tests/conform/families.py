"""New vocabularies with the exact structure of published tokenizers: what a retrained or fine-tuned model brings.

Every family is trained here on the texts of the corpus, so no token list is anybody's; normalizer, pre-tokenizer,
decoder, post-processor, flags and special tokens are copied from the published tokenizer.json.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgepack.checkpoint import Checkpoint
from edgepack.conform.corpus import TEXTS
from edgepack.gguf.file import encode_header, string
from edgepack.gguf.spm_file import parse
from edgepack.gguf.tokenizer import vocabulary

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # also OLMo 2 (dolma2)
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def split(regex: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(regex), behavior, invert)


def byte_level(use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _gpt2() -> Any:
    return byte_level(True)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])


def _one(regex: str, behavior: str = "isolated", invert: bool = False) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence([split(regex, behavior, invert), byte_level()])


def _deepseek3() -> Any:
    return pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), byte_level()])


def _deepseek_coder() -> Any:
    parts = [split(regex) for regex in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.Digits(individual_digits=True), byte_level()])


def _falcon() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("contiguous"), byte_level(True), split("[0-9][0-9][0-9]")]
    )


def _bloom() -> Any:
    return pre_tokenizers.Sequence([split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), byte_level()])


def _minicpm5() -> Any:
    return pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")), byte_level()])


def _with_bos(token: str, number: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


# name -> (pre_tokenizer, normalizer, special tokens, BPE options, config of the folder)
BYTE_LEVEL: dict[str, tuple[Callable[[], Any], Any, tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "gpt2": (_gpt2, None, ("<|endoftext|>",), {}, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "phi-2": (_gpt2, None, ("<|endoftext|>",), {}, {"eos_token": "<|endoftext|>"}),
    "olmo": (_gpt2, normalizers.NFC(), ("<|endoftext|>", "<|padding|>"), {}, {"eos_token": "<|endoftext|>"}),
    "starcoder": (_digits, None, ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"), {}, {}),
    "smollm": (_digits, None, IM, {}, {"eos_token": "<|im_end|>", "chat_template": CHATML}),
    "command-r": (_digits, normalizers.NFC(), ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"), {}, {"bos": "<BOS_TOKEN>"}),
    "llama3": (
        _one(LLAMA3),
        None,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        {"ignore_merges": True},
        {"bos": "<|begin_of_text|>", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "olmo2": (_one(LLAMA3, "removed", True), None, ("<|endoftext|>",), {}, {"eos_token": "<|endoftext|>"}),
    "qwen2": (
        _one(QWEN2),
        normalizers.NFC(),
        IM,
        {},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": CHATML},
    ),
    "qwen3.5": (_one(QWEN35), normalizers.NFC(), IM, {}, {"eos_token": "<|im_end|>"}),
    "tekken": (
        _one(TEKKEN),
        None,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        {"ignore_merges": True},
        {"bos": "<s>", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "gpt-4o": (_one(GPT4O), None, ("<|startoftext|>", "<|endoftext|>"), {}, {"eos_token": "<|endoftext|>"}),
    "deepseek-v3": (
        _deepseek3,
        None,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"),
        {},
        {"bos": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    ),
    "deepseek-coder": (_deepseek_coder, None, ("<｜begin▁of▁sentence｜>",), {}, {"bos": "<｜begin▁of▁sentence｜>"}),
    "falcon": (_falcon, None, ("<|endoftext|>",), {}, {"eos_token": "<|endoftext|>"}),
    "bloom": (_bloom, None, ("<s>", "</s>"), {}, {"eos_token": "</s>"}),
    "minicpm5": (_minicpm5, None, IM, {"ignore_merges": True}, {"eos_token": "<|im_end|>"}),
}


def train_byte_level(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A new byte-level BPE vocabulary with the structure of `name`, and its tokenizer_config.json."""
    pre, normalizer, special, options, config = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre()
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("user_defined", normalized=False)])
    config = dict(config)
    bos = config.pop("bos", None)
    if bos:
        tokenizer.post_processor = _with_bos(bos, tokenizer.token_to_id(bos))
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, config


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
LLAMA2_TRAINING = {"model_type": "bpe", "vocab_size": 1500, "byte_fallback": True, "split_digits": True}
LLAMA2_TRAINING |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA2_TRAINING |= {"allow_whitespace_only_pieces": True}
GEMMA_TRAINING = LLAMA2_TRAINING | {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
GEMMA_TRAINING |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
GEMMA_USER = ("<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n")
GEMMA_TRAINING |= {"user_defined_symbols": list(GEMMA_USER)}


def train_sentencepiece(**options: Any) -> bytes:
    """A new SentencePiece model; returns tokenizer.model."""
    import sentencepiece

    out = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines() if line.strip() and "\x00" not in line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        minloglevel=2,  # errors only
        num_threads=1,
        character_coverage=0.995,
        max_sentence_length=20000,
        hard_vocab_limit=False,
        **options,
    )
    return out.getvalue()


def merges_of(pieces: dict[str, int]) -> list[list[str]]:
    """The merges that transformers derives from the pieces of a SentencePiece BPE model (generate_merges)."""
    found = []
    for piece, rank in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((rank, len(left), len(right), left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def spm_bpe_json(
    model: bytes, *, normalizer: Any, pre_tokenizer: Any, special: dict[str, bool], bos: str
) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model, as transformers' converters write it."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = []
    for token, is_special in special.items():
        number = pieces.get(token, len(pieces) + sum(entry["id"] >= len(pieces) for entry in added))
        added.append({"id": number, "content": token, **flags, "special": is_special})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [pieces[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([] if normalizer == SPACES else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": pieces,
            "merges": merges_of(pieces),
        },
    }


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def write_folder(folder: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any], **files: Any) -> Path:
    """A model folder with a tokenizer and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def gguf(folder: Path, rows: int, **config: Any) -> Path:
    """A GGUF file beside the folder that holds its vocabulary and nothing else."""
    checkpoint = Checkpoint(folder, {"model_type": "llama", **config}, {})
    # The name matters: llama.cpp looks for phi-3 in it.
    keys = {"general.architecture": string("llama"), "general.name": string(folder.name)}
    keys |= vocabulary(checkpoint, rows=rows)
    path = folder.with_suffix(".gguf")
    path.write_bytes(encode_header(keys, [])[0])
    return path


ONE_SPACE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
XLMR = ("<s>", "<pad>", "</s>", "<unk>")


def xlm_r(model: bytes, *, older: bool) -> dict[str, Any]:
    """tokenizer.json of an XLM-R unigram model: fairseq's four tokens first, `<mask>` last.

    Both forms in use: WhitespaceSplit, and (`older` false) runs of spaces replaced by one.
    """
    import sentencepiece

    parsed = parse(model, "memory")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [[processor.id_to_piece(i), processor.get_score(i)] for i in range(3, processor.get_piece_size())]
    vocab = [[token, 0.0] for token in XLMR] + pieces + [["<mask>", 0.0]]
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, "lstrip": False, **flags} for i, token in enumerate(XLMR)]
    added.append({"id": len(vocab) - 1, "content": "<mask>", "lstrip": True, **flags})
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    rules = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(parsed.charsmap).decode()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rules if older else {"type": "Sequence", "normalizers": [rules, ONE_SPACE]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]}
        if older
        else space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
            },
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
    }


BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_bert(lowercase: bool) -> Tokenizer:
    """A new WordPiece vocabulary, cased or not."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=list(BERT), show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    ids = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


FAIRSEQ_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
FAIRSEQ_ROLES |= {"mask_token": "<mask>", "unk_token": "<unk>"}
BERT_ROLES = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
}
LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_SPECIAL = {"<unk>": True, "<s>": True, "</s>": True}
GEMMA_SPECIAL = {"<pad>": True, "<eos>": True, "<bos>": True, "<unk>": True}
GEMMA_SPECIAL |= {token: token.endswith("turn>") for token in GEMMA_USER}


@functools.cache
def family(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a new vocabulary of any family."""
    if name in BYTE_LEVEL:
        tokenizer, config = train_byte_level(name)
        return json.loads(tokenizer.to_str()), config
    if name.startswith("bert"):
        return json.loads(train_bert(name == "bert-uncased").to_str()), BERT_ROLES
    if name.startswith("xlm-r"):
        return xlm_r(unigram_model(), older=name == "xlm-r"), FAIRSEQ_ROLES
    if name == "gemma":
        model = spm_bpe_json(
            gemma_model(), normalizer=SPACES, pre_tokenizer=GEMMA_SPLIT, special=GEMMA_SPECIAL, bos="<bos>"
        )
        return model, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
    normalizer, pre, extra = LLAMA_FAMILY[name]
    special = LLAMA_SPECIAL | dict.fromkeys(extra, True)
    made = spm_bpe_json(llama_model(), normalizer=normalizer, pre_tokenizer=pre, special=special, bos="<s>")
    for entry in made["added_tokens"]:
        entry["rstrip"] = name == "phi-3" and entry["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return made, LLAMA_ROLES


LLAMA_FAMILY: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "llama2": (PREPEND, None, ()),
    "phi-3": (PREPEND, None, ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>")),
    "mistral": (None, metaspace("first"), ("[INST]", "[/INST]")),
    "llama2-metaspace": (None, metaspace("always"), ()),
}
ALL = (*BYTE_LEVEL, *LLAMA_FAMILY, "gemma", "xlm-r", "xlm-r-newer", "bert-uncased", "bert-cased")


@functools.cache
def llama_model() -> bytes:
    return train_sentencepiece(**LLAMA2_TRAINING, unk_id=0, bos_id=1, eos_id=2)


@functools.cache
def gemma_model() -> bytes:
    return train_sentencepiece(**GEMMA_TRAINING)


@functools.cache
def unigram_model() -> bytes:
    return train_sentencepiece(model_type="unigram", vocab_size=1000)


def size_of(tokenizer: dict[str, Any]) -> int:
    """Ids in use: one more than the highest."""
    vocab = tokenizer["model"]["vocab"]
    numbers = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max([*numbers, *(entry["id"] for entry in tokenizer["added_tokens"])])


def build(folder: Path, name: str, **config: Any) -> tuple[Path, Path]:
    """(model folder, GGUF file) of a family; `config` changes tokenizer_config.json."""
    tokenizer, roles = family(name)
    write_folder(folder, tokenizer, roles | config)
    return folder, gguf(folder, size_of(tokenizer) + 5)
