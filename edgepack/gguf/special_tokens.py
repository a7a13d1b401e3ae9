"""The ids of special tokens, whether BOS and EOS are added, and the chat template, from a model folder.

Every flag is written, never left to llama.cpp's defaults: those depend on the pre-tokenizer's name and on the text of
tokens. Knows nothing of how text is split.

Sources: llama.cpp `src/llama-vocab.cpp` (which keys are read, tokens found by their text), gguf-py `gguf/vocab.py`
(SpecialVocab: where a folder says what), transformers `tokenization_utils_base.py` (_from_pretrained: add_bos_token in
tokenizer_config.json is ignored beside a tokenizer.json).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.gguf.file import Metadata, ValueType, array, boolean, string, u32
from edgepack.gguf.vocab import Vocab

MAX_TEMPLATE_BYTES = 64 << 10  # published templates stay below 20 KiB; the limit llama.cpp front ends are given

# tokenizer_config.json's role -> key of the file; "seperator" is the format's own spelling.
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}

# Tokens that end one speaker's turn: what llama.cpp looks for by text, most specific first, and two it misses.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<|end_of_role|>",
    "<turn|>",
    "<end_of_utterance>",
    "[EOT]",
    "<EOT>",
)
_MESSAGE_ENDS = ("<|eom_id|>",)

# Fill-in-the-middle: key -> spellings in use (llama.cpp's list).
_INFILL: Mapping[str, tuple[str, ...]] = {
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


@dataclass(frozen=True)
class Affixes:
    """What the tokenizer puts around a text.

    Args:
        before: Ids before it: nothing, or one token.
        after: Ids after it: nothing, or one token.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def post_processor(node: Any) -> Affixes:
    """The ids that a `post_processor` of tokenizer.json adds around a single text.

    Raises:
        InputRefused: A node of another type than ByteLevel, TemplateProcessing, BertProcessing, RobertaProcessing,
            Sequence.
    """
    kind = node.get("type") if isinstance(node, dict) else None
    if kind in (None, "ByteLevel"):
        return Affixes()
    if kind == "Sequence":
        found = Affixes()
        for part in node.get("processors", []):
            inner = post_processor(part)
            found = Affixes(inner.before + found.before, found.after + inner.after)
        return found
    if kind in ("BertProcessing", "RobertaProcessing"):
        return Affixes((int(node["cls"][1]),), (int(node["sep"][1]),))
    if kind == "TemplateProcessing":
        return _template(node)
    raise InputRefused(
        f"tokenizer.json: post_processor {kind!r} not understood; expected TemplateProcessing or ByteLevel"
    )


