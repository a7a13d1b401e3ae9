"""The numbers of a model: config.json read by a row of the table, checked, and written as llama.cpp's keys.

A key that config.json leaves out has the value transformers gives it (`Architecture.defaults`); one without such a
default is required. Knows nothing of tensors.

Sources: llama.cpp conversion/base.py (set_gguf_parameters), src/llama-model.cpp (load_hparams).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgepack.errors import InputRefused
from edgepack.gguf.family import Architecture
from edgepack.gguf.file import Metadata, ValueType, array, boolean, f32, u32
from edgepack.gguf.model import Attention
from edgepack.gguf.rope import Rope, read_rope, rope_metadata

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp src/llama-hparams.h; more abort the loader


@dataclass(frozen=True)
class Hyperparameters:
    """What config.json says about a model, under the usual names.

    Args:
        sizes: By the words of `families.Module.shape`, plus layers, heads and kv_heads.
        epsilon: Of the norms.
        rope: None for learned positions.
        context: Tokens for which the GGUF computes what the checkpoint does.
        windows: Per layer, the sliding window the graph computes; None where the layer sees everything.
        tied: The output matrix is the token embedding.
        values: Further settings the table names, by config.json key.
    """

    sizes: Mapping[str, int]
    epsilon: float
    rope: Rope | None
    context: int
    windows: tuple[int | None, ...]
    tied: bool
    values: Mapping[str, Any]

    @property
    def attention(self) -> tuple[Attention, ...]:
        """What each layer keeps in the key-value cache."""
        return tuple(Attention(self.sizes["kv"], self.sizes["kv"], window) for window in self.windows)


class Config:
    """config.json through a row of the table: other names for the usual keys, defaults, and types checked."""

    def __init__(self, document: Mapping[str, Any], architecture: Architecture) -> None:
        self.document = document
        self._architecture = architecture

    def name(self, key: str) -> str:
        """The key as this family's config.json spells it."""
        return self._architecture.names.get(key, key)

    def get(self, key: str) -> Any:
        """The value, else transformers' default, else None."""
        name = self.name(key)
        return self.document[name] if name in self.document else self._architecture.defaults.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise InputRefused(f"config.json: {self.name(key)} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputRefused(f"config.json: {self.name(key)} is {value!r}; expected a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """A truth value; absent is false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise InputRefused(f"config.json: {self.name(key)} is {value!r}; expected true or false")
        return bool(value)


def read_hyperparameters(document: Mapping[str, Any], architecture: Architecture) -> Hyperparameters:
    """Read config.json by a row of the table.

    Args:
        document: config.json, linted.
        architecture: The row.

    Raises:
        InputRefused: A key is missing or of the wrong type, contradicts another, or asks for something the graph does
            not compute.
    """
    config = Config(document, architecture)
    sizes = _sizes(config, architecture)
    _check_requirements(config, architecture, sizes)
    context = config.size("max_position_embeddings")
    if architecture.position_offset:
        context = sizes["positions"]
    rope = None
    if architecture.rope_types:
        rope = read_rope(
            document,
            head_dim=sizes["head"],
            context=context,
            supported=architecture.rope_types,
            theta=config.number("rope_theta"),
            local_theta=architecture.rope_local_theta,
            partial=architecture.rope_partial is not None,
            partial_default=architecture.rope_partial or 1.0,
            uniform=architecture.rope_uniform,
        )
    windows = _windows(config, architecture, sizes["layers"])
    if architecture.window is not None and not architecture.window.computed:
        context = min([context, *(window for window in windows if window)])
        windows = (None,) * sizes["layers"]
    return Hyperparameters(
        sizes=sizes,
        epsilon=config.number("rms_norm_eps" if architecture.norm == "rms" else "layer_norm_eps"),
        rope=rope,
        context=context,
        windows=windows,
        tied=config.flag("tie_word_embeddings"),
        values={key.config: config.get(key.config) for key in architecture.keys},
    )


def _sizes(config: Config, architecture: Architecture) -> dict[str, int]:
    layers, hidden, heads = (config.size(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = config.size("num_key_value_heads", heads)
    if config.get("head_dim") is None and hidden % heads:
        raise InputRefused(f"config.json: hidden_size {hidden} is not a multiple of {heads} attention heads")
    head = config.size("head_dim", hidden // heads)
    if heads % kv_heads:
        raise InputRefused(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
    if layers > _MAX_LAYERS:
        raise InputRefused(f"config.json: {layers} layers; llama.cpp loads at most {_MAX_LAYERS}")
    if architecture.square and heads * head != hidden:
        raise InputRefused(
            f"config.json: {heads} heads of {head} make {heads * head}; llama.cpp's {architecture.name} graph needs "
            f"hidden_size, {hidden}"
        )
    ffn = config.size("intermediate_size", 4 * hidden if "intermediate_size" in architecture.defaults else None)
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head": head, "ffn": ffn}
    sizes |= {"vocab": config.size("vocab_size"), "2ffn": 2 * ffn, "q": heads * head, "kv": kv_heads * head}
    sizes["qkv"] = sizes["q"] + 2 * sizes["kv"]
    sizes["offset"] = config.size("pad_token_id", 1) + 1 if architecture.position_offset else 0
    sizes["positions"] = config.size("max_position_embeddings") - sizes["offset"]
    sizes["types"] = config.size("type_vocab_size", 1)
    if sizes["positions"] <= 0:
        raise InputRefused(f"config.json: max_position_embeddings leaves no position after the first {sizes['offset']}")
    return sizes


def _check_requirements(config: Config, architecture: Architecture, sizes: Mapping[str, int]) -> None:
    activation = config.get("hidden_act")
    if activation not in architecture.activations:
        raise InputRefused(
            f"config.json: {config.name('hidden_act')} is {activation!r}; llama.cpp's {architecture.name} graph "
            f"computes {' or '.join(sorted(architecture.activations))}"
        )
    for requirement in architecture.requires:
        value = config.get(requirement.config)
        if not requirement.allowed(value, sizes):
            raise InputRefused(
                f"config.json: {config.name(requirement.config)} is {value!r}; llama.cpp's {architecture.name} graph "
                f"needs {requirement.expected}"
            )


def _windows(config: Config, architecture: Architecture, layers: int) -> tuple[int | None, ...]:
    """The window of every layer by the checkpoint, whether or not the graph computes it."""
    rule = architecture.window
    types = config.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and set(types) <= {"full_attention", "sliding_attention"}
        if not known or len(types) != layers:
            raise InputRefused(
                f"config.json: layer_types must name full_attention or sliding_attention for each of {layers} layers"
            )
    if rule is None or config.get("sliding_window") is None or (rule.flag and not config.flag(rule.flag)):
        if types is not None and "sliding_attention" in types:
            raise InputRefused("config.json: layer_types has sliding_attention, but no sliding_window is in force")
        return (None,) * layers
    window = config.size("sliding_window")
    if types is None:
        every = config.size("sliding_window_pattern", rule.every or 1)
        since = config.get("max_window_layers") if rule.layers == "max_window_layers" else 0
        slides = [i >= since if rule.layers != "pattern" else (i + 1) % every != 0 for i in range(layers)]
    else:
        slides = [kind == "sliding_attention" for kind in types]
    return tuple(window if slide else None for slide in slides)


def hyperparameter_metadata(numbers: Hyperparameters, architecture: Architecture) -> Metadata:
    """The keys of llama.cpp's graph: everything its loader reads for the architecture, but the vocabulary."""
    at, sizes = architecture.name, numbers.sizes
    keys: Metadata = {
        f"{at}.block_count": u32(sizes["layers"]),
        f"{at}.context_length": u32(numbers.context),
        f"{at}.embedding_length": u32(sizes["hidden"]),
        f"{at}.feed_forward_length": u32(sizes["ffn"]),
        f"{at}.attention.head_count": u32(sizes["heads"]),
        f"{at}.attention.head_count_kv": u32(sizes["kv_heads"]),
        f"{at}.attention.key_length": u32(sizes["head"]),
        f"{at}.attention.value_length": u32(sizes["head"]),
        f"{at}.vocab_size": u32(sizes["vocab"]),
    }
    epsilon = "layer_norm_rms_epsilon" if architecture.norm == "rms" else "layer_norm_epsilon"
    keys[f"{at}.attention.{epsilon}"] = f32(numbers.epsilon)
    if numbers.rope is not None:
        keys |= rope_metadata(numbers.rope, at)
    windows = [window for window in numbers.windows if window]
    if windows:
        keys[f"{at}.attention.sliding_window"] = u32(windows[0])
        keys[f"{at}.attention.sliding_window_pattern"] = array(ValueType.BOOL, [w is not None for w in numbers.windows])
    for key in architecture.keys:
        value = numbers.values[key.config]
        if value is not None:
            keys[f"{at}.{key.name}"] = f32(value) if key.kind == "f32" else u32(value)
    if not architecture.causal:
        keys[f"{at}.attention.causal"] = boolean(False)
        keys["tokenizer.ggml.token_type_count"] = u32(sizes["types"])
    return keys
