"""Which type every tensor of a model gets: the choice of llama_model_quantize, from the table in presets.py.

Source: llama.cpp src/llama-quant.cpp (`tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`, `tensor_requires_imatrix`) at commit 0c1e57098bba. One thing differs on purpose: an override of
one tensor changes that tensor alone, where llama.cpp's counters then give other layers other types. Knows nothing of
files or weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgepack.errors import InputRefused, UsageError
from edgepack.gguf.ggml import ABORTS_WITHOUT_IMATRIX
from edgepack.gguf.overrides import match_overrides
from edgepack.gguf.presets import PRESETS, Preset, find_preset
from edgepack.gguf.types import TYPES, GgmlType

__all__ = ["PRESETS", "Preset", "assign_types", "find_preset", "needs_imatrix", "quantizable"]


@dataclass(frozen=True)
class _Model:
    """What the rules look at beside the tensor itself."""

    architecture: str
    layers: int
    gqa: int
    experts: int
    imatrix: bool
    tied: bool
    seventy_b: bool


@dataclass(frozen=True)
class _Place:
    """A tensor among those of its role: the `layer`-th of `layers`."""

    layer: int
    layers: int
    model: _Model


_CONDITIONS: Mapping[str, Callable[[_Place], bool]] = {
    "more": lambda p: p.layer < p.layers // 8 or p.layer >= 7 * p.layers // 8 or _third(p.layer - p.layers // 8) == 2,
    "eighth": lambda p: p.layer < p.layers // 8,
    "sixteenth": lambda p: p.layer < p.layers // 16,
    "middle": lambda p: p.layers // 8 <= p.layer < 7 * p.layers // 8,
    "first2": lambda p: p.layer < 2,
    "first4": lambda p: p.layer < 4,
    "gqa4": lambda p: p.model.gqa >= 4,
    "experts4": lambda p: p.model.experts >= 4,
    "experts8": lambda p: p.model.experts == 8,
    "imatrix": lambda p: p.model.imatrix,
    "no-imatrix": lambda p: not p.model.imatrix,
    "falcon": lambda p: p.model.architecture == "falcon",
}


def _third(number: int) -> int:
    """`number % 3` as C computes it: the sign of the dividend."""
    return int(math.fmod(number, 3))


# Substrings of names that are never quantized: small, sensitive, or read by an operation that wants floats.
_KEPT_PARTS = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *("time_mix_first.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight"),
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    *("attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd"),
    *(".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT_BY_ARCHITECTURE: Mapping[str, tuple[str, ...]] = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
        *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    )
}
_AT_LEAST_Q8_0: Mapping[str, tuple[str, ...]] = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
# Architectures whose 3-D tensors are not all experts: there MXFP4_MOE looks at the role too.
_EXPERTS_BY_ROLE = ("bailingmoe3",)
# (architecture, layers) that llama.cpp calls 70B (src/models/*.cpp); for llama only with grouped heads.
_SEVENTY_B = {("llama", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}

# Role of a tensor by the first part its name contains (tensor_get_category); attn_qkv and attn_kv_b count as attn_v.
_ROLES = (
    *(("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v")),
    *(("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output")),
    *(("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down")),
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

# What a type becomes where its block does not divide the width (tensor_type_fallback).
_FALLBACK: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
_FLOATS = ("F32", "F16", "BF16")
_WANTS_IMATRIX = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}


def quantizable(name: str, shape: Sequence[int], architecture: str) -> bool:
    """Whether llama.cpp quantizes this tensor at all (`tensor_allows_quantization`); the others stay float32."""
    dimensions = len(shape) - next((i for i, size in enumerate(shape) if size != 1), len(shape))
    if dimensions < 2 or not name.endswith("weight") or name in _KEPT_NAMES:
        return False
    return not any(part in name for part in (*_KEPT_PARTS, *_KEPT_BY_ARCHITECTURE.get(architecture, ())))


def needs_imatrix(name: str, kind: GgmlType, preset: Preset) -> bool:
    """Whether writing this tensor as `kind` without importance values is refused (`tensor_requires_imatrix`)."""
    if kind.name in ABORTS_WITHOUT_IMATRIX:
        return True
    if name in (*_EMBEDDINGS, "output.weight"):
        return False
    return kind.name in _WANTS_IMATRIX or (kind.name == "Q2_K" and preset.name == "Q2_K_S")


def assign_types(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    preset: str,
    *,
    architecture: str,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    has_imatrix: bool = False,
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, GgmlType]:
    """A type for every tensor: exactly what llama_model_quantize chooses from an F32 file, then the overrides.

    Args:
        tensors: (GGUF name, shape in numpy order) of the whole model, in any order: the choice depends on the layer
            number and the name, as in llama.cpp. Tied embeddings are seen from the absence of `output.weight`.
        preset: A name of `PRESETS` or an alias.
        architecture: `general.architecture`.
        layers: Transformer blocks (`<arch>.block_count`).
        heads: Attention heads of the first layer.
        kv_heads: Key-value heads of the first layer.
        experts: Experts per layer, 0 for a dense model.
        has_imatrix: An importance matrix will be used.
        overrides: Pattern -> type name, see `overrides.py`.

    Returns:
        Type by tensor name, in the order given.

    Raises:
        UsageError: Unknown preset or type; an override that matches nothing, or whose block does not divide a width;
            a type that needs an importance matrix without one.
        InputRefused: A width that the preset has no type for.
    """
    recipe = find_preset(preset)
    shapes = dict(tensors)
    grouped = architecture != "llama" or heads != kv_heads
    model = _Model(
        architecture=architecture,
        layers=layers,
        gqa=heads // kv_heads if kv_heads else 0,
        experts=experts,
        imatrix=has_imatrix,
        tied="output.weight" not in shapes,
        seventy_b=(architecture, layers) in _SEVENTY_B and grouped,
    )
    free = [name for name, shape in tensors if quantizable(name, shape, architecture)]
    types = dict.fromkeys(shapes, TYPES["F32"]) | _mixture(recipe, model, free, shapes)
    for name, (pattern, kind) in match_overrides(free, shapes, overrides).items():
        width = shapes[name][-1]
        if width % kind.block:
            raise UsageError(
                f"override {pattern}: {name} has {width} weights per row, {kind.name} needs a multiple of {kind.block}",
                hint=f"{_fitting(kind.name, width)} is the nearest type that fits",
            )
        types[name] = kind
    if not has_imatrix:
        _refuse_without_imatrix(recipe, types)
    return types


def _refuse_without_imatrix(recipe: Preset, types: Mapping[str, GgmlType]) -> None:
    for name, kind in types.items():
        if needs_imatrix(name, kind, recipe):
            without = ", ".join(p.name for p in PRESETS.values() if not p.needs_imatrix)
            raise UsageError(
                f"{recipe.name} needs an importance matrix: {name} would be {kind.name}",
                hint=f"Give one with --calibration (a GGUF file of llama-imatrix), or use one of {without}.",
            )


def _file_order(name: str) -> tuple[int, str]:
    """llama.cpp visits tensors by layer, then by name (weight_name_comparer of src/llama-model-loader.h)."""
    return (_layer(name, -1), name)


def _layer(name: str, otherwise: int) -> int:
    layer = re.match(r"blk\.(\d+)", name)
    return int(layer[1]) if layer else otherwise


def _role(name: str) -> str:
    return next((role for part, role in _ROLES if part in name), "")


def _mixture(
    recipe: Preset, model: _Model, free: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, GgmlType]:
    """Types of the quantizable tensors by preset alone, with llama.cpp's way of counting layers.

    A layer is the how-manieth tensor of its role this is: of all attention-value tensors, or of `layers` for the
    feed-forward ones, whose number is read from the name in a model with experts.
    """
    types: dict[str, GgmlType] = {}
    seen: Counter[str] = Counter()
    attention_layers = sum(_role(name) == "attn_v" for name in shapes)
    for name in sorted(free, key=_file_order):
        role = _role(name)
        layer = seen[role]
        seen[role] += 1
        if role.startswith("ffn") and model.experts > 1 and not recipe.low:
            layer = _layer(name, layer)
        place = _Place(layer, attention_layers if role == "attn_v" else model.layers, model)
        word = recipe.base
        if word not in _FLOATS:
            word = _fitting(_choose(recipe, place, name, role, shapes[name]), shapes[name][-1])
        types[name] = TYPES[word]
    return types


def _choose(recipe: Preset, place: _Place, name: str, role: str, shape: tuple[int, ...]) -> str:
    """Type name of one tensor, before the look at its width (`llama_tensor_get_type_impl`)."""
    model = place.model
    if any(part in name for part in _AT_LEAST_Q8_0.get(model.architecture, ())):
        return "Q8_0"
    if name == "output.weight" or (model.tied and name in _EMBEDDINGS):
        misses = shape[-1] % TYPES[recipe.base].block != 0
        return "Q8_0" if misses or model.architecture == "falcon" else recipe.output
    if recipe.name == "MXFP4_MOE":
        experts = len(shape) > 2 and shape[-3] > 1
        return "MXFP4" if experts and (model.architecture not in _EXPERTS_BY_ROLE or role.startswith("ffn")) else "Q8_0"
    if name in _EMBEDDINGS:
        return recipe.base if recipe.embedding == "=" else recipe.embedding
    if model.experts == 8 and not recipe.low and role in ("attn_v", "attn_k"):
        return "Q8_0"
    word = _first_that_holds(recipe.rules.get(role, "="), place)
    word = recipe.base if word == "=" else word
    if model.seventy_b and not recipe.low and role == "attn_v" and word in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return word


def _first_that_holds(mixture: str, place: _Place) -> str:
    """The type of the first alternative of `mixture` whose conditions all hold, `=` where none does."""
    for alternative in mixture.split("; "):
        conditions, _, word = alternative.rpartition(": ")
        if all(_CONDITIONS[condition](place) for condition in conditions.split()):
            return word
    return "="


def _fitting(word: str, width: int) -> str:
    """`word`, or what llama.cpp falls back to where its block does not divide `width` (`tensor_type_fallback`)."""
    if width % TYPES[word].block == 0:
        return word
    if word not in _FALLBACK and TYPES[word].block > 32:
        raise InputRefused(f"rows of {width} weights can't be {word}: not a multiple of {TYPES[word].block}")
    narrower = _FALLBACK.get(word, word)
    return narrower if width % TYPES[narrower].block == 0 else "F16"
