"""Rotary position embeddings: from the two forms of config.json to llama.cpp's keys and factor tensors.

transformers 5 writes `rope_parameters` (one table, or one per layer type); older checkpoints keep `rope_theta`,
`rope_scaling`, `rope_local_base_freq` and `partial_rotary_factor` beside each other. Both are read into one value.

Sources: transformers modeling_rope_utils.py (the frequencies), llama.cpp conversion/base.py, llama.py and phi.py (the
keys), src/llama-context.cpp and ggml/src/ggml-cpu/ops.cpp (what the runtime does with them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused
from edgepack.gguf.file import Metadata, f32, string, u32

# Both spell the same thing; "su" is what Microsoft's first Phi-3 uploads call longrope.
_SYNONYMS = {"su": "longrope"}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Args:
        type: `default`, `linear`, `dynamic`, `llama3`, `yarn` or `longrope`; of the layers with full attention.
        theta: Base of the frequencies in those layers.
        local_theta: Base in sliding-window layers, where it has a key of its own; else None.
        dimensions: Values of a head that are rotated.
        scaling: The other parameters, as config.json has them.
        context: max_position_embeddings.
    """

    type: str
    theta: float
    local_theta: float | None
    dimensions: int
    scaling: Mapping[str, Any]
    context: int

    @property
    def original_context(self) -> int:
        """Context before it was extended; transformers falls back to the context itself."""
        return int(self.scaling.get("original_max_position_embeddings") or self.context)

    @property
    def attention_factor(self) -> float | None:
        """What cosine and sine are multiplied with, relative to what llama.cpp does by itself; None where it is 1.

        llama.cpp multiplies yarn by 0.1 ln(factor) + 1 (ggml_rope_yarn) and has no use for the converter's key
        `rope.scaling.yarn_attn_factor` (src/llama-context.cpp overwrites it), so a factor of the model's own goes into
        `rope.scaling.attn_factor`.
        """
        own = self.scaling.get("attention_factor")
        if self.type == "longrope":
            factor = float(self.scaling.get("factor") or self.context / self.original_context)
            usual = math.sqrt(1 + math.log(factor) / math.log(self.original_context)) if factor > 1 else 1.0
            return float(own) if own is not None else usual
        if self.type == "yarn":
            factor = float(self.scaling["factor"])
            wanted = _yarn_attention_factor(factor, self.scaling)
            relative = wanted / _mscale(factor, 1.0)
            return None if math.isclose(relative, 1.0, rel_tol=1e-9) else relative
        return None


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    """As `_compute_yarn_parameters` of transformers chooses it."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, float(mscale)) / _mscale(factor, float(all_dim))
    return _mscale(factor, 1.0)


def read_rope(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    context: int,
    supported: frozenset[str],
    theta: float,
    local_theta: float | None,
    partial: bool,
    partial_default: float,
    uniform: bool,
) -> Rope:
    """Read the rotary embedding from either form of config.json.

    Args:
        config: config.json.
        head_dim: Values per head.
        context: max_position_embeddings.
        supported: Scaling types the architecture's graph computes.
        theta: Base where config.json names none.
        local_theta: The same for sliding-window layers; None where the graph has one base.
        partial: The graph can rotate a part of each head.
        partial_default: The part where config.json names none.
        uniform: The graph scales layers of all types alike.

    Raises:
        InputRefused: The type, a parameter, or a difference between layer types that the graph does not compute.
    """
    full, local = _tables(config, theta, local_theta, uniform)
    kind = _SYNONYMS.get(full["rope_type"], full["rope_type"])
    if not isinstance(kind, str) or kind not in supported:
        raise InputRefused(
            f"config.json: rope type {kind!r} is not computed by llama.cpp's graph; expected one of "
            f"{', '.join(sorted(supported))}"
        )
    _check_local(full, local, kind, has_base=local_theta is not None, uniform=uniform)
    part = _number(full, "partial_rotary_factor", partial_default)
    if part != 1 and not partial:
        raise InputRefused(f"config.json: partial_rotary_factor is {part}; llama.cpp's graph rotates whole heads")
    rope = Rope(
        type=kind,
        theta=_number(full, "rope_theta", theta),
        local_theta=_number(local, "rope_theta", local_theta or theta) if local_theta is not None else None,
        dimensions=int(head_dim * part),
        scaling={key: value for key, value in full.items() if key not in ("rope_type", "rope_theta")},
        context=context,
    )
    _check_scaling(rope)
    return rope


def _tables(
    config: Mapping[str, Any], theta: float, local_theta: float | None, uniform: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the layers with full attention and of those with a sliding window."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise InputRefused(f"config.json: rope_parameters is {given!r}; expected a table")
    flat = {"rope_theta": config.get("rope_theta", theta), "partial_rotary_factor": config.get("partial_rotary_factor")}
    if config.get("original_max_position_embeddings") is not None:  # beside the table, and it wins (Phi-3)
        given = {**given, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    nested = {
        name: given[name] for name in ("full_attention", "sliding_attention") if isinstance(given.get(name), Mapping)
    }
    if nested:
        full = dict(nested.get("full_attention") or {})
        local = dict(nested.get("sliding_attention") or full)
    elif not uniform:
        # Scaling in the old form is of the layers with full attention only (transformers configuration_gemma3.py).
        full, local = dict(given), {"rope_theta": config.get("rope_local_base_freq", local_theta)}
    else:
        full, local = dict(given), dict(given)
    for table in (full, local):
        for key, value in flat.items():
            if value is not None:
                table.setdefault(key, value)
        table["rope_type"] = table.get("rope_type") or table.pop("type", None) or "default"
        table.pop("type", None)
    return full, local


def _check_local(
    full: Mapping[str, Any], local: Mapping[str, Any], kind: str, *, has_base: bool, uniform: bool
) -> None:
    """The sliding-window layers must differ only where the graph lets them."""
    theta_differs = local.get("rope_theta") != full.get("rope_theta")
    local_kind = _SYNONYMS.get(local["rope_type"], local["rope_type"])
    if theta_differs and not has_base:
        raise InputRefused(
            f"config.json: rope_theta is {full.get('rope_theta')} in full and {local.get('rope_theta')} in sliding "
            "layers; llama.cpp's graph has one base for both"
        )
    if uniform and local_kind != kind:
        raise InputRefused(
            f"config.json: rope type is {kind} in full and {local_kind} in sliding layers; llama.cpp's graph scales "
            "both alike"
        )
    if not uniform and local_kind != "default":
        raise InputRefused(
            f"config.json: rope type is {local_kind!r} in sliding layers; llama.cpp's graph does not scale those"
        )


def _number(table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputRefused(f"config.json: rope parameter {key} is {value!r}; expected a positive number")
    return float(value)


# What each type cannot be computed without.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}

# llama.cpp's loader reads keys for these in a few architectures only, none of the table's (src/models/grok.cpp,
# mistral3.cpp): whatever a file says, the graph computes with the defaults of src/llama-hparams.h.
_YARN_FIXED: Mapping[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def _check_scaling(rope: Rope) -> None:
    for key in _REQUIRED.get(rope.type, ()):
        _number(rope.scaling, key, math.nan)
    for key, computed in _YARN_FIXED.items() if rope.type == "yarn" else ():
        found = rope.scaling.get(key)
        if found is not None and found != computed:
            raise InputRefused(
                f"config.json: rope parameter {key} is {found!r}; llama.cpp's graph computes {computed!r}"
            )
    if rope.type == "longrope":
        for key in ("short_factor", "long_factor"):
            values = rope.scaling.get(key)
            if not isinstance(values, list) or len(values) != rope.dimensions // 2:
                found = len(values) if isinstance(values, list) else values
                raise InputRefused(
                    f"config.json: rope parameter {key} has {found} values; expected {rope.dimensions // 2}"
                )
            for value in values:
                _number({key: value}, key, math.nan)


def rope_metadata(rope: Rope, architecture: str) -> Metadata:
    """The `rope.*` keys of the architecture (llama.cpp conversion/base.py, set_gguf_parameters)."""
    at = f"{architecture}.rope"
    keys: Metadata = {f"{at}.dimension_count": u32(rope.dimensions), f"{at}.freq_base": f32(rope.theta)}
    if rope.local_theta is not None:
        keys[f"{at}.freq_base_swa"] = f32(rope.local_theta)
    if rope.type in ("linear", "yarn", "longrope"):
        keys[f"{at}.scaling.type"] = string(rope.type)
    if rope.type in ("linear", "yarn"):
        keys[f"{at}.scaling.factor"] = f32(rope.scaling["factor"])
    if rope.type in ("yarn", "longrope"):
        keys[f"{at}.scaling.original_context_length"] = u32(rope.original_context)
    if rope.attention_factor is not None:
        keys[f"{at}.scaling.attn_factor"] = f32(rope.attention_factor)
    return keys


def rope_tensors(rope: Rope) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of divisors of the frequencies, one value per rotated pair; empty for types that need none."""
    if rope.type == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope)}
    if rope.type == "longrope":
        return {
            f"rope_factors_{which}.weight": np.asarray(rope.scaling[f"{which}_factor"], dtype=np.float32)
            for which in ("long", "short")
        }
    return {}


def _llama3_divisors(rope: Rope) -> npt.NDArray[np.float32]:
    """Short wavelengths as they are, long ones divided by `factor`, a smooth step between.

    Source: `_compute_llama3_parameters` of transformers; llama.cpp conversion/llama.py (generate_extra_tensors).
    """
    dimensions, scaling = rope.dimensions, rope.scaling
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = 1.0 / rope.theta ** (np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    turns = rope.original_context * frequencies / (2 * math.pi)  # of each pair within the original context
    # low == high would be a step: transformers then divides by zero, so does nobody
    smooth = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns > low).astype(np.float64)
    return np.asarray(1.0 / ((1 - smooth) / factor + smooth), dtype=np.float32)
