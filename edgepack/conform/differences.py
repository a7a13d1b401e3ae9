"""What llama.cpp is known to do otherwise than a tokenizer, written as a change to that tokenizer.

Some steps of a tokenizer.json have no counterpart in a GGUF file: llama.cpp applies no NFC, tells case in ASCII only
for two pre-tokenizers, puts spaces before all texts or none. For each such step this module makes the tokenizer.json
that does what llama.cpp does. Where llama.cpp differs from the source, it must agree with the changed tokenizer id by
id: then the difference is the known one, and is recorded; anything else is an error.

Source: llama.cpp `src/llama-vocab.cpp`, `src/unicode.cpp`; Hugging Face `tokenizers`.
"""

from __future__ import annotations

import base64
import copy
import functools
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgepack.conform.charsmap import Charsmap
from edgepack.gguf.pre_tokenizers import PRE_TOKENIZERS, splits
from edgepack.gguf.spm import SPACE, prefix_scheme, puts_space
from edgepack.gguf.tokenizer_json import normalizers, pre_tokenizers

Json = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A known difference.

    Args:
        reason: One sentence for the report.
        tokenizer: tokenizer.json as llama.cpp runs it in this respect.
        prepare: Changes the text first, where tokenizer.json has no words for what llama.cpp does.
    """

    reason: str
    tokenizer: Json
    prepare: Callable[[str], str] = str


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
    together, prepares = tokenizer, []
    for change in _CHANGES:
        for difference in change(copy.deepcopy(tokenizer), engine):
            found.append(difference)
            together = next((also.tokenizer for also in change(copy.deepcopy(together), engine)), together)
            prepares.append(difference.prepare)
    if len(found) > 1:
        reasons = "; ".join(difference.reason for difference in found)
        found.append(
            Difference(reasons, together, lambda text: functools.reduce(lambda t, step: step(t), prepares, text))
        )
    return tuple(found)


def _one_after_the_other(steps: tuple[Callable[[str], str], ...], text: str) -> str:
    return functools.reduce(lambda changed, step: step(changed), steps, text)


Changes = Iterator[Difference]


def _normal_form(tokenizer: Json, engine: Engine) -> Changes:
    names = [node.get("type") for node in normalizers(tokenizer)]
    if engine.model == "gpt2" and names == ["NFC"]:
        tokenizer["normalizer"] = None
        yield Difference("llama.cpp does not bring text to Unicode normal form NFC, the tokenizer does", tokenizer)


def _words(tokenizer: Json, engine: Engine) -> Changes:
    for entry in PRE_TOKENIZERS:
        # Only for the name whose splits these are: a wrong name differs too, and that is no known difference.
        if engine.model == "gpt2" and entry.name == engine.pre and entry.engine and entry.splits == splits(tokenizer):
            nodes: list[Json] = [
                {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
                for expression in entry.engine
            ]
            nodes.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
            tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": nodes}
            yield Difference(entry.difference, tokenizer)


def _prefix(tokenizer: Json, engine: Engine) -> Changes:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    metaspace = [node for node in pre_tokenizers(tokenizer) if node.get("type") == "Metaspace"]
    if tokenizer["model"].get("type") != "BPE" or not metaspace:
        return
    if engine.prefix_space != (prefix_scheme(tokenizer) == "always") and prefix_scheme(tokenizer) != "first":
        return  # the key is wrong
    prepend = [{"type": "Prepend", "prepend": SPACE}] if engine.prefix_space else []
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, spaces]}
    if metaspace[0].get("split", True):
        tokenizer["pre_tokenizer"] = dict(metaspace[0], prepend_scheme="never")
    else:
        tokenizer["pre_tokenizer"] = None
    if engine.prefix_space:
        yield Difference(
            "llama.cpp puts a space before every text between special tokens; the tokenizer not before a space, or only"
            " at the start",
            tokenizer,
        )
    else:
        yield Difference(
            "llama.cpp puts no space before a text that starts without a special token; the tokenizer does", tokenizer
        )


def _stripping(tokenizer: Json, engine: Engine) -> Changes:
    flags = ("lstrip", "rstrip", "single_word")
    entries = [entry for entry in tokenizer.get("added_tokens") or [] if any(entry.get(flag) for flag in flags)]
    for entry in entries:
        entry |= dict.fromkeys(flags, False)
    if entries:
        names = ", ".join(entry["content"] for entry in entries[:4])
        yield Difference(
            f"llama.cpp keeps the white space around added tokens ({names}), the tokenizer drops it", tokenizer
        )


def _long_words(tokenizer: Json, engine: Engine) -> Changes:
    model: Mapping[str, Any] = tokenizer["model"]
    if engine.model == "bert":
        limit = model.get("max_input_chars_per_word", 100)
        tokenizer["model"] = {**model, "max_input_chars_per_word": 1_000_000}
        yield Difference(
            f"llama.cpp splits words of more than {limit} characters, which are unknown to the tokenizer", tokenizer
        )


def _accents(tokenizer: Json, engine: Engine) -> Changes:
    nodes = normalizers(tokenizer)
    if engine.model == "bert" and nodes[0].get("lowercase", True) and nodes[0].get("strip_accents") is not False:
        tokenizer["normalizer"] = nodes[0] | {"strip_accents": False}
        yield Difference(
            "llama.cpp drops all combining marks (Indic vowel signs too) and all but the first consonant of a"
            " Hangul syllable; the tokenizer drops accents only",
            tokenizer,
            _base_letters,
        )


def _base_letters(text: str) -> str:
    """What llama.cpp does when it strips accents: one code point for each, then no category M (llm_tokenizer_wpm)."""
    first = (unicodedata.normalize("NFD", letter)[0] for letter in text)
    return "".join(letter for letter in first if not unicodedata.category(letter).startswith("M"))


def _next_line(tokenizer: Json, engine: Engine) -> Changes:
    if engine.model == "bert":
        reason = "llama.cpp takes U+000B, U+000C and U+0085 for white space, the tokenizer drops them as controls"
        yield Difference(reason, tokenizer, lambda text: text.translate(dict.fromkeys((0x0B, 0x0C, 0x85), " ")))


def _graphemes(tokenizer: Json, engine: Engine) -> Changes:
    rules = [node for node in normalizers(tokenizer) if node.get("type") == "Precompiled"]
    if engine.model == "t5" and rules and rules[0].get("precompiled_charsmap"):
        rest = [node for node in normalizers(tokenizer) if node.get("type") != "Precompiled"]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": rest}
        yield Difference(
            "llama.cpp applies the charsmap to the longest match, as SentencePiece does, the tokenizer to graphemes",
            tokenizer,
            Charsmap(base64.b64decode(rules[0]["precompiled_charsmap"])),
        )


def _spaces(tokenizer: Json, engine: Engine) -> Changes:
    metaspace = [node for node in pre_tokenizers(tokenizer) if node.get("type") == "Metaspace"]
    if engine.model != "t5" or not metaspace or engine.prefix_space != puts_space(metaspace[0]):
        return
    rules = [node for node in normalizers(tokenizer) if node.get("type") == "Precompiled"]
    rules.append({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})
    rules.append({"type": "Replace", "pattern": {"Regex": "^ | $"}, "content": ""})
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    scheme = "always" if engine.prefix_space else "never"
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": rules}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, space]}
    reason = "llama.cpp takes only what the normalizer turns into spaces for white space, and drops it at the ends"
    yield Difference(reason, tokenizer)


# In the order in which they act on a text.
_CHANGES: tuple[Callable[[Json, Engine], Changes], ...] = (
    _normal_form,
    _words,
    _prefix,
    _stripping,
    _long_words,
    _next_line,
    _accents,
    _graphemes,
    _spaces,
)
