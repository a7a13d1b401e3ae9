"""8-bit products whose activations are quantized as they come: DynamicQuantizeLinear and MatMulInteger.

    y = s_x s_w (q_x - z_x) q_w,    q_x = round(x / s_x) + z_x,  one (s_x, z_x) per tensor, one s_w per output

onnxruntime fuses the nodes of a product into one when it loads the model. Three means against what 8 bits lose, apart
from leaving a product in float32:

- Factors (`smoothing.py`): x is divided by a factor per channel and the matrix multiplied by it; in LayerNormalization
  where nothing else reads it, in the values of an attention (`folding.py`), else by one Mul.
- A second product for what the first lost: x - s_x (q_x - z_x) is quantized to 8 bits again and multiplied by the same
  integers. Activations then have 16 bits, weights still 8; the file does not grow, and the time is that of two 8-bit
  products.
- Weights that can't saturate (`integers.py`).

Source: onnx operators DynamicQuantizeLinear 11, MatMulInteger 10, DequantizeLinear 10; the subgraph has the form of
onnxruntime's quantize_dynamic (quantization/operators/matmul.py), which its fusions expect.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from edgepack.onnx.integers import Floats, by_output
from edgepack.onnx.rewrite import Graph, Product
from edgepack.onnx.units import Unit

_FLOAT = 1  # TensorProto.FLOAT


def quantize_products(
    graph: Graph,
    found: Sequence[Unit],
    *,
    factors: Mapping[str, Floats],
    folded: Collection[str] = (),
    twice: Collection[str] = (),
    pair_safe: bool,
) -> None:
    """Replace products by 8-bit ones, in place.

    Args:
        graph: The model.
        found: What to quantize.
        factors: Unit name -> factor per input channel, [inputs]; a unit without stays as it is.
        folded: Names of units whose activations are divided by their factors already (`folding.py`).
        twice: Names of units that get the second product.
        pair_safe: Weights that saturate no 16-bit sum (x86-64 without VNNI).
    """
    replacements: dict[str, list[Any]] = {}
    for unit in found:
        factor = factors.get(unit.name)
        integers = {product.weight: _store_weight(graph, product, factor, pair_safe) for product in unit.weights}
        for value in unit.inputs:
            readers = [product for product in unit.products if product.input == value]
            divisor = None if unit.name in folded else factor
            nodes, parts = _quantize_input(graph, value, divisor, readers, double=unit.name in twice)
            for number, product in enumerate(readers):
                before = nodes if number == 0 else []
                replacements[product.node] = before + _product(graph, product, parts, integers[product.weight])
    graph.replace(replacements)


def matrix_name(product: Product, *, smoothed: bool) -> str:
    """What a product's matrix is called when it was turned into [inputs, outputs] and multiplied by factors."""
    return product.weight + ("/transposed" if product.transposed else "") + ("/smoothed" if smoothed else "")


def smooth(graph: Graph, value: str, factor: Floats, readers: Sequence[Product]) -> tuple[str, list[Any]]:
    """Divide an activation by a factor per channel, for some of its readers.

    Returns:
        Name of the divided activation, and the nodes that make it: none if LayerNormalization now does it.
    """
    from onnx import helper

    maker = next((node for node in graph.nodes if value in node.output), None)
    alone = len(graph.readers(value)) == len(readers) and not graph.read_outside(value)
    if maker is not None and maker.op_type == "LayerNormalization" and alone:
        for place in range(1, len(maker.input)):
            if maker.input[place]:
                name = f"{value}/smooth/{('weight', 'bias')[place - 1]}"
                maker.input[place] = graph.store(name, graph.array(maker.input[place]) / factor)
        return value, []
    divisor = graph.store(f"{value}/smooth", (np.float32(1) / factor).astype(np.float32))
    smoothed = f"{value}/smoothed"
    return smoothed, [helper.make_node("Mul", [value, divisor], [smoothed], name=smoothed)]


def _store_weight(graph: Graph, product: Product, factor: Floats | None, pair_safe: bool) -> tuple[str, str, str]:
    """Integers, scales and zero points of a matrix; their names."""
    name = matrix_name(product, smoothed=factor is not None)
    names = f"{name}/int8", f"{name}/int8/scale", f"zero_points/{product.shape[1]}"  # onnxruntime's fusion wants zeros
    if not graph.recall(*names):
        weight = graph.matrix(product)
        integers, scale = by_output(weight if factor is None else weight * factor[:, None], pair_safe=pair_safe)
        for stored, values in zip(names, (integers, scale, np.zeros(len(scale), np.int8)), strict=True):
            graph.store(stored, np.asarray(values))
    return names


def _quantize_input(
    graph: Graph, value: str, factor: Floats | None, readers: Sequence[Product], *, double: bool
) -> tuple[list[Any], list[str]]:
    """Nodes that quantize an activation, and the prefixes of the values they make."""
    from onnx import helper

    nodes: list[Any] = []
    source = value
    if factor is not None:
        source, nodes = smooth(graph, value, factor, readers)
    parts = [f"{value}/high", f"{value}/low"] if double else [f"{value}/high"]
    for place, part in enumerate(parts):
        if place:
            back, lost = f"{value}/back", f"{value}/lost"
            names = [f"{parts[0]}/{what}" for what in ("int8", "scale", "zero")]
            nodes.append(helper.make_node("DequantizeLinear", names, [back], name=back))
            nodes.append(helper.make_node("Sub", [source, back], [lost], name=lost))
            source = lost
        outputs = [f"{part}/{what}" for what in ("int8", "scale", "zero")]
        nodes.append(helper.make_node("DynamicQuantizeLinear", [source], outputs, name=part))
    return nodes, parts


def _product(graph: Graph, product: Product, parts: Sequence[str], weight: tuple[str, str, str]) -> list[Any]:
    """Nodes that multiply, in the order onnxruntime's fusions look for them."""
    from onnx import helper

    integers, scale, zeros = weight
    bias = product.bias
    nodes, results = [], []
    for part in parts:
        stem = f"{product.node}/{part.rpartition('/')[2]}"
        last = f"{stem}/y" if bias or len(parts) > 1 else product.output
        steps = (
            ("MatMulInteger", [f"{part}/int8", integers, f"{part}/zero", zeros], f"{stem}/sum"),
            ("Cast", [f"{stem}/sum"], f"{stem}/float"),
            ("Mul", [f"{part}/scale", scale], f"{stem}/scale"),
            ("Mul", [f"{stem}/float", f"{stem}/scale"], last),
        )
        for operator, inputs, output in steps:
            options: dict[str, Any] = {"to": _FLOAT} if operator == "Cast" else {}
            name = f"{stem}/{operator}" + ("/scale" if output == f"{stem}/scale" else "")
            nodes.append(helper.make_node(operator, inputs, [output], name=name, **options))
        results.append(last)
    if len(results) > 1:
        both = f"{product.node}/both" if bias else product.output
        nodes.append(helper.make_node("Add", results, [both], name=f"{product.node}/Add"))
        results = [both]
    if bias:
        nodes.append(helper.make_node("Add", [results[0], bias], [product.output], name=f"{product.node}/bias"))
    return nodes
