"""The shape of a row in the table of architectures.

Everything that differs between families is a field here; `families.py` holds the rows, `architectures.py` interprets
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Shapes are words for sizes that `hyperparameters.py` computes from config.json, outermost first:
#   vocab hidden ffn 2ffn q (heads x head_dim) kv qkv head (head_dim) positions types


@dataclass(frozen=True)
class Module:
    """A weight of the checkpoint, its bias if it has one, and where they go.

    Args:
        source: Module name after the checkpoint's prefix; `{i}` is the layer. `output` is outside the prefix.
        target: GGUF name without suffix.
        shape: Size words of the weight as the GGUF holds it.
        bias: True, False, or the config.json flag that decides; biases have the weight's first size.
        transform: A name of `transforms.TRANSFORMS`, applied to weight and bias.
    """

    source: str
    target: str
    shape: str
    bias: bool | str = False
    transform: str = "copy"


@dataclass(frozen=True)
class Key:
    """A metadata key copied from config.json: `<architecture>.<name>`."""

    name: str
    config: str
    kind: Literal["f32", "u32"] = "f32"


@dataclass(frozen=True)
class Requirement:
    """A setting that the graph hard-codes; a checkpoint that differs would load and compute something else.

    Args:
        config: The key of config.json.
        allowed: What it may be, from the sizes of the model; a missing key is None.
        expected: The same in words, for the message.
    """

    config: str
    allowed: Callable[[Any, Mapping[str, int]], bool]
    expected: str


@dataclass(frozen=True)
class Window:
    """Sliding-window attention.

    Args:
        layers: Which layers slide where config.json has no `layer_types`: `all`, `max_window_layers` (those from that
            number on), or `pattern` (all but every n-th).
        every: n of `pattern`, unless config.json has `sliding_window_pattern`.
        flag: config.json key that switches sliding on; None: a `sliding_window` is enough.
        computed: The graph slides. Otherwise every layer sees the whole context, and the context of the file ends where
            the two begin to differ: at the window.
    """

    layers: Literal["all", "max_window_layers", "pattern"]
    every: int = 0
    flag: str | None = None
    computed: bool = False


@dataclass(frozen=True)
class Architecture:
    """One row: how checkpoints of a family become the tensors and keys of one llama.cpp graph.

    Args:
        name: `general.architecture`.
        upstream: The llama.cpp files that say so.
        modules: In file order; those with `{i}` are repeated per layer.
        prefixes: What may stand before module names; the first that fits is taken.
        names: Keys of config.json that differ from the usual ones, usual name first.
        defaults: Usual names config.json may leave out, with the value transformers gives them.
        norm: `rms` or `layer`; decides the epsilon's key.
        activations: What the graph computes, in config.json's words.
        output: What becomes of tied embeddings: `optional` (the graph reuses token_embd), `tied` (it always does),
            `required` (it wants the matrix, so a tied one is written twice), `none` (an encoder).
        rope_types: Scaling types the graph computes; empty without rotary embedding.
        rope_local_theta: Default base of sliding layers; None where the graph has one base.
        rope_partial: Default rotated part of a head; None where the graph rotates whole heads only.
        rope_uniform: Scaling applies to sliding layers too.
        square: The graph demands heads x head_dim == hidden_size.
        window: Sliding windows of the family; None where there are none.
        keys: Further metadata.
        requires: What the graph hard-codes.
        ignored: Patterns of tensor names, without prefix, that take no part in what the GGUF computes.
        causal: False for encoders.
        position_offset: Rows before the first position in the position table (pad_token_id + 1 of RoBERTa).
        gelu: The activation goes through llama.cpp's float16 GELU table, so logits agree less closely.
    """

    name: str
    upstream: str
    modules: tuple[Module, ...]
    prefixes: tuple[str, ...] = ("model.", "")
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    activations: frozenset[str] = frozenset({"silu", "swish"})
    output: Literal["optional", "tied", "required", "none"] = "optional"
    rope_types: frozenset[str] = frozenset()
    rope_local_theta: float | None = None
    rope_partial: float | None = None
    rope_uniform: bool = True
    square: bool = False
    window: Window | None = None
    keys: tuple[Key, ...] = ()
    requires: tuple[Requirement, ...] = ()
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    causal: bool = True
    position_offset: bool = False
    gelu: bool = False
