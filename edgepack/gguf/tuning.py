"""A type for every tensor, chosen for this model: the least predicted divergence within a number of bytes.

The costs come from `edgepack/calibrate/sensitivity.py`, the solver is `edgepack/allocate.py`; here sizes are made exact
to the byte of the finished file, and presets stand as candidates: the map that is chosen is predicted to be at least as
close to the source as the best preset that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgepack.allocate import Option, allocate, total_cost
from edgepack.errors import BudgetError, StepError
from edgepack.figures import significant
from edgepack.gguf.file import Metadata, pad
from edgepack.gguf.ggml import ABORTS_WITHOUT_IMATRIX
from edgepack.gguf.imatrix import Imatrix
from edgepack.gguf.layout import ALIGNMENT, Layout, plan_layout
from edgepack.gguf.model import ModelSpec, TensorSpec
from edgepack.gguf.overrides import match_overrides
from edgepack.gguf.presets import PRESETS
from edgepack.gguf.size import Size
from edgepack.gguf.types import TYPES, row_bytes

# For rows that the blocks of 256 do not divide, whatever the profile lists: what llama-quantize itself falls back to.
SMALL_BLOCKS = ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
_PLACEHOLDER_SHA256 = "0" * 64


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Args:
        types: Tensor -> type, every matrix of the model.
        base: The preset whose name and id the file carries: the one nearest in size.
        predicted_kld: In nats per token.
        runner_up: The best preset that fits: its name, bytes and predicted divergence; None where none fits.
    """

    types: Mapping[str, str]
    base: str
    predicted_kld: float
    runner_up: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """The allocation as it stands in the manifest."""
        return {
            "types": dict(self.types),
            "base": self.base,
            "predicted_kld": significant(self.predicted_kld, 4),
            "runner_up": dict(self.runner_up) if self.runner_up else None,
        }


def allowed_types(presets: Sequence[str], listed: Sequence[str]) -> tuple[str, ...]:
    """Types that a tensor may be given: those the profile lists, else those its candidate presets are made of."""
    if listed:
        return tuple(listed)
    found: dict[str, None] = {}
    for name in presets:
        found.setdefault(PRESETS[name].base)
    return tuple(name for name in found if TYPES[name].block > 1)


def expected_imatrix(model: ModelSpec, datasets: Sequence[str]) -> Imatrix:
    """Stands for the importance matrix that calibration will make: same names and sizes, so that headers are exact."""
    zeros = {tensor.name: np.zeros(tensor.width, np.float32) for tensor in multiplied(model)}
    return Imatrix(zeros, _PLACEHOLDER_SHA256, tuple(datasets), 0)


def multiplied(model: ModelSpec) -> list[TensorSpec]:
    """Matrices that inputs are multiplied by: all but an embedding that is only looked up."""
    return [
        tensor for tensor in model.tensors if not tensor.keep_f32 and (tensor.name != "token_embd.weight" or model.tied)
    ]


@dataclass(frozen=True)
class Room:
    """What a file of one model is made of, whatever its types.

    Args:
        model: The model.
        fixed: Bytes of headers and of the tensors that stay as they are.
        kinds: Tensor -> types it may be given.
        sizes: Tensor -> type -> bytes in the file, padding included.
    """

    model: ModelSpec
    fixed: int
    kinds: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Mapping[str, int]]

    @property
    def least(self) -> int:
        """Bytes of the smallest file that can be made."""
        return self.fixed + sum(min(sizes.values()) for sizes in self.sizes.values())

    @property
    def most(self) -> int:
        """Bytes of the largest file that types on offer make."""
        return self.fixed + sum(max(sizes.values()) for sizes in self.sizes.values())

    def bits_per_weight(self, total_bytes: int) -> float:
        """Bits of tensor data per weight of a file of so many bytes."""
        return (total_bytes - self.fixed + self._kept) * 8 / self.model.parameters

    @property
    def _kept(self) -> int:
        return sum(4 * tensor.parameters for tensor in self.model.tensors if tensor.keep_f32)

    def nbytes(self, name: str, kind: str) -> int:
        """Bytes a tensor takes in the file, padding included."""
        return self.sizes[name][kind]

    def budget(self, size: Size) -> int:
        """Bytes of the whole file that a size allows."""
        if size.total_bytes is not None:
            return size.total_bytes
        bits = (size.bits_per_weight or 0.0) * self.model.parameters
        return int(bits / 8) - self._kept + self.fixed


def _nbytes(tensor: TensorSpec, kind: str) -> int:
    return pad(tensor.rows * row_bytes(TYPES[kind], tensor.width), ALIGNMENT)


