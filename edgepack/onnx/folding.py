"""Put the factors of an attention's output projection into its values: a division that costs nothing.

    (P (x V)) / f = P (x (V / f))

The channels of a context are those of the values it was averaged from; heads are only cut out of them and put together
again. Dividing the columns of the matrix that makes the values (and their bias) divides the context, and the Mul that
smoothing would need goes: one node less a layer, 2-4 % of the time of a small encoder. Exact but for float32 rounding.

Works on the form that transformers exports: product, bias, Reshape, Transpose, MatMul with the weights of attention,
Transpose, Reshape. Whatever has another form keeps its Mul.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.onnx.integers import Floats
from edgepack.onnx.rewrite import Graph
from edgepack.onnx.units import Unit

_BY_HEAD = [0, 2, 1, 3]  # [batch, tokens, heads, width] to [batch, heads, tokens, width], and back


def fold_into_values(graph: Graph, found: Sequence[Unit], factors: Mapping[str, Floats]) -> frozenset[str]:
    """Divide values instead of contexts, in place, where that is possible.

    Args:
        graph: The float32 model, with the shapes of its values.
        found: Units.
        factors: Unit name -> factor per input channel.

    Returns:
        Names of the units whose activations are divided now; their matrices are still to be multiplied. Products were
        changed: find the units again.
    """
    makers = {output: node for node in graph.nodes for output in node.output}
    folded = []
    for unit in found:
        if unit.name in factors:
            chains = [_values(graph, makers, unit, value) for value in unit.inputs]
            if all(chain is not None for chain in chains):
                for chain in chains:
                    _divide(graph, chain, factors[unit.name], unit.name)
                folded.append(unit.name)
    return frozenset(folded)


def _values(graph: Graph, makers: Mapping[str, Any], unit: Unit, context: str) -> tuple[Any, Any] | None:
    """The product that makes the values of a context, and the Add of its bias (or None)."""

    def maker(value: str, operator: str, readers: int = 1) -> Any:
        node = makers.get(value)
        alone = len(graph.readers(value)) == readers and not graph.read_outside(value)
        return node if node is not None and node.op_type == operator and not node.domain and alone else None

    merged = maker(context, "Reshape", sum(product.input == context for product in unit.products))
    back = maker(merged.input[0], "Transpose") if merged is not None else None
    product = maker(back.input[0], "MatMul") if back is not None else None
    heads = maker(product.input[1], "Transpose") if product is not None else None
    split = maker(heads.input[0], "Reshape") if heads is not None else None
    if split is None or _permutation(back) != _BY_HEAD or _permutation(heads) != _BY_HEAD:
        return None
    shape = _shape(graph, split.output[0])
    if len(shape) != 4 or shape[2] * shape[3] != unit.width:
        return None
    source, bias = split.input[0], maker(split.input[0], "Add")
    if bias is not None:
        stored = [place for place, name in enumerate(bias.input) if name in graph.stored]
        if len(stored) != 1 or list(graph.stored[bias.input[stored[0]]].dims) != [unit.width]:
            return None
        source = bias.input[1 - stored[0]]
    made = maker(source, "MatMul")
    weight = graph.stored.get(made.input[1]) if made is not None else None
    if weight is None or len(weight.dims) != 2 or weight.dims[1] != unit.width or weight.data_type != 1:
        return None
    return made, bias


def _divide(graph: Graph, chain: tuple[Any, Any] | None, factor: Floats, unit: str) -> None:
    """The columns of a matrix and its bias. Layers that share both matrices share the divided one."""
    if chain is None:
        return
    product, bias = chain
    product.input[1] = graph.store(f"{product.input[1]}/for/{unit}", graph.array(product.input[1]) / factor[None, :])
    if bias is not None:
        place = next(place for place, name in enumerate(bias.input) if name in graph.stored)
        bias.input[place] = graph.store(f"{bias.input[place]}/for/{unit}", graph.array(bias.input[place]) / factor)


def _permutation(node: Any) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])


def _shape(graph: Graph, value: str) -> list[int]:
    """Lengths of the axes, 0 for those that are free; empty if nothing is known."""
    for known in graph.model.graph.value_info:
        if known.name == value:
            return [int(axis.dim_value) for axis in known.type.tensor_type.shape.dim]
    return []
