"""Weights that are read when they are needed: torch tensors that record what is done to them.

The ONNX Runtime GenAI builder walks a transformers model and transposes, joins, splits and shifts its parameters into
initializers. Given `Deferred` parameters it does so without a weight in memory: every operation runs on the meta device
for its shape and is noted down; `materialize` reads the checkpoint and repeats the operations for one initializer at a
time. Parameters are float32 whatever the checkpoint stores (BF16 and F16 widen exactly), so that Gemma's `1 + weight`
is not rounded to BF16, as it is when the builder loads the model itself.

Does not know the builder, nor which operations it uses: everything of `torch.ops.aten` works. Source of the mechanism:
torch docs, "Extending torch with a Tensor-like type", `__torch_dispatch__` wrapper subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgepack.checkpoint import Checkpoint, TensorInfo, read_float32

Floats = npt.NDArray[np.float32]

# Operations after which row i of the result is still row i of the source; a pair of transposes is looked at apart.
_SAME_ROWS = {"aten::detach", "aten::alias", "aten::_to_copy", "aten::contiguous", "aten::clone", "aten::lift_fresh"}
_TRANSPOSES = {"aten::t", "aten::transpose.int", "aten::permute", "aten::numpy_T"}
_READ_WEIGHTS = 1 << 20  # read at a time when a tensor is looked through
# What needs values: the tensor is read, then asked again.
_VALUES = {"numpy", "tolist", "item", "__array__", "__float__", "__int__", "__bool__", "cpu_numpy"}


class Deferred(torch.Tensor):  # type: ignore[misc]
    """A tensor whose values are in a checkpoint, or follow from such tensors by recorded operations."""

    _shadow: torch.Tensor  # on the meta device: shape, strides and dtype
    _compute: Callable[[], torch.Tensor]
    _leaf: TensorInfo | None  # the checkpoint's tensor, when this is one, transposed or not
    _transposed: bool
    _uncast: Deferred  # the same values before the last change of type; itself when there was none
    _sources: tuple[TensorInfo, ...]  # the checkpoint's tensors it is made of, in the order they came in

    @staticmethod
    def __new__(
        cls: type[Deferred],
        shadow: torch.Tensor,
        compute: Callable[[], torch.Tensor],
        leaf: TensorInfo | None = None,
        transposed: bool = False,
        sources: tuple[TensorInfo, ...] = (),
    ) -> Deferred:
        """Wrap a meta tensor and the way to its values."""
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, shadow.shape, strides=shadow.stride(), dtype=shadow.dtype, device="cpu", requires_grad=False
        )
        made._shadow, made._compute, made._leaf, made._transposed = shadow, compute, leaf, transposed
        made._uncast = made
        made._sources = (leaf,) if leaf is not None else sources
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Shape and source; never values."""
        source = "recorded" if self._leaf is None else self._leaf.name
        return f"Deferred({source}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read the tensor for methods that hand out values; record all others."""
        if getattr(function, "__name__", "") in _VALUES:
            return function(*_map(args, materialize), **_map(kwargs or {}, materialize))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on the meta device and note it down."""
        kwargs = kwargs or {}
        on_meta = kwargs | ({"device": "meta"} if "device" in kwargs else {})
        shadows = function(*_map(args, _shadow_of), **_map(on_meta, _shadow_of))

        def compute() -> Any:
            return function(*_map(args, materialize), **_map(kwargs, materialize))

        made_of = tuple(dict.fromkeys(_infos([args, kwargs])))
        if isinstance(shadows, torch.Tensor):
            made = cls(shadows, compute, *_origin(function, args, shadows), made_of)
            if function._schema.name == "aten::_to_copy" and isinstance(args[0], Deferred):
                made._uncast = args[0]._uncast
            return made

        def part(place: int) -> Any:
            return compute()[place]

        made_parts = (cls(shadow, partial(part, at), sources=made_of) for at, shadow in enumerate(shadows))
        return type(shadows)(made_parts)


def leaf(info: TensorInfo, shape: tuple[int, ...] | None = None) -> Deferred:
    """A tensor of a checkpoint, as float32.

    Args:
        info: The tensor.
        shape: Its shape in the model where that differs (same elements); None for the checkpoint's.
    """
    shape = info.shape if shape is None else shape

    def read() -> torch.Tensor:
        rows = int(np.prod(info.shape[:-1])) if info.shape else 1
        return torch.from_numpy(read_float32(info, 0, rows)).reshape(shape)

    whole = info if len(shape) == 2 and shape == info.shape else None
    return Deferred(torch.empty(shape, device="meta", dtype=torch.float32), read, whole, sources=(info,))


def materialize(value: Any) -> Any:
    """The values of a deferred tensor; anything else as it is."""
    return value._compute() if isinstance(value, Deferred) else value


def without_casts(tensor: torch.Tensor) -> torch.Tensor:
    """A deferred tensor as it was before its type was changed last; any other tensor as it is."""
    return tensor._uncast if isinstance(tensor, Deferred) else tensor


def sources(value: Any) -> tuple[str, ...]:
    """Names of the checkpoint's tensors that a deferred one is made of; none for anything else."""
    return tuple(info.name for info in value._sources) if isinstance(value, Deferred) else ()


