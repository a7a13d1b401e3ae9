"""Make an exported graph one that onnxruntime runs fast, without changing what it computes.

Two parts. `simplify` removes what tracing left behind, with standard operators only, for every runtime; it is always
done. `fuse_attention` turns the attention of BERT- and ViT-like models, some twenty nodes a layer, into one
`com.microsoft::Attention`: for onnxruntime's CPU provider only, and not for static quantization, which knows no such
operator. The rest is left to onnxruntime, which fuses bias and Gelu, Add and LayerNormalization, scale and MatMul when
it loads the model, by the shapes that the graph carries; what was measured is in docs/encoders.md.

onnxruntime's own offline optimiser (`onnxruntime.transformers.optimizer`) finds none of these attentions: its patterns
are of an older exporter. Source of the operator: onnxruntime docs/ContribOperators.md, `com.microsoft.Attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_DOMAIN = "com.microsoft"
_MASK = "attention_mask"
_LOWEST = float(np.finfo(np.float32).min)
_BY_HEAD, _BY_KEY = [0, 2, 1, 3], [0, 2, 3, 1]  # [batch, sequence, head, width] -> per head; the same, transposed


@dataclass(frozen=True)
class _Attention:
    """One attention found in a graph: its values and constants."""

    source: Any
    weights: tuple[Any, Any, Any]
    biases: tuple[Any, Any, Any]
    heads: int
    scale: float
    masked: bool
    bias: Any
    result: Any
    name: str


def simplify(model: Any) -> None:
    """Remove nodes that have no effect, in place.

    Args:
        model: An `onnx_ir.Model`.
    """
    for node in list(model.graph):
        if node.op_type == "Add":
            _remove_empty_mask(model.graph, node)
    _remove_unused(model)


def fuse_attention(model: Any) -> int:
    """Replace every attention whose three projections read the same value by one operator, in place.

    Args:
        model: An `onnx_ir.Model` with the shapes of its values, as exported.

    Returns:
        How many were replaced. An attention of another form (rotary positions, relative positions computed from keys,
        grouped heads) stays as it is.
    """
    found = [match for node in model.graph if node.op_type == "Softmax" and (match := _match(node)) is not None]
    mask = _integer_mask(model.graph) if any(attention.masked for attention in found) else None
    for attention in found:
        _replace(model.graph, attention, mask if attention.masked else None)
    if found:
        model.opset_imports[_DOMAIN] = 1
        _remove_unused(model)
    return len(found)


def _remove_unused(model: Any) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def _remove_empty_mask(graph: Any, node: Any) -> None:
    """An image has no padding: transformers adds `where(all true, 0, lowest)`, of the scores' own shape, to them."""
    from onnx_ir import convenience

    for scores, mask in (node.inputs, reversed(node.inputs)):
        where = _producer(mask, "Where")
        if where is None or not _is_all(where.inputs[1], 0.0) or scores.shape is None or mask.shape is None:
            continue
        condition = where.inputs[0]
        expand = _producer(condition, "Expand")
        smaller = len(mask.shape) == len(scores.shape) and all(
            axis in (1, whole) for axis, whole in zip(mask.shape, scores.shape, strict=True)
        )
        if smaller and _is_all(expand.inputs[0] if expand is not None else condition, True):
            convenience.replace_all_uses_with(node.outputs[0], scores)
            return


def _match(softmax: Any) -> _Attention | None:
    """The attention around a Softmax, if it is of the form that the operator computes."""
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 3):
        return None
    scores, extras = softmax.inputs[0], []
    while (add := _producer(scores, "Add")) is not None:
        inner = [value for value in add.inputs if _reaches_scores(value)]
        if len(inner) != 1:
            return None
        extras.append(next(value for value in add.inputs if value is not inner[0]))
        scores = inner[0]
    masks = [value for value in extras if _is_key_mask(value)]
    others = [value for value in extras if value not in masks]
    scaled = _scale(scores)
    context = _only_user(softmax.outputs[0], "MatMul")
    if len(masks) > 1 or len(others) > 1 or scaled is None or context is None:
        return None
    product, scale = scaled
    sides = (
        _projection(product.inputs[0], _BY_HEAD),
        _projection(product.inputs[1], _BY_KEY),
        _projection(context.inputs[1], _BY_HEAD),
    )
    merged = _only_user(context.outputs[0], "Transpose")
    last = _only_user(merged.outputs[0], "Reshape") if merged is not None else None
    heads = product.inputs[0].shape[1] if product.inputs[0].shape is not None else None
    if last is None or None in sides or not isinstance(heads, int) or _permutation(merged) != _BY_HEAD:
        return None
    sources, weights, biases = zip(*[side for side in sides if side is not None], strict=True)
    if any(source is not sources[0] for source in sources) or len({weight.shape for weight in weights}) != 1:
        return None
    name = last.name.rpartition("/")[0] or "attention"
    return _Attention(
        sources[0], weights, biases, heads, scale, bool(masks), next(iter(others), None), last.outputs[0], name
    )


