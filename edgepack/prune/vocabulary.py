"""Which tokens a model can do without on the languages and texts a user names, and the tokenizer without the others.

Kept are: every token the texts use, what these are merged from, all added tokens, all tokens of bytes, and, where a
tokenizer has no bytes to fall back on, all tokens of one character. So every text still has ids; text that uses kept
tokens only has the same tokens as before:

    BPE        merges that made the kept tokens stay, in their order; the best merge of a word stays the best
    WordPiece  the longest match stays the longest, and
    Unigram    the best segmentation the best, as only other pieces went

The number is filled up to a multiple of `ROWS` with the tokens of the lowest ids, which BPE learned first. Works on the
document of tokenizer.json; knows nothing of weights. Source of the format: Hugging Face `tokenizers`, src/models.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgepack.errors import InputRefused, StepError
from edgepack.gguf.tokenizer_json import merge_pairs, model_of, older_type, pre_tokenizers, token_ids

ROWS = 64  # rows come in multiples of it, as matrix kernels like them

_PIECE = 1 << 20  # characters encoded at once
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def used_tokens(encode: Callable[[str], list[int]], texts: Iterable[str]) -> dict[int, int]:
    """How often each id occurs in some texts.

    Args:
        encode: Text to ids.
        texts: Cut at line ends into pieces of about a million characters.
    """
    counts: dict[int, int] = {}
    for text in texts:
        for piece in _pieces(text):
            for number in encode(piece):
                counts[number] = counts.get(number, 0) + 1
    return counts


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def choose_tokens(
    tokenizer: Mapping[str, Any], used: Iterable[int], *, rows: int, special: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ids that stay, ascending.

    Args:
        tokenizer: tokenizer.json.
        used: Ids the texts use.
        rows: Rows of the embedding.
        special: Ids that config files name.

    Raises:
        InputRefused: A tokenizer that is not understood, or nothing would go.
    """
    ids = token_ids(tokenizer)
    by_id = {number: token for token, number in ids.items()}
    kind = _kind(tokenizer)
    needed = _needed(tokenizer, kind, ids)
    wanted = {number for number in (*used, *special) if number in by_id}
    wanted |= {ids[token] for token in needed}
    parents = _parents(tokenizer) if kind == "BPE" else {}
    kept: set[int] = set()
    for number in wanted:
        kept |= {ids[token] for token in _ancestry(by_id[number], parents) if token in ids}
    target = min(-(-len(kept) // ROWS) * ROWS, len(by_id))
    for number in sorted(by_id):
        if len(kept) >= target:
            break
        if {ids[token] for token in _ancestry(by_id[number], parents) if token in ids} <= kept | {number}:
            kept.add(number)
    beyond = max(kept, default=0)
    if beyond >= rows:
        raise InputRefused(
            f"tokenizer.json: token {by_id[beyond]!r} has id {beyond}, and the embedding has {rows} rows"
        )
    if len(kept) >= rows:
        raise InputRefused(
            f"the texts use {len(wanted):,} of {rows:,} tokens, and with what these are made of none can go",
            hint="Name less text, or text of fewer languages.",
        )
    return tuple(sorted(kept))


def without_tokens(tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """tokenizer.json with the kept tokens alone, numbered anew in the same order.

    Args:
        tokenizer: tokenizer.json.
        kept: Ids, ascending.
    """
    number = {old: new for new, old in enumerate(kept)}
    found: dict[str, Any] = copy.deepcopy({key: value for key, value in tokenizer.items() if key != "model"})
    model = dict(model_of(tokenizer))
    ids = token_ids(tokenizer)
    if _kind(tokenizer) == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in number]
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
    else:
        model["vocab"] = {token: number[old] for token, old in model["vocab"].items() if old in number}
    if "merges" in model:
        stays = {token for token, old in ids.items() if old in number}
        lists = any(isinstance(entry, list) for entry in model["merges"])
        merges = [(a, b) for a, b in merge_pairs(tokenizer) if {a, b, a + b} <= stays]
        model["merges"] = [[a, b] if lists else f"{a} {b}" for a, b in merges]
    found["model"] = model
    found["added_tokens"] = [
        entry | {"id": number[entry["id"]]} for entry in tokenizer.get("added_tokens") or [] if entry["id"] in number
    ]
    if found.get("post_processor"):
        _renumber_processor(found["post_processor"], number)
    if isinstance(found.get("padding"), dict):
        found["padding"]["pad_id"] = number[found["padding"]["pad_id"]]
    return {key: found[key] for key in [*tokenizer, *(key for key in found if key not in tokenizer)]}


def check_same_tokens(
    before: Callable[[str], list[int]], after: Callable[[str], list[int]], kept: Sequence[int], texts: Iterable[str]
) -> int:
    """Prove that texts have the tokens they had.

    Args:
        before: The full tokenizer.
        after: The smaller one.
        kept: Original ids by new id.
        texts: Texts whose tokens were all kept.

    Returns:
        Tokens compared.

    Raises:
        StepError: A token differs.
    """
    compared = 0
    for text in texts:
        for piece in _pieces(text):
            expected, found = before(piece), [kept[number] for number in after(piece)]
            if found != expected:
                at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
                raise StepError(
                    f"vocabulary: the smaller tokenizer differs at token {at}: {found[at : at + 3]} instead of "
                    f"{expected[at : at + 3]}",
                    hint="Please report this with the tokenizer.",
                )
            compared += len(found)
    return compared


def _kind(tokenizer: Mapping[str, Any]) -> str:
    model = model_of(tokenizer)
    kind = model.get("type") or older_type(model)
    if kind not in ("BPE", "WordPiece", "Unigram"):
        raise InputRefused(
            f"tokenizer.json: model type {kind!r} can't be made smaller; expected BPE, WordPiece, Unigram"
        )
    if kind == "BPE":
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(option):
                raise InputRefused(f"tokenizer.json: model.{option} is {model[option]!r}: can't be made smaller")
    return str(kind)


def _needed(tokenizer: Mapping[str, Any], kind: str, ids: Mapping[str, int]) -> set[str]:
    """Tokens that stay whatever the texts are."""
    model = model_of(tokenizer)
    needed = {entry["content"] for entry in tokenizer.get("added_tokens") or []}
    if model.get("unk_token") in ids:
        needed.add(model["unk_token"])
    if kind == "Unigram" and model.get("unk_id") is not None:
        needed.add(model["vocab"][model["unk_id"]][0])
    if kind == "Unigram":  # the penalty of unknown characters counts from the least score (tokenizers unigram/model.rs)
        needed.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    byte_level = kind == "BPE" and any(node.get("type") == "ByteLevel" for node in pre_tokenizers(tokenizer))
    if model.get("byte_fallback"):
        needed |= {token for token in ids if _BYTE.fullmatch(token)}
    if byte_level or not model.get("byte_fallback"):  # of a byte-level alphabet every token of one character is a byte
        prefix = model.get("continuing_subword_prefix") or ("##" if kind == "WordPiece" else "")
        needed |= {token for token in ids if len(token) == 1 or (prefix and len(token.removeprefix(prefix)) == 1)}
    return needed & set(ids)


def _parents(tokenizer: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The two tokens each token is last merged from when it is a word of its own."""
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(tokenizer))}
    return {a + b: last for a, b in ranks if (last := _last_merge(a + b, ranks)) is not None}


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The last merge that makes a token from its characters; None where merges don't get there."""
    parts = list(token)
    while len(parts) > 1:
        pairs = [(ranks.get(pair, -1), at) for at, pair in enumerate(itertools.pairwise(parts))]
        rank, at = min(((rank, at) for rank, at in pairs if rank >= 0), default=(-1, -1))
        if rank < 0:
            return None
        if len(parts) == 2:
            return parts[0], parts[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return None


def _ancestry(token: str, parents: Mapping[str, tuple[str, str]]) -> set[str]:
    """A token and all it is merged from."""
    found, waiting = {token}, [token]
    while waiting:
        for part in parents.get(waiting.pop(), ()):
            if part not in found:
                found.add(part)
                waiting.append(part)
    return found


def _renumber_processor(node: dict[str, Any], number: Mapping[int, int]) -> None:
    """Ids inside a post-processor: TemplateProcessing's table, the pairs of BertProcessing and RobertaProcessing."""
    for inner in node.get("processors") or []:
        _renumber_processor(inner, number)
    for entry in (node.get("special_tokens") or {}).values():
        entry["ids"] = [number[old] for old in entry["ids"]]
    for key in ("sep", "cls"):
        if isinstance(node.get(key), list):
            node[key] = [node[key][0], number[node[key][1]]]
