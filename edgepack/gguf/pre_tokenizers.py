r"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json does, decided from its structure.

A byte-level BPE tokenizer first cuts text into words by regular expressions, one after the other; llama.cpp knows these
splits by name (`tokenizer.ggml.pre`). Its own converter finds the name from a hash over one tokenized text, so any new
vocabulary is unknown to it. Here the splits of tokenizer.json are brought to one spelling and looked up: the vocabulary
plays no part.

Does not know whether llama.cpp really splits like that: `edgepack/conform/tokens.py` proves it, id by id.

Sources: llama.cpp `src/llama-vocab.cpp` (llm_tokenizer_bpe: the expressions of every name, with the originals of
tokenizer.json in comments; llama_vocab::impl::load: `ignore_merges`), Hugging Face `tokenizers`
`src/pre_tokenizers/*.rs` (what each node does).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgepack.errors import InputRefused
from edgepack.gguf.tokenizer_json import pre_tokenizers

# English contractions, case-sensitive (GPT-2) and not (GPT-4 and later), in the one spelling used below.
_CASED = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLINGS = {
    _ANY_CASE: (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        r"'(?i:[sdmt]|ll|ve|re)",  # tiktoken; the alternatives differ in their first letter, so order is nothing
        r"(?i:'[sdmt]|'ll|'ve|'re)",
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
    ),
    _CASED: (r"'(?:[sdmt]|ll|ve|re)", r"(?:'s|'t|'re|'ve|'m|'ll|'d)", r"'s|'t|'m|'d|'re|'ve|'ll"),
}