def _template(node: Mapping[str, Any]) -> Affixes:
    before: list[int] = []
    after: list[int] = []
    seen_text = False
    for part in node["single"]:
        if "Sequence" in part:
            seen_text = True
        else:
            ids = node["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            (after if seen_text else before).extend(int(number) for number in ids)
    return Affixes(tuple(before), tuple(after))


def affixes(checkpoint: Checkpoint, tokenizer: Mapping[str, Any] | None, roles: Mapping[str, int]) -> Affixes:
    """What the model's tokenizer puts around a text, as transformers decides it.

    Args:
        checkpoint: For tokenizer_config.json, whose flags count only where there is no tokenizer.json.
        tokenizer: Parsed tokenizer.json, or None.
        roles: Ids that tokenizer.model gives to BOS and EOS.

    Raises:
        InputRefused: More than one token on a side, which llama.cpp can't add, or a malformed post_processor.
    """
    if tokenizer is None:
        config = checkpoint.json("tokenizer_config.json") or {}
        # Llama and Gemma add BOS unless told otherwise; tokenizer.model itself says nothing.
        wanted = {"bos": config.get("add_bos_token", True), "eos": config.get("add_eos_token", False)}
        before, after = ((roles[role],) if wanted[role] and role in roles else () for role in ("bos", "eos"))
        return Affixes(before, after)
    try:
        found = post_processor(tokenizer.get("post_processor"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputRefused(f"tokenizer.json: malformed post_processor ({type(error).__name__}: {error})") from error
    if len(found.before) > 1 or len(found.after) > 1:
        raise InputRefused(
            f"tokenizer.json: post_processor adds tokens {list(found.before)} before a text, {list(found.after)} after"
            " it; llama.cpp can add one on each side"
        )
    return found


def special_tokens(
    checkpoint: Checkpoint, ids: Mapping[str, int], around: Affixes, *, rows: int, vocab: Vocab
) -> Metadata:
    """All `*_token_id` and `add_*` keys.

    Args:
        checkpoint: For tokenizer_config.json, config.json, generation_config.json.
        ids: Token text -> id.
        around: From `affixes`: a token that is added is BOS or EOS, whatever the folder calls it, for llama.cpp adds
            no other.
        rows: Ids from here on do not exist and are not written (`-1` and the like are in use for "none").
        vocab: For its kind and the roles it knows of itself.
    """
    model = vocab.model
    found = {**vocab.roles} | _roles(checkpoint, ids, rows)
    turn_end, message_end = _ends(checkpoint, ids, found.get("eos"), rows)
    if model == "bert":
        # llama.cpp puts BOS and SEP around the text of a WordPiece model, always (tokenize, LLAMA_VOCAB_TYPE_WPM).
        found["bos"] = around.before[0] if around.before else found.get("cls", found.get("bos", 0))
        found["sep"] = around.after[0] if around.after else found.get("sep", found.get("eos", 0))
    else:
        if around.before:
            found["bos"] = around.before[0]
        if around.after and around.after[0] != found.get("eos"):
            turn_end = turn_end if turn_end is not None else found.get("eos")
            found["eos"] = around.after[0]
        # Without the key llama.cpp takes id 11 of a BPE vocabulary (a comma in GPT-2's), 1 of a SentencePiece one.
        end = found.setdefault("eos", found.get("bos", found.get("sep", 0)))
        found.setdefault("bos", end)
    keys = {f"tokenizer.ggml.{_ROLES[role]}_token_id": u32(number) for role, number in found.items()}
    for name, number in (("eot", turn_end), ("eom", message_end)):
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = u32(number)
    for name, spellings in _INFILL.items():
        number = next((ids[text] for text in spellings if text in ids), None)
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = u32(number)
    keys["tokenizer.ggml.add_bos_token"] = boolean(bool(around.before))
    keys["tokenizer.ggml.add_eos_token"] = boolean(bool(around.after) and model != "bert")
    keys["tokenizer.ggml.add_sep_token"] = boolean(model == "bert")
    return keys


def _roles(checkpoint: Checkpoint, ids: Mapping[str, int], rows: int) -> dict[str, int]:
    """Role -> id: tokenizer_config.json, then special_tokens_map.json, then the ids in config.json."""
    names = (checkpoint.json("special_tokens_map.json") or {}) | (checkpoint.json("tokenizer_config.json") or {})
    generation = checkpoint.json("generation_config.json") or {}
    found: dict[str, int] = {}
    for role in _ROLES:
        number = _token_id(names.get(f"{role}_token"), ids)
        for document in (checkpoint.config, generation):
            if number is None:
                number = next(iter(_numbers(document.get(f"{role}_token_id"), rows)), None)
        if number is not None and number < rows:
            found[role] = number
    return found


def _ends(checkpoint: Checkpoint, ids: Mapping[str, int], eos: int | None, rows: int) -> tuple[int | None, int | None]:
    """The ids of end of turn and end of message, besides EOS, at which generation must stop too."""
    documents = (checkpoint.json("generation_config.json") or {}, checkpoint.config)
    listed = dict.fromkeys(number for d in documents for number in _numbers(d.get("eos_token_id"), rows))
    others = [number for number in listed if number != eos]
    named = [ids[text] for text in _TURN_ENDS if text in ids]
    messages = [ids[text] for text in _MESSAGE_ENDS if text in ids]
    templates = "".join(chat_templates(checkpoint).values())
    used = [ids[text] for text in _TURN_ENDS if text in ids and text in templates]
    candidates = (
        [number for number in named if number in others]
        + used
        + [number for number in others if number not in messages]
        + [number for number in named if number == eos]
    )
    turn_end = candidates[0] if candidates else None
    rest = messages + [number for number in others if number != turn_end]
    return turn_end, rest[0] if rest else None


def _token_id(token: Any, ids: Mapping[str, int]) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return ids.get(text) if isinstance(text, str) else None


def _numbers(value: Any, rows: int) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and 0 <= number < rows]


def chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """Name -> Jinja text, `default` for the one without a name; copied as data, never run here.

    Raises:
        InputRefused: A template is larger than `MAX_TEMPLATE_BYTES` or not text.
    """
    found: dict[str, Any] = {}
    listed = (checkpoint.json("tokenizer_config.json") or {}).get("chat_template")
    if isinstance(listed, list):
        found = {str(entry.get("name")): entry.get("template") for entry in listed if isinstance(entry, dict)}
    elif listed is not None:
        found["default"] = listed
    # The file wins over tokenizer_config.json, as in transformers (tokenization_utils_base.py, from_pretrained).
    file = checkpoint.text("chat_template.jinja")
    found |= {"default": file} if file is not None else {}
    for name, text in found.items():
        if not isinstance(text, str):
            raise InputRefused(f"chat template {name!r}: expected text, found {type(text).__name__}")
        if len(text.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise InputRefused(f"chat template {name!r}: larger than {MAX_TEMPLATE_BYTES} bytes")
    return found


def chat_template_keys(checkpoint: Checkpoint) -> Metadata:
    """`tokenizer.chat_template` and, for further templates, `tokenizer.chat_template.<name>` (gguf-py's scheme)."""
    found = chat_templates(checkpoint)
    default = found.pop("default", None)
    keys: Metadata = {} if default is None else {"tokenizer.chat_template": string(default)}
    for name, text in found.items():
        keys[f"tokenizer.chat_template.{name}"] = string(text)
    if found:
        keys["tokenizer.chat_templates"] = array(ValueType.STRING, list(found))
    return keys
