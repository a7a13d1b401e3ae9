"""Products that must be treated alike: they read the same activation, or use the same stored matrix.

Query, key and value read one activation: it is smoothed and quantized once for all three. Layers that share weights
(ALBERT) share the factors those weights were multiplied by. A unit is what the search keeps, refines or quantizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgepack.onnx.rewrite import Product


@dataclass(frozen=True)
class Unit:
    """Products that share activations or weights.

    Args:
        products: In the order of the graph.
    """

    products: tuple[Product, ...]

    @property
    def name(self) -> str:
        """The first node's, which is what users see."""
        return self.products[0].node

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of its nodes."""
        return tuple(product.node for product in self.products)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The activations, without repetition."""
        return tuple(dict.fromkeys(product.input for product in self.products))

    @property
    def weights(self) -> tuple[Product, ...]:
        """One product for each stored matrix."""
        return tuple({product.weight: product for product in reversed(self.products)}.values())[::-1]

    @property
    def width(self) -> int:
        """Channels of the activation."""
        return self.products[0].shape[0]

    @property
    def work(self) -> int:
        """Multiplications per token."""
        return sum(inputs * outputs for inputs, outputs in (product.shape for product in self.products))

    @property
    def parameters(self) -> int:
        """Weights, each stored matrix once."""
        return sum(inputs * outputs for inputs, outputs in (product.shape for product in self.weights))


def units(products: Sequence[Product], left_out: Iterable[str] = ()) -> list[Unit]:
    """Group products.

    Args:
        products: Of one graph, in order.
        left_out: Names of nodes that stay as they are. One of several that share a matrix keeps its float32 copy.
    """
    out = frozenset(left_out)
    rest = [product for product in products if product.node not in out]
    owner: dict[str, int] = {}
    parent = list(range(len(rest)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for index, product in enumerate(rest):
        # A Gemm that reads the matrix the other way round needs integers of its own.
        for key in (f"input {product.input}", f"weight {product.transposed} {product.weight}"):
            other = root(owner.setdefault(key, index))
            first, second = sorted((other, root(index)))
            parent[second] = first
    members: dict[int, list[Product]] = {}
    for index, product in enumerate(rest):
        members.setdefault(root(index), []).append(product)
    return [Unit(tuple(found)) for found in members.values()]