def _reaches_scores(value: Any) -> bool:
    """Whether a value is the scaled product of queries and keys, perhaps with something added."""
    node = value.producer()
    if node is not None and node.op_type == "Add":
        return any(_reaches_scores(inner) for inner in node.inputs)
    return _scale(value) is not None


def _scale(value: Any) -> tuple[Any, float] | None:
    """The MatMul of the scores and the factor on it."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "MatMul" and all(_producer(side, "Transpose") is not None for side in node.inputs):
        return node, 1.0
    product = _producer(node.inputs[0], "MatMul") if node.op_type in ("Mul", "Div") else None
    factor = _constant(node.inputs[1]) if product is not None else None
    if factor is None or factor.size != 1:
        return None
    number = float(factor.reshape(()))
    return product, number if node.op_type == "Mul" else 1.0 / number


def _projection(value: Any, permutation: list[int]) -> tuple[Any, Any, Any] | None:
    """(input, weight, bias) of `Transpose(Reshape(input @ weight + bias))`."""
    transpose = _producer(value, "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if reshape is None or _permutation(transpose) != permutation:
        return None
    linear, bias = reshape.inputs[0], None
    if (add := _producer(linear, "Add")) is not None:
        pairs = ((add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0]))
        linear, bias = next((pair for pair in pairs if _constant(pair[1]) is not None), (linear, None))
    product = _producer(linear, "MatMul")
    weight = _constant(product.inputs[1]) if product is not None else None
    if product is None or weight is None or weight.ndim != 2:
        return None
    offset = _constant(bias) if bias is not None else np.zeros(weight.shape[1], np.float32)
    return (product.inputs[0], weight, offset) if offset.shape == weight.shape[1:] else None


def _is_key_mask(value: Any) -> bool:
    """Whether a value is the mask that `encoders.traceable` makes: the lowest number where attention_mask is 0."""
    second = []  # inputs beside the mask, from the last node to the first
    for op_type in ("Mul", "Cast", "Unsqueeze", "Equal"):
        if (node := _producer(value, op_type)) is None:
            return False
        value = node.inputs[0]
        second.append(node.inputs[1] if len(node.inputs) > 1 else None)
    lowest, _, axes, zero = second
    given = value.name == _MASK and value.is_graph_input()
    return given and _is_all(lowest, _LOWEST) and _is_all(zero, 0) and np.array_equal(_constant(axes), [1, 2])


def _integer_mask(graph: Any) -> Any:
    """attention_mask as int32, which is what the operator takes."""
    import onnx_ir

    source = next(value for value in graph.inputs if value.name == _MASK)
    cast = onnx_ir.node("Cast", [source], attributes={"to": onnx_ir.DataType.INT32}, name=f"{_MASK}/Cast")
    _declare(cast.outputs[0], f"{_MASK}_int32", source.shape, onnx_ir.DataType.INT32)
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def _replace(graph: Any, attention: _Attention, mask: Any) -> None:
    import onnx_ir

    # The names of the weights that go, "<layer>.query.weight" and so on, give "<layer>.qkv.weight". Layers that share
    # their weights (ALBERT) share these, and need names of their own for what they compute.
    weight = _initializer(graph, f"{attention.name}.qkv.weight", np.concatenate(attention.weights, axis=1))
    bias = _initializer(graph, f"{attention.name}.qkv.bias", np.concatenate(attention.biases))
    name = _unused(f"{attention.name}/Attention", {node.name for node in graph})
    node = onnx_ir.node(
        "Attention",
        [attention.source, weight, bias, mask, None, attention.bias],
        attributes={"num_heads": attention.heads, "scale": attention.scale, "mask_filter_value": _LOWEST},
        domain=_DOMAIN,
        name=name,
    )
    result = attention.result
    _declare(node.outputs[0], name, result.shape, result.dtype)
    graph.insert_before(result.producer(), node)
    onnx_ir.convenience.replace_all_uses_with(result, node.outputs[0])


def _initializer(graph: Any, name: str, array: Any) -> Any:
    """A new initializer, or the one of this name that holds the same numbers."""
    import onnx_ir

    for known, value in graph.initializers.items():
        if known.startswith(name) and np.array_equal(_constant(value), array):
            return value
    name = _unused(name, graph.initializers)
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=name))
    _declare(value, name, onnx_ir.Shape(array.shape), onnx_ir.DataType.FLOAT)
    graph.register_initializer(value)
    return value


def _unused(name: str, taken: Container[str]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(wanted for wanted in itertools.chain([name], numbered) if wanted not in taken)


def _declare(value: Any, name: str, shape: Any, dtype: Any) -> None:
    value.name, value.shape, value.dtype = name, shape, dtype


def _producer(value: Any, op_type: str) -> Any:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _only_user(value: Any, op_type: str) -> Any:
    users = value.uses()
    return users[0].node if len(users) == 1 and users[0].node.op_type == op_type else None


def _permutation(node: Any) -> list[int]:
    attributes: Mapping[str, Any] = node.attributes
    return list(attributes["perm"].as_ints()) if "perm" in attributes else []


def _constant(value: Any) -> Any:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _is_all(value: Any, number: Any) -> bool:
    array = _constant(value)
    return array is not None and array.size > 0 and bool((array == number).all())
