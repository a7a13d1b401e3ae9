"""What stays of a checkpoint, and what that makes of every tensor and of config.json. Arithmetic on headers.

Leaving a neuron out equals setting its column in the down projection to zero; leaving a head out, its columns in the
output projection; leaving a layer out, passing its input on. The cut model computes exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import Checkpoint, TensorInfo
from edgepack.errors import InputRefused
from edgepack.prune.anatomy import Anatomy, Sizes

Indices = npt.NDArray[np.int64]

# One entry per layer, and numbers of layers: besides any list of that length whose name speaks of layers.
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_types")
_LAYER_NUMBERS = ("mlp_only_layers",)
# Rules that derive a layer's kind from its number: after a cut the list says it instead.
_PATTERN_RULES = (
    "sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "no_rope_layer_interval",
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """What stays.

    Args:
        layers: Original numbers of the layers that stay, ascending; None for all.
        neurons: For every layer that stays, by original number: the neurons that stay, ascending; empty for all.
        groups: The same of key-value heads.
        tokens: Original ids of the tokens that stay, ascending; None for all.
    """

    layers: tuple[int, ...] | None = None
    neurons: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    groups: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """One tensor of the cut checkpoint.

    Args:
        name: In the cut checkpoint.
        info: The tensor it is taken from.
        rows: Rows of the tensor's 2-D view that stay; None for all.
        columns: The same of columns; a vector is one row.
    """

    name: str
    info: TensorInfo
    rows: Indices | None = None
    columns: Indices | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """After the cut."""
        shape = list(self.info.shape)
        if self.columns is not None:
            shape[-1] = len(self.columns)
        if self.rows is not None:
            shape[0] = len(self.rows)
        return tuple(shape)

    @property
    def parameters(self) -> int:
        """Elements after the cut."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes after the cut."""
        return self.info.nbytes // max(1, self.info.parameters) * self.parameters


def pieces(checkpoint: Checkpoint, anatomy: Anatomy, sizes: Sizes, cut: Cut) -> Iterator[Piece]:
    """Every tensor that stays, in the checkpoint's order.

    Raises:
        InputRefused: A tensor is of another shape than its place makes it.
    """
    new_number = {old: new for new, old in enumerate(cut.layers or range(sizes.layers))}
    tokens = None if cut.tokens is None else np.array(cut.tokens, dtype=np.int64)
    for name, info in checkpoint.tensors.items():
        place = anatomy.place(name)
        if place is None:
            of_tokens = tokens is not None and info.shape[:1] == (sizes.vocabulary,)
            yield _taken(name, info, tokens if of_tokens else None, axis=0)
            continue
        before, number, inside = place
        if number not in new_number:
            continue
        indices, axis = _inside(anatomy, sizes, cut, number, inside, info)
        yield _taken(f"{before}{new_number[number]}.{inside}", info, indices, axis)


def _inside(
    anatomy: Anatomy, sizes: Sizes, cut: Cut, number: int, inside: str, info: TensorInfo
) -> tuple[Indices | None, int]:
    """Which indices of which axis stay; axes are of the tensor as it is stored."""
    module, _, kind = inside.rpartition(".")
    matrix = kind == "weight"
    rows, columns = (1, 0) if anatomy.transposed and matrix else (0, 1)
    neurons, groups = cut.neurons.get(number), cut.groups.get(number)
    if neurons:
        if module in anatomy.ffn_in:
            stacked = [np.array(neurons) + piece * sizes.ffn for piece in range(anatomy.fused)]
            return _checked(np.concatenate(stacked), rows, anatomy.fused * sizes.ffn, info), rows
        if module == anatomy.ffn_out and matrix:
            return _checked(np.array(neurons), columns, sizes.ffn, info), columns
    if groups and module in anatomy.attention:
        query, key, value, output = anatomy.attention
        per_group = {query: sizes.ratio * sizes.head, key: sizes.head, value: sizes.head, output: query_width(sizes)}
        if module != output:
            width = per_group[module]
            return _checked(spread(groups, width), rows, sizes.kv_heads * width, info), rows
        if matrix:
            width = per_group[output]
            return _checked(spread(groups, width), columns, sizes.kv_heads * width, info), columns
    return None, 0


def query_width(sizes: Sizes) -> int:
    """Columns of the output projection that belong to one key-value head."""
    return sizes.ratio * sizes.head


def spread(groups: tuple[int, ...], width: int) -> Indices:
    """Indices of groups of neighbours: (1,), 3 -> 3, 4, 5."""
    return (np.array(groups, dtype=np.int64)[:, None] * width + np.arange(width)).reshape(-1)


def _checked(indices: Indices, axis: int, size: int, info: TensorInfo) -> Indices:
    if len(info.shape) <= axis or info.shape[axis] != size:
        raise InputRefused(
            f"{info.file.name}: tensor {info.name} has shape {list(info.shape)}; config.json makes {size}"
        )
    return indices


def _taken(name: str, info: TensorInfo, indices: Indices | None, axis: int) -> Piece:
    if indices is None:
        return Piece(name, info)
    by_columns = axis == len(info.shape) - 1
    return Piece(name, info, columns=indices) if by_columns else Piece(name, info, rows=indices)


def cut_config(
    config: Mapping[str, Any], anatomy: Anatomy, sizes: Sizes, cut: Cut, layer_types: list[str] | None
) -> dict[str, Any]:
    """config.json of the cut checkpoint; token ids are not in it (`token_ids.py`).

    Args:
        config: Of the source.
        anatomy: Of the model.
        sizes: Of the source.
        cut: What stays.
        layer_types: What transformers takes every layer of the source for, where it is a matter of the layer's number.
    """
    found = dict(config)
    if cut.layers is not None:
        found = _shorter(found, anatomy, sizes, cut.layers, layer_types)
    if cut.neurons:
        found[anatomy.ffn_key] = len(next(iter(cut.neurons.values())))
    if cut.groups:
        count = len(next(iter(cut.groups.values())))
        found |= {anatomy.heads_key: count * sizes.ratio, anatomy.kv_heads_key: count, "head_dim": sizes.head}
    if cut.tokens is not None:
        found["vocab_size"] = len(cut.tokens)
    return found


def _shorter(
    config: dict[str, Any], anatomy: Anatomy, sizes: Sizes, kept: tuple[int, ...], layer_types: list[str] | None
) -> dict[str, Any]:
    for key in anatomy.index_keys:
        if config.get(key):
            raise InputRefused(f"config.json: {key} is {config[key]!r}: layers depend on their number, so none can go")
    found = dict(config) | {anatomy.depth_key: len(kept)}
    for key, value in config.items():
        per_layer = key in _PER_LAYER or "layer" in key
        if per_layer and isinstance(value, list) and len(value) == sizes.layers and key not in _LAYER_NUMBERS:
            found[key] = [value[number] for number in kept]
        if key in _LAYER_NUMBERS and isinstance(value, list):
            found[key] = [place for place, number in enumerate(kept) if number in value]
    if type(config.get("max_window_layers")) is int:
        found["max_window_layers"] = sum(number < config["max_window_layers"] for number in kept)
    if layer_types is not None and len(set(layer_types)) > 1:
        found["layer_types"] = [layer_types[number] for number in kept]
        if anatomy.period == 1:
            for key in _PATTERN_RULES:
                found.pop(key, None)
    return found
