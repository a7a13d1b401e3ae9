"""What of a graph can be given more precision on its own: units of products, embeddings, convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepack.onnx.embeddings import large_tables
from edgepack.onnx.recipes import Recipe
from edgepack.onnx.rewrite import Graph
from edgepack.onnx.units import units


@dataclass(frozen=True)
class Part:
    """Nodes that are improved together.

    Args:
        nodes: Their names.
        work: Multiplications per token (of a convolution: per place); 0 for a lookup.
        parameters: Weights.
    """

    nodes: tuple[str, ...]
    work: int
    parameters: int

    def cost(self, what: str) -> int:
        """What improving it costs: time for a second product, bytes otherwise."""
        return max(1, self.work if what == "finer" and self.work else self.parameters)


def parts(graph: Graph, row: Recipe) -> list[Part]:
    """All parts that a recipe quantizes, in the order of the graph; embeddings last."""
    found = [Part(unit.nodes, unit.work, unit.parameters) for unit in units(graph.products())]
    if row.method == "static":
        for node in graph.nodes:
            if node.op_type == "Conv" and node.input[1] in graph.stored:
                size = int(np.prod(graph.stored[node.input[1]].dims))
                found.append(Part((node.name,), size, size))
    if not row.fixed_shapes:
        found += [Part((table.node,), 0, table.shape[0] * table.shape[1]) for table in large_tables(graph)]
    return found