def not_finite(value: Any, name: str) -> str:
    """What a refusal of NaN or infinite weights calls them: the checkpoint's tensor that has some, else `name`.

    Reads the tensors a value is made of; for messages only.
    """
    infos = value._sources if isinstance(value, Deferred) else ()
    for info in infos:
        rows = int(np.prod(info.shape[:-1])) if info.shape else 1
        step = max(1, _READ_WEIGHTS // max(1, info.parameters // max(1, rows)))
        for start in range(0, rows, step):
            if not np.isfinite(read_float32(info, start, min(start + step, rows))).all():
                return info.name
    return infos[0].name if len(infos) == 1 else name


def identity(tensor: torch.Tensor) -> tuple[str, int] | None:
    """What names the values of a matrix, up to transposition: equal for tied weights. None when nothing does."""
    if isinstance(tensor, Deferred):
        return None if tensor._leaf is None else (str(tensor._leaf.file), tensor._leaf.offset)
    return ("memory", tensor.data_ptr()) if tensor.device.type == "cpu" and tensor.data_ptr() else None


def row_reader(matrix: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """Rows `[start, stop)` of a matrix as float32; straight from the file where the checkpoint holds the matrix so.

    Any other matrix is computed once, when the first row is asked for, and kept until the reader is dropped.
    """
    if isinstance(matrix, Deferred) and matrix._leaf is not None and not matrix._transposed:
        info = matrix._leaf
        return lambda start, stop: torch.from_numpy(read_float32(info, start, stop))
    held: list[torch.Tensor] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        if not held:
            held.append(materialize(matrix).detach().to(torch.float32))
        return held[0][start:stop].contiguous()

    return rows


def defer(model: torch.nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Replace the parameters of a model on the meta device by deferred ones, where names and shapes agree.

    Args:
        model: Made under `torch.device("meta")`. Tied parameters (one object in two places) stay tied.
        checkpoint: Where the values are.

    Returns:
        Names of the parameters and buffers that the checkpoint has no such tensor for; the model is unchanged then.
    """
    tensors: Mapping[str, TensorInfo] = checkpoint.tensors
    made: dict[int, Deferred] = {}
    places: list[tuple[dict[str, Any], str, Deferred]] = []
    missing = []
    owners = [(prefix, module) for prefix, module in model.named_modules(remove_duplicate=False)]
    for prefix, module in owners:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            info = tensors.get(f"{prefix}.{name}".lstrip("."))
            if info is not None and info.parameters == parameter.numel():
                made.setdefault(id(parameter), leaf(info, tuple(parameter.shape)))
    for prefix, module in owners:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in made:
                places.append((module._parameters, name, made[id(parameter)]))
            else:
                missing.append(f"{prefix}.{name}".lstrip("."))
    if not missing:
        for owner, name, deferred in places:
            owner[name] = deferred
    return missing


def _shadow_of(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value._shadow
    return value.to("meta") if isinstance(value, torch.Tensor) and value.ndim else value


def _infos(value: Any) -> list[TensorInfo]:
    """Sources of the tensors in nested arguments, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [info for item in value for info in _infos(item)]
    return list(value._sources) if isinstance(value, Deferred) else []


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the tensors in nested arguments."""
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, function) for item in value)
    return function(value)


def _origin(function: Any, args: Any, shadow: torch.Tensor) -> tuple[TensorInfo | None, bool]:
    """The checkpoint tensor a result still is, and whether it lies transposed."""
    source = args[0] if args and isinstance(args[0], Deferred) else None
    if source is None or source._leaf is None or not shadow.dtype.is_floating_point:
        return None, False
    name = function._schema.name + (f".{function._schema.overload_name}" if function._schema.overload_name else "")
    if name in _SAME_ROWS and shadow.dtype == torch.float32:
        return source._leaf, source._transposed
    if name in _TRANSPOSES and shadow.shape == source.shape[::-1]:
        return source._leaf, not source._transposed
    return None, False