def room(
    model: ModelSpec,
    kinds: Sequence[str],
    *,
    overrides: Mapping[str, str],
    imatrix: Imatrix,
    shard_bytes: int | None,
    extra_metadata: Metadata,
) -> Room:
    """Measure the parts of the file that do not depend on types; of a split file, the most that they can take."""
    matrices = [tensor for tensor in model.tensors if not tensor.keep_f32]
    pinned = match_overrides([tensor.name for tensor in matrices], [tensor.name for tensor in model.tensors], overrides)
    offered = {
        tensor.name: (pinned[tensor.name][1].name,) if tensor.name in pinned else _fitting(tensor, kinds, model)
        for tensor in matrices
    }
    largest = {tensor.name: max(offered[tensor.name], key=partial(_nbytes, tensor)) for tensor in matrices}
    layout = plan_layout(
        model, "Q8_0", overrides=largest, imatrix=imatrix, shard_bytes=shard_bytes, extra_metadata=extra_metadata
    )
    fixed = layout.total_bytes - sum(_nbytes(tensor, largest[tensor.name]) for tensor in matrices)
    if len(layout.shards) > 1:  # the largest types make most shards; smaller ones pad their headers differently
        fixed += ALIGNMENT * len(layout.shards)
    sizes = {tensor.name: {kind: _nbytes(tensor, kind) for kind in offered[tensor.name]} for tensor in matrices}
    return Room(model, fixed, offered, sizes)


def _fitting(tensor: TensorSpec, kinds: Sequence[str], model: ModelSpec) -> tuple[str, ...]:
    looked_up = tensor.name == "token_embd.weight" and not model.tied
    barred = ABORTS_WITHOUT_IMATRIX if looked_up else frozenset()
    found = tuple(kind for kind in kinds if tensor.width % TYPES[kind].block == 0 and kind not in barred)
    if all(TYPES[kind].block < 256 for kind in found):
        found = tuple(dict.fromkeys((*found, *(kind for kind in SMALL_BLOCKS if tensor.width % 32 == 0))))
    return found or ("F16",)


def choose(
    where: Room, costs: Mapping[str, Mapping[str, float]], size: Size, presets: Mapping[str, Layout]
) -> Allocation:
    """The best types within a size.

    Args:
        where: Of the model.
        costs: Tensor -> type -> nats per token; every type of `where.kinds`, and those of the presets.
        size: What is allowed.
        presets: Candidate presets with their layouts.

    Raises:
        BudgetError: No types are small enough.
    """
    budget = where.budget(size)
    refuse_too_small(where, size)
    options = {
        name: [Option(kind, where.nbytes(name, kind), _cost(costs, name, kind)) for kind in kinds]
        for name, kinds in where.kinds.items()
    }
    chosen = allocate(options, budget - where.fixed)
    types, predicted = {name: option.kind for name, option in chosen.items()}, total_cost(chosen)
    fitting = [_priced(name, layout, costs) for name, layout in presets.items() if layout.total_bytes <= budget]
    best = min(
        (found for found in fitting if found is not None), key=lambda found: found["predicted_kld"], default=None
    )
    used = where.fixed + sum(option.nbytes for option in chosen.values())
    base = min(presets, key=lambda name: abs(presets[name].total_bytes - used), default="Q4_K_M")
    if best is not None and best["predicted_kld"] < predicted:
        layout = presets[best["quantize"]]
        types = {name: layout.types[name].name for name in where.kinds}
        return Allocation(types, best["quantize"], best["predicted_kld"], best)
    return Allocation(types, base, predicted, best)


def refuse_too_small(where: Room, size: Size) -> None:
    """Say what is possible where a size is not.

    Raises:
        BudgetError: Even the smallest types take more.
    """
    budget = where.budget(size)
    if budget >= where.least:
        return
    layers = max(1, where.model.layers)
    inside = [name for name in where.kinds if name.startswith("blk.")]
    layer = sum(min(where.sizes[name].values()) for name in inside) // layers
    dropped = math.ceil((where.least - budget) / layer) if layer else layers
    hint = f"The least is {where.least:,} bytes with the types this target's engine runs well."
    if dropped < layers:
        hint += f" Each layer less would save {layer:,} bytes: {dropped} of {layers} would have to go."
    raise BudgetError(f"size {size.name}: {budget:,} bytes are too few for this model", hint=hint)


def _priced(name: str, layout: Layout, costs: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """A preset's prediction; None where it holds a type that was not priced."""
    total = 0.0
    for tensor, prices in costs.items():
        price = prices.get(layout.types[tensor].name)
        if price is None:
            return None
        total += price
    return {"quantize": name, "artifact_bytes": layout.total_bytes, "predicted_kld": significant(total, 4)}


def _cost(costs: Mapping[str, Mapping[str, float]], name: str, kind: str) -> float:
    try:
        return costs[name][kind]
    except KeyError:
        raise StepError(f"{name} was not priced as {kind}") from None
