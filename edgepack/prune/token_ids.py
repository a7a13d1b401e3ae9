"""Ids of tokens in the configuration files of a model, found and renumbered.

Keys are those of transformers (`configuration_utils.py`, `generation/configuration_utils.py`,
`tokenization_utils_base.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgepack.errors import InputRefused

# An id, a list of ids, or lists of ids.
_IDS = re.compile(r"\w*_token_ids?|suppress_tokens|begin_suppress_tokens|bad_words_ids|force_words_ids")
# Ids in another form, which would go wrong silently.
_UNKNOWN = ("forced_decoder_ids", "sequence_bias", "watermarking_config")

# Other forms of a vocabulary beside tokenizer.json, which transformers would not read or read instead: they go.
REPLACED = re.compile(r"vocab\.(json|txt)|merges\.txt|added_tokens\.json|.+\.model|tokenizer\.model\..*")


def named_ids(document: Mapping[str, Any]) -> Iterator[int]:
    """Every token id a configuration file names.

    Raises:
        InputRefused: A key that holds ids in a form that is not understood.
    """
    for key, value in document.items():
        if key in _UNKNOWN and value:
            raise InputRefused(f"{key} names token ids, and a smaller vocabulary would change them: not supported")
        if _IDS.fullmatch(key):
            yield from _flat(value)


def renumbered(document: Mapping[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    """A configuration file with new ids; one of a token that has gone is left out of lists and becomes null."""
    return {key: _renumber(value, number) if _IDS.fullmatch(key) else value for key, value in document.items()}


def renumbered_tokenizer_config(document: Mapping[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer_config.json with new ids."""
    found = renumbered(document, number)
    entries = found.get("added_tokens_decoder")
    if isinstance(entries, dict):
        found["added_tokens_decoder"] = {
            str(number[int(old)]): entry for old, entry in entries.items() if int(old) in number
        }
    return found


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for inner in value:
            yield from _flat(inner)
    elif type(value) is int and value >= 0:
        yield value


def _renumber(value: Any, number: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        found = [_renumber(inner, number) for inner in value]
        return [inner for inner in found if inner is not None and inner != []]
    return number.get(value) if type(value) is int and value >= 0 else value