# What the ByteLevel node does when use_regex is true: tokenizers src/pre_tokenizers/byte_level.rs.
_GPT2 = _CASED + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = _ANY_CASE + "|" + _LETTERS + r"|\p{N}" + _TAIL
_LLAMA3 = _ANY_CASE + "|" + _LETTERS + r"|\p{N}{1,3}" + _TAIL
# Words that end where lower case turns to upper case (Mistral's Tekken, OpenAI's o200k).
_CASE_AWARE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)"
)
_TEKKEN = _CASE_AWARE % ("", "", "")
_GPT4O = _CASE_AWARE % (_ANY_CASE + "?", _ANY_CASE + "?", "{1,3}")
# The same two as llama.cpp has them: letters of any case, and ASCII case only.
_ENGINE_CASE = (
    r"[^\r\n\p{L}\p{N}]?((?=[%s])([^a-z]))*((?=[%s])([^A-Z]))+%s|[^\r\n\p{L}\p{N}]?((?=[%s])([^a-z]))+((?=[%s])([^A-Z]))*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)"
)
_L, _LM = r"\p{L}", r"\p{L}\p{M}"
_DEEPSEEK_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK_LATIN = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι"
    r"ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲"
    r"𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_ASCII_PUNCTUATION = r"[\p{P}$+<=>^`|~]+"  # the Punctuation node: ASCII punctuation and category P, in runs


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    Args:
        name: Value of `tokenizer.ggml.pre`.
        splits: The expressions of tokenizer.json it stands for, in the spelling of `canonical`.
        ignore_merges: A word that is a token as a whole is taken without merging.
        engine: llama.cpp's own expressions where they are not equal to `splits`; else empty.
        difference: What that inequality does to text, in one sentence; empty when equal.
        rank: Among names of one structure, the lower splits more like tokenizer.json.
    """

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    engine: tuple[str, ...] = ()
    difference: str = ""
    rank: int = 0


_CASE_DIFFERENCE = (
    "llama.cpp tells upper from lower case in ASCII only%s when it cuts text into words, so words with such letters may"
    " be split differently"
)
_MARKS = " and takes combining marks for punctuation"

# First match wins; several names for one structure differ in `ignore_merges`.
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True),
    PreTokenizer("smaug-bpe", (_LLAMA3,)),
    PreTokenizer("qwen2", (_QWEN2,)),
    PreTokenizer(
        "qwen35",
        (_ANY_CASE + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",),
    ),
    PreTokenizer("ufakzeka", (_LETTERS + r"|\p{N}" + _TAIL,)),
    PreTokenizer(
        "seed-coder",
        (_ANY_CASE + "|" + _LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)",),
    ),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _ANY_CASE + "|" + _LETTERS + r"|\p{N}+" + _TAIL), ignore_merges=True),
    PreTokenizer("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
    PreTokenizer(
        "exaone-moe",
        (
            _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]+|\s+(?!\S)",
        ),
    ),
    PreTokenizer(
        "jais-2",
        (
            _LLAMA3.removesuffix(r"|\s+(?!\S)") + r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)"
            r"|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s",
        ),
    ),
    PreTokenizer(
        "tekken",
        (_TEKKEN,),
        ignore_merges=True,
        engine=(_ENGINE_CASE % (_L, _L, "", _L, _L, "", ""),),
        difference=_CASE_DIFFERENCE % _MARKS,
    ),
    PreTokenizer(
        "granite-embed-multi-97m",
        (_GPT4O,),
        ignore_merges=True,
        engine=(_ENGINE_CASE % (_LM, _LM, _ANY_CASE + "?", _LM, _LM, _ANY_CASE + "?", "{1,3}"),),
        difference=_CASE_DIFFERENCE % "",
    ),
    PreTokenizer(
        "gpt-4o",
        (_GPT4O,),
        engine=(_ENGINE_CASE % (_L, _L, _ANY_CASE + "?", _L, _L, _ANY_CASE + "?", "{1,3}"),),
        difference=_CASE_DIFFERENCE % _MARKS,
        rank=1,
    ),
    PreTokenizer(
        "deepseek-v3", (r"\p{N}{1,3}", _CJK, _DEEPSEEK_WORDS + r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)")
    ),
    PreTokenizer(
        "spark2_5",
        (r"\p{N}{1,3}", _CJK, _DEEPSEEK_WORDS + r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)", r"\p{N}"),
    ),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    PreTokenizer(
        "deepseek-llm",
        (r"[\r\n]", _DEEPSEEK_LATIN, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _DEEPSEEK_CJK, r"\p{N}"),
        engine=(r"[\r\n]", _DEEPSEEK_LATIN, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _DEEPSEEK_CJK, r"\p{N}+"),
        difference="llama.cpp keeps runs of digits together where this tokenizer splits them one by one",
    ),
    PreTokenizer("falcon", (_ASCII_PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (_BLOOM,)),
    PreTokenizer("viking", (_BLOOM, r"\p{N}")),
    PreTokenizer("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
)


def splits(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """The expressions that cut text into words, in order and in the one spelling of `canonical`.

    Args:
        tokenizer: Parsed tokenizer.json of a byte-level BPE tokenizer.

    Raises:
        InputRefused: A node does something no name of llama.cpp does.
    """
    found: list[str] = []
    for node in pre_tokenizers(tokenizer):
        kind = node.get("type")
        if kind == "ByteLevel":
            if node.get("add_prefix_space"):
                raise _unknown(tokenizer, "ByteLevel puts a space before the text (add_prefix_space), llama.cpp can't")
            found += [_GPT2] if node.get("use_regex", True) else []
        elif kind == "Digits":
            found.append(r"\p{N}" if node.get("individual_digits") else r"\p{N}+")
        elif kind == "Punctuation" and node.get("behavior") == "Contiguous":
            found.append(_ASCII_PUNCTUATION)
        elif kind == "Split" and _isolates(node):
            found.append(canonical(_expression(node["pattern"])))
        else:
            raise _unknown(tokenizer, f"no name of llama.cpp has a {kind} node like this one")
    return tuple(found)


def recognise(tokenizer: Mapping[str, Any]) -> tuple[PreTokenizer, ...]:
    """Every pre-tokenizer of llama.cpp with the structure of `tokenizer`, preferred one first.

    The order prefers the name that splits most like it, then the one with its `ignore_merges`; there may be none such.

    Args:
        tokenizer: Parsed tokenizer.json of a byte-level BPE tokenizer.

    Returns:
        At least one entry of the table.

    Raises:
        InputRefused: The structure is not in the table; the message prints it.
    """
    found = splits(tokenizer)
    matches = [entry for entry in PRE_TOKENIZERS if entry.splits == found]
    if not matches:
        raise _unknown(tokenizer, "the way it splits text into words has no name in llama.cpp that edgepack knows")
    wanted = bool(tokenizer["model"].get("ignore_merges"))
    return tuple(sorted(matches, key=lambda entry: (entry.rank, entry.ignore_merges != wanted)))


def canonical(expression: str) -> str:
    r"""One spelling for expressions that split alike; each rule keeps every match.

    Line breaks are escaped; contractions take one form; possessive quantifiers become greedy ones (in these expressions
    what follows never matches what was taken); `{1}` goes; `\s*[\r\n]` becomes `\s*[\r\n]+` (`\s*` has taken the breaks
    before the last one already); a last `|\s+` after `\s+(?!\S)` goes (what no alternative matches is a piece of its
    own, and there it is one character of white space).
    """
    text = expression.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    for form, spellings in _SPELLINGS.items():
        for spelling in spellings:
            text = text.replace(spelling, form)
    text = re.sub(r"(\\.|\[(?:\\.|[^\]\\])*\])|([?*+]|\{\d+(?:,\d*)?\})\+", lambda m: m[1] or m[2], text)
    text = text.replace("{1}", "")
    text = re.sub(r"\\s\*\[\\r\\n\](?!\+)", lambda m: m[0] + "+", text)
    return re.sub(r"(\\s\+\(\?!\\S\))\|\\s\+?$", r"\1", text)


def _isolates(node: Mapping[str, Any]) -> bool:
    # `Removed` inverted keeps the matches and drops the rest, and the expressions it is used with leave no rest.
    how = (node.get("behavior"), bool(node.get("invert")))
    return isinstance(node.get("pattern"), dict) and how in {("Isolated", False), ("Isolated", True), ("Removed", True)}


def _expression(pattern: Mapping[str, Any]) -> str:
    return str(pattern["Regex"]) if "Regex" in pattern else re.escape(str(pattern.get("String")))


def _unknown(tokenizer: Mapping[str, Any], why: str) -> InputRefused:
    structure = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
    known = ", ".join(dict.fromkeys(entry.name for entry in PRE_TOKENIZERS))
    return InputRefused(
        f"tokenizer.json: pre_tokenizer not understood: {why}: {structure[:1500]}",
        hint=f"Known: the structures of {known}. If llama.cpp's converter knows this model, give its F16 GGUF instead.",
    )
