"""Weight-only quantization: MatMulNBits, whose activations stay in floating point.

Half or a quarter of the size at nearly full fidelity, and at best the speed of float32: for devices where memory is
short and time is not. Source: MatMulNBits in onnxruntime's docs/ContribOperators.md (layout of B and scales; symmetric
weights have no zero points), accuracy levels in the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepack.onnx.integers import by_block
from edgepack.onnx.rewrite import MICROSOFT, Graph, Product

# onnxruntime may compute with activations in 8 bits per block: 4 % of the error of per-tensor ones (measured), and the
# only level with fast kernels on both x86-64 and ARM.
_ACCURACY_LEVEL = 4


def quantize_blocks(graph: Graph, products: Sequence[Product], *, bits: int, block: int) -> None:
    """Replace products by MatMulNBits, in place.

    Args:
        graph: The model.
        products: What to quantize.
        bits: 4 or 8.
        block: Weights along the input that share a scale.
    """
    graph.need(MICROSOFT, 1)
    graph.replace({product.node: _nodes(graph, product, bits, block) for product in products})


def _nodes(graph: Graph, product: Product, bits: int, block: int) -> list[Any]:
    from onnx import helper

    packed, scale = by_block(np.ascontiguousarray(graph.matrix(product).T), bits=bits, block=block)
    name = product.weight + ("/transposed" if product.transposed else "")
    inputs = [
        product.input,
        graph.store(f"{name}/int{bits}", packed),
        graph.store(f"{name}/scale", scale.reshape(-1)),
    ]
    output = f"{product.node}/y" if product.bias else product.output
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        name=f"{product.node}/int{bits}",
        domain=MICROSOFT,
        K=product.shape[0],
        N=product.shape[1],
        bits=bits,
        block_size=block,
        accuracy_level=_ACCURACY_LEVEL,
    )
    if not product.bias:
        return [node]
    return [node, helper.make_node("Add", [output, product.bias], [product.output], name=f"{product.node}/bias")]
