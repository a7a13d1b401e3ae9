"""What a user asks of a draft model: how it is cut from the source, healed and quantized, and how far it drafts.

    depth=4,ffn=512,heal=200k,quantize=Q4_0,length=4

What is not said has a default that depends on the model. Knows nothing of weights.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepack.errors import UsageError

if TYPE_CHECKING:
    from edgepack.prune.anatomy import Anatomy, Sizes
    from edgepack.prune.request import Request

# What `--draft` says when nothing is said; docs/drafting.md has the table. Q4_0: a draft's errors cost speed, never
# quality, and llama.cpp has interleaved kernels for it on x86-64 and arm64.
HEAL_TOKENS = 200_000
QUANTIZE = "Q4_0"
LONGEST = 16  # drafts of llama.cpp's older default; beyond it no acceptance below 95 % pays

_OWN = ("heal", "quantize", "length")
_CUTS = ("depth", "layers", "method", "ffn", "kv-heads")
_REFUSED = {
    "vocabulary": "token ids go from draft to artifact, so both need the same tokens",
    "sparsity": "zeros make no draft faster",
}
_EXAMPLE = "For example: --draft depth=4,heal=200k,quantize=Q4_0,length=4."


@dataclass(frozen=True)
class DraftRequest:
    """A draft model as it is asked for.

    Args:
        prune: What to leave out of the source; None leaves out half of the layers.
        heal: Tokens to train on afterwards; 0 for none.
        quantize: Preset.
        length: Tokens drafted per pass; None lets measurement choose.
    """

    prune: Request | None = None
    heal: int = HEAL_TOKENS
    quantize: str = QUANTIZE
    length: int | None = None

    def cut(self, anatomy: Anatomy, sizes: Sizes) -> Request:
        """What to leave out, with the default filled in.

        Args:
            anatomy: Of the source.
            sizes: Of the source.

        Raises:
            UsageError: The model has too few layers to drop half of them.
        """
        from edgepack.prune.request import Request

        if self.prune is not None:
            return self.prune
        depth = sizes.layers // 2 // anatomy.period * anatomy.period
        if depth < 1:
            raise UsageError(
                f"a model of {sizes.layers} layers: no half of them can go", hint="Say what else: --draft ffn=256."
            )
        return Request(depth=depth)

    def as_json(self) -> dict[str, Any]:
        """For the manifest; `prune` is recorded with what came of it."""
        return {"heal": self.heal, "quantize": self.quantize, "length": self.length}


def parse(text: str) -> DraftRequest:
    """`--draft` of a build.

    Args:
        text: `key=value` pairs between commas; empty for the defaults.

    Raises:
        UsageError: Not of that form, an unknown key, or a value that is none.
    """
    from edgepack.prune import request as pruning

    values = _pairs(text)
    cuts = ",".join(f"{key}={value}" for key, value in values.items() if key in _CUTS)
    found = DraftRequest(prune=pruning.parse(cuts) if cuts else None)
    if "heal" in values:
        found = replace(found, heal=_tokens(values["heal"]))
    if "quantize" in values:
        found = replace(found, quantize=_preset(values["quantize"]))
    return replace(found, length=_length(values["length"])) if "length" in values else found


def _pairs(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        key = key.replace("_", "-")
        if key in _REFUSED:
            raise UsageError(f"--draft: {key} is not for drafts: {_REFUSED[key]}", hint=_EXAMPLE)
        if not equals or not value or key not in (*_CUTS, *_OWN):
            near = difflib.get_close_matches(key, (*_CUTS, *_OWN), 1)
            raise UsageError(
                f"--draft: {part!r}: expected KEY=VALUE with one of {', '.join((*_CUTS, *_OWN))}",
                hint=f"Did you mean {near[0]}?" if near and near[0] != key else _EXAMPLE,
            )
        if key in values:
            raise UsageError(f"--draft: {key} is given twice")
        values[key] = value
    return values


def _tokens(text: str) -> int:
    from edgepack.heal.budget import parse_tokens

    return 0 if text in ("0", "none") else parse_tokens(text, "--draft heal=")


def _preset(text: str) -> str:
    from edgepack.gguf.presets import find_preset

    return find_preset(text).name


def _length(text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text) or not 1 <= int(text) <= LONGEST:
        raise UsageError(f"--draft: length is {text[:40]!r}, expected 1 to {LONGEST} drafted tokens per pass")
    return int(text)
