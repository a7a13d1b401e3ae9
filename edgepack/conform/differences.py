"""What llama.cpp is known to do otherwise than a tokenizer, written as a change to that tokenizer.

Some steps of a tokenizer.json have no counterpart in a GGUF file: llama.cpp applies no NFC, tells case in ASCII only for
two pre-tokenizers, puts spaces before all texts or none. For each such step this module makes the tokenizer.json that
does what llama.cpp does. Where the two differ from the source, llama.cpp must agree with the changed tokenizer id by id:
then the difference is the known one, and is recorded; anything else is an error.

Source: llama.cpp `src/llama-vocab.cpp`, `src/unicode.cpp`; Hugging Face `tokenizers`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgepack.gguf.pre_tokenizers import PRE_TOKENIZERS
from edgepack.gguf.spm import SPACE
from edgepack.gguf.tokenizer_json import normalizers, pre_tokenizers

Json = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A known difference.

    Args:
        reason: One sentence for the report.
        tokenizer: tokenizer.json as llama.cpp runs it in this respect.
    """

    reason: str
    tokenizer: Json


@dataclass(frozen=True)
class Engine:
    """What the GGUF file says of its tokenizer.

    Args:
        model: `tokenizer.ggml.model`.
        pre: `tokenizer.ggml.pre`.
        prefix_space: `tokenizer.ggml.add_space_prefix`.
    """

    model: str
    pre: str
    prefix_space: bool


def known(tokenizer: Json, engine: Engine) -> tuple[Difference, ...]:
    """Every known difference between a tokenizer.json and llama.cpp, each alone, then all together.

    Args:
        tokenizer: Parsed tokenizer.json; not changed.
        engine: What the GGUF says.
    """
    found: list[Difference] = []
    together = tokenizer
    for change in (_normal_form, _words, _prefix, _stripping, _long_words):
        for reason, changed in change(copy.deepcopy(tokenizer), engine):
            found.append(Difference(reason, changed))
            together = next((after for _, after in change(copy.deepcopy(together), engine)), together)
    if len(found) > 1:
        found.append(Difference("; ".join(difference.reason for difference in found), together))
    return tuple(found)


Changes = Iterator[tuple[str, Json]]


def _normal_form(tokenizer: Json, engine: Engine) -> Changes:
    names = [node.get("type") for node in normalizers(tokenizer)]
    if engine.model == "gpt2" and names == ["NFC"]:
        tokenizer["normalizer"] = None
        yield "llama.cpp does not bring text to Unicode normal form NFC, the tokenizer does", tokenizer


def _words(tokenizer: Json, engine: Engine) -> Changes:
    for entry in PRE_TOKENIZERS:
        if engine.model == "gpt2" and entry.name == engine.pre and entry.engine:
            nodes: list[Json] = [
                {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
                for expression in entry.engine
            ]
            nodes.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
            tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": nodes}
            yield entry.difference, tokenizer


def _prefix(tokenizer: Json, engine: Engine) -> Changes:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    metaspace = [node for node in pre_tokenizers(tokenizer) if node.get("type") == "Metaspace"]
    if tokenizer["model"].get("type") != "BPE" or not metaspace:
        return
    prepend = [{"type": "Prepend", "prepend": SPACE}] if engine.prefix_space else []
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, spaces]}
    if metaspace[0].get("split", True):
        tokenizer["pre_tokenizer"] = dict(metaspace[0], prepend_scheme="never")
    else:
        tokenizer["pre_tokenizer"] = None
    if engine.prefix_space:
        yield (
            "llama.cpp puts a space before every text between special tokens; the tokenizer not before a space, or only"
            " at the start"
        ), tokenizer
    else:
        yield "llama.cpp puts no space before a text that starts without a special token; the tokenizer does", tokenizer


def _stripping(tokenizer: Json, engine: Engine) -> Changes:
    flags = ("lstrip", "rstrip", "single_word")
    entries = [entry for entry in tokenizer.get("added_tokens") or [] if any(entry.get(flag) for flag in flags)]
    for entry in entries:
        entry |= dict.fromkeys(flags, False)
    if entries:
        names = ", ".join(entry["content"] for entry in entries[:4])
        yield f"llama.cpp keeps the white space around added tokens ({names}), the tokenizer drops it", tokenizer


def _long_words(tokenizer: Json, engine: Engine) -> Changes:
    model: Mapping[str, Any] = tokenizer["model"]
    if engine.model == "bert":
        limit = model.get("max_input_chars_per_word", 100)
        tokenizer["model"] = {**model, "max_input_chars_per_word": 1_000_000}
        yield f"llama.cpp splits words of more than {limit} characters, which are unknown to the tokenizer", tokenizer
