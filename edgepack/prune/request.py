"""What a user asks to have left out, from the command line or `--prune`, checked against a model's headers.

    depth=2,method=greedy,ffn=1024,kv-heads=2,refit,vocabulary=FILE,sparsity=wanda:0.5    or    layers=3+7

Everything that can be refused is refused here, before a weight is read. Knows nothing of scores.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from edgepack.errors import UsageError
from edgepack.prune.anatomy import Anatomy, Sizes

Method = Literal["greedy", "influence", "angular"]
Criterion = Literal["magnitude", "wanda"]

# Weights per superblock of llama.cpp's k-quants, and per block of its older types (ggml-common.h: QK_K, QK8_0).
SUPERBLOCK, BLOCK = 256, 32
_KEYS = ("depth", "layers", "method", "ffn", "kv-heads", "vocabulary", "sparsity")
_REFIT = "refit"  # without a value


@dataclass(frozen=True)
class Sparsity:
    """Single weights to set to zero.

    Args:
        criterion: `magnitude` (|w|, per matrix) or `wanda` (|w| x norm of its input, per output row).
        share: Part of the weights, 0 to 1.
        keep, group: `keep` of every `group` weights in a row stay (2:4); 0, 0 for an unstructured pattern.
    """

    criterion: Criterion
    share: float
    keep: int = 0
    group: int = 0

    @property
    def name(self) -> str:
        """As the user writes it."""
        return f"{self.criterion}:{f'{self.keep}:{self.group}' if self.group else f'{self.share:g}'}"


@dataclass(frozen=True)
class Request:
    """What to leave out.

    Args:
        depth: Layers to drop, chosen by `method`.
        layers: Layers to drop, by number.
        method: How layers are chosen.
        ffn: Neurons that stay in every layer; None leaves them all.
        kv_heads: Key-value heads that stay in every layer, with their query heads.
        vocabulary: Texts (files, folders, `hub:` names) whose tokens stay.
        sparsity: Single weights.
        refit: Matrices that stay make up for what went.
    """

    depth: int = 0
    layers: tuple[int, ...] = ()
    method: Method = "greedy"
    ffn: int | None = None
    kv_heads: int | None = None
    vocabulary: tuple[str, ...] = ()
    sparsity: Sparsity | None = None
    refit: bool = False

    def as_json(self) -> dict[str, Any]:
        """For workers and reports; `from_json` reads it back."""
        return asdict(self)

    @property
    def empty(self) -> bool:
        """Nothing is asked for."""
        return replace(self, method="greedy", refit=False) == Request()


def from_json(document: dict[str, Any]) -> Request:
    """What `Request.as_json` gave, after a trip through JSON."""
    sparsity = document["sparsity"]
    return Request(
        **{
            **document,
            "layers": tuple(document["layers"]),
            "vocabulary": tuple(document["vocabulary"]),
            "sparsity": None if sparsity is None else Sparsity(**sparsity),
        }
    )


def parse(text: str) -> Request:
    """`--prune` of a build.

    Args:
        text: `key=value` pairs, and `refit`, between commas; lists are written with `+`.

    Raises:
        UsageError: Not of that form, an unknown key, or a value that is none.
    """
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        key = key.replace("_", "-")
        if key == _REFIT and not equals:
            value = key
        elif not equals or key not in _KEYS:
            near = difflib.get_close_matches(key, (*_KEYS, _REFIT), 1)
            hint = f"Did you mean {near[0]}?" if near else "For example: --prune depth=2,ffn=1024."
            raise UsageError(
                f"--prune: {part.strip()!r}: expected KEY=VALUE with one of {', '.join(_KEYS)}, or {_REFIT}", hint=hint
            )
        if key in values:
            raise UsageError(f"--prune: {key} is given twice")
        values[key] = value.strip()
    return make(
        depth=_whole(values.get("depth"), "depth"),
        layers=values.get("layers", "").replace("+", ",") or None,
        method=values.get("method"),
        ffn=_whole(values.get("ffn"), "ffn"),
        kv_heads=_whole(values.get("kv-heads"), "kv-heads"),
        vocabulary=tuple(name for name in values.get("vocabulary", "").split("+") if name),
        sparsity=values.get("sparsity"),
        refit=_REFIT in values,
    )


def make(
    *,
    depth: int | None = None,
    layers: str | None = None,
    method: str | None = None,
    ffn: int | None = None,
    kv_heads: int | None = None,
    vocabulary: tuple[str, ...] = (),
    sparsity: str | None = None,
    refit: bool = False,
) -> Request:
    """A request from what stands on the command line.

    Args:
        depth: Layers to drop.
        layers: Numbers of layers to drop, between commas.
        method: `greedy`, `influence` or `angular`.
        ffn: Neurons that stay.
        kv_heads: Key-value heads that stay.
        vocabulary: Texts.
        sparsity: `wanda:0.5`, `magnitude:0.5`, `2:4`, `magnitude:2:4`.
        refit: Make up for layers, neurons and heads.

    Raises:
        UsageError: A value that is none, or nothing is asked for.
    """
    if depth is not None and layers is not None:
        raise UsageError("depth and layers are both given", hint="Say how many layers to drop, or which.")
    if depth is not None and depth < 1:
        raise UsageError(f"depth is {depth}, expected at least 1")
    if method is not None and method not in get_args(Method):
        raise UsageError(f"method is {method!r}, expected one of {', '.join(get_args(Method))}")
    if method is not None and depth is None:
        raise UsageError("a method chooses layers to drop, and depth is not given", hint="Add --depth N.")
    numbers = _numbers(layers) if layers is not None else ()
    found = Request(
        depth or 0,
        numbers,
        cast("Method", method or "greedy"),
        ffn,
        kv_heads,
        vocabulary,
        None if sparsity is None else _sparsity(sparsity),
        refit,
    )
    if found.empty:
        raise UsageError(
            "nothing to prune", hint="Give at least one of depth, layers, ffn, kv-heads, vocabulary, sparsity."
        )
    if refit and not (found.depth or numbers or ffn or kv_heads):
        raise UsageError("refit makes up for layers, neurons and heads, and none of them go", hint="Leave refit out.")
    if refit and sparsity is not None:
        raise UsageError("refit would fill the zeros of sparsity", hint="Give one of them.")
    return found


def check(request: Request, anatomy: Anatomy, sizes: Sizes, name: str) -> None:
    """Refuse what can't be cut, from headers alone.

    Args:
        request: What is asked.
        anatomy: Of the model.
        sizes: Of the model.
        name: For messages.

    Raises:
        UsageError: The message says why and what is possible.
    """
    _check_depth(request, anatomy, sizes, name)
    if request.ffn is not None:
        _check_ffn(request.ffn, sizes, name)
    if request.kv_heads is not None:
        _check_heads(request.kv_heads, anatomy, sizes, name)
    for text in request.vocabulary:
        if not text.startswith("hub:") and not Path(text).exists():
            raise UsageError(f"vocabulary: {text[:200]}: no such file or folder", hint="Name UTF-8 text.")


def _check_depth(request: Request, anatomy: Anatomy, sizes: Sizes, name: str) -> None:
    beyond = [number for number in request.layers if number >= sizes.layers]
    if beyond:
        raise UsageError(f"{name} has no layer {beyond[0]}: its {sizes.layers} layers are 0 to {sizes.layers - 1}")
    count = request.depth or len(request.layers)
    if count >= sizes.layers:
        raise UsageError(
            f"{name} has {sizes.layers} layers: dropping {count} would leave none",
            hint=f"Drop at most {sizes.layers - 1}; beyond a third, prune and heal in rounds.",
        )
    if anatomy.first_stays and 0 in request.layers:
        raise UsageError(f"layer 0 of {name} can't go: {anatomy.first_stays}")
    if count and anatomy.period > 1:
        whole = f"its runtime treats every {anatomy.period}th layer otherwise, by its number"
        if count % anatomy.period:
            raise UsageError(
                f"{name}: {whole}: layers go in runs of {anatomy.period}, and {count} were asked for",
                hint=f"Drop {anatomy.period * max(1, count // anatomy.period)}.",
            )
        kept = [number for number in range(sizes.layers) if number not in request.layers]
        shifted = any((number - place) % anatomy.period for place, number in enumerate(kept))
        if request.layers and shifted:
            raise UsageError(f"{name}: {whole}: these layers would shift the pattern", hint="Drop whole runs.")


def _check_ffn(width: int, sizes: Sizes, name: str) -> None:
    unit = SUPERBLOCK if sizes.ffn > SUPERBLOCK else BLOCK
    possible = [str(w) for w in range(unit, sizes.ffn, unit)]
    if width % unit or not 0 < width < sizes.ffn:
        raise UsageError(
            f"ffn is {width}: expected a multiple of {unit}, in which the types of llama.cpp come, below the "
            f"{sizes.ffn} of {name}",
            hint=f"Possible: {_listed(possible)}." if possible else "This model is too narrow for it.",
        )


def _check_heads(count: int, anatomy: Anatomy, sizes: Sizes, name: str) -> None:
    if not anatomy.attention:
        raise UsageError(f"{name}: heads can't be pruned: {anatomy.headless}")
    width = sizes.head * sizes.ratio
    unit = SUPERBLOCK if sizes.heads * sizes.head % SUPERBLOCK == 0 else BLOCK
    possible = [str(n) for n in range(1, sizes.kv_heads) if n * width % unit == 0]
    hint = f"Possible: {_listed(possible)}." if possible else "No smaller number fits this model."
    if not 0 < count < sizes.kv_heads:
        raise UsageError(f"kv-heads is {count}: {name} has {sizes.kv_heads}, expected fewer and at least 1", hint=hint)
    if count * width % unit:
        raise UsageError(
            f"kv-heads is {count}: with {sizes.ratio} query heads of {sizes.head} each that makes rows of "
            f"{count * width}, expected a multiple of {unit}, in which the types of llama.cpp come",
            hint=hint,
        )


def _listed(words: list[str]) -> str:
    return ", ".join(words) if len(words) <= 12 else ", ".join([*words[:3], "...", *words[-6:]])


def _whole(text: str | None, key: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,7}", text):
        raise UsageError(f"{key} is {text[:40]!r}, expected a whole number")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,4}", part) for part in parts):
        raise UsageError(f"layers is {text[:80]!r}, expected numbers from 0 on: 3,7")
    numbers = sorted(int(part) for part in parts)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"layers is {text[:80]!r}: a layer can go only once")
    return tuple(numbers)


def _sparsity(text: str) -> Sparsity:
    match = re.fullmatch(r"(?:(magnitude|wanda):)?(?:(\d{1,2}):(\d{1,2})|(0?\.\d{1,4}))", text)
    if match is None or (match[4] and not match[1]):
        raise UsageError(
            f"sparsity is {text[:40]!r}", hint="Expected wanda:0.5, magnitude:0.5 (the part set to zero) or 2:4."
        )
    criterion = cast("Criterion", match[1] or "wanda")
    if match[4]:
        share = float(match[4])
        if not 0 < share < 1:
            raise UsageError(f"sparsity is {text}: the part set to zero must be above 0 and below 1")
        return Sparsity(criterion, share)
    keep, group = int(match[2]), int(match[3])
    if not 0 < keep < group:
        raise UsageError(f"sparsity is {text}: expected fewer kept than there are, such as 2:4")
    return Sparsity(criterion, 1 - keep / group, keep, group)
