"""Types that a user sets for tensors by name, over those of the preset.

One rule: a pattern matches a tensor when it matches a run of whole dot-separated parts of its name, with the wildcards
of `fnmatch` (`*`, `?`, `[..]`; `*` crosses dots). `ffn_down` and `blk.*.ffn_down.weight` mean the same tensors, `blk.1`
does not reach into layer 10, and `output` is not `attn_output`. Case counts. Where several patterns match one tensor
the most literal one wins (the most characters that are not wildcards), so their order never matters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from edgepack.errors import UsageError
from edgepack.gguf.ggml import QUANTIZABLE
from edgepack.gguf.types import TYPES, GgmlType

_WILDCARD = re.compile(r"[*?\[]")


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` selects the tensor `name`, by the rule above."""
    if not _WILDCARD.search(pattern):
        return f".{pattern}." in f".{name}."  # a map of all tensors has as many patterns as names
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def match_overrides(
    quantizable: Sequence[str], names: Iterable[str], overrides: Mapping[str, str]
) -> dict[str, tuple[str, GgmlType]]:
    """Which tensors `overrides` change.

    Args:
        quantizable: Names that may be given another type; norms, biases and the like stay float32 and are passed over.
        names: Every tensor name of the model.
        overrides: Pattern -> type name, in any case.

    Returns:
        Tensor name -> (the pattern that won, its type).

    Raises:
        UsageError: Unknown type; a pattern that selects no tensor, or only tensors that stay float32; two patterns of
            equal weight that want different types for one tensor.
    """
    chosen: dict[str, tuple[str, GgmlType]] = {}
    everything = list(names)
    for pattern, word in sorted(overrides.items()):
        kind = _type(word, pattern)
        selected = [name for name in quantizable if matches(pattern, name)]
        if not selected:
            _refuse_idle(pattern, quantizable, everything)
        for name in selected:
            rival = chosen.get(name)
            if rival and _literal(rival[0]) == _literal(pattern) and rival[1] != kind:
                raise UsageError(
                    f"overrides {rival[0]!r} ({rival[1].name}) and {pattern!r} ({kind.name}) both select {name}",
                    hint="Make one of them longer: the most literal pattern wins.",
                )
            if not rival or _literal(pattern) > _literal(rival[0]):
                chosen[name] = (pattern, kind)
    return chosen


def _literal(pattern: str) -> int:
    return sum(character not in "*?[]" for character in pattern)


def _type(word: str, pattern: str) -> GgmlType:
    name = word.upper()
    if name not in QUANTIZABLE:
        near = difflib.get_close_matches(name, QUANTIZABLE, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Types: {', '.join(QUANTIZABLE)}"
        raise UsageError(f"override {pattern}: {word!r} is not a tensor type", hint=hint)
    return TYPES[name]


def _refuse_idle(pattern: str, quantizable: Sequence[str], names: Sequence[str]) -> None:
    """Say why `pattern` changes nothing."""
    kept = [name for name in names if matches(pattern, name)]
    if kept:
        raise UsageError(
            f"override {pattern!r} selects only tensors that stay F32, such as {kept[0]}",
            hint="Norms, biases and position tables are never quantized.",
        )
    roles = {part for name in quantizable for part in name.split(".")[-2:-1]}
    blocks = {".".join(name.split(".")[:2]) for name in quantizable if name.startswith("blk.")}
    near = difflib.get_close_matches(pattern, sorted(roles | blocks | set(quantizable)), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Tensors of this model: {', '.join(sorted(roles))}"
    raise UsageError(f"override {pattern!r} matches no tensor", hint=hint)
