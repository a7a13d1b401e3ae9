"""Weight-only quantization: MatMulNBits, whose activations stay in floating point.

Half or a quarter of the size at nearly full fidelity, and at best the speed of float32: for devices where memory is
short and time is not. Source: MatMulNBits in onnxruntime's docs/ContribOperators.md (layout of B and scales; symmetric
weights have no zero points), accuracy levels in the same place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from edgepack.onnx.dynamic import matrix_name
from edgepack.onnx.integers import by_block
from edgepack.onnx.rewrite import MICROSOFT, Graph, Product

# onnxruntime may compute with activations in 8 bits per block: 4 % of the error of per-tensor ones (measured), and the
# only level with fast kernels on both x86-64 and ARM.
_ACCURACY_LEVEL = 4


def quantize_blocks(
    graph: Graph, products: Sequence[Product], *, bits: int, block: int, finer: Collection[str] = ()
) -> None:
    """Replace products by MatMulNBits, in place.

    Args:
        graph: The model.
        products: What to quantize.
        bits: 4 or 8.
        block: Weights along the input that share a scale.
        finer: Nodes that get 8 bits.
    """
    graph.need(MICROSOFT, 1)
    graph.replace(
        {product.node: _nodes(graph, product, 8 if product.node in finer else bits, block) for product in products}
    )


def _nodes(graph: Graph, product: Product, bits: int, block: int) -> list[Any]:
    from onnx import helper

    name = f"{matrix_name(product, smoothed=False)}/blocks{block}/int{bits}"
    names = name, f"{name}/scale"
    if not graph.recall(*names):
        packed, scale = by_block(np.ascontiguousarray(graph.matrix(product).T), bits=bits, block=block)
        graph.store(names[0], packed)
        graph.store(names[1], scale.reshape(-1))
    output = f"{product.node}/y" if product.bias else product.output
    node = helper.make_node(
        "MatMulNBits",
        [product.input, *names],
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
