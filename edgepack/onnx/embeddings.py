"""Embedding tables as integers: half of a small encoder is its vocabulary.

8 bits: a scale per row. The rows asked for are gathered as integers, their scales with them, and multiplied; only
standard operators, and the table is never expanded. 4 bits: blocks along the row, onnxruntime's GatherBlockQuantized.
A table that something else reads as well (the tied decoder of a masked language model) keeps its float32 copy for that
reader. Source: GatherBlockQuantized in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from edgepack.onnx.integers import by_block, by_row
from edgepack.onnx.rewrite import MICROSOFT, Graph, Table

_SMALLEST = 16_384  # weights; below, the scales and nodes cost more than they save (token types have two rows)
_FLOAT, _INT4 = 1, 22  # TensorProto.DataType
_SIGN = 0x88  # turns both halves of a byte from "8 means zero" into two's complement


def large_tables(graph: Graph) -> list[Table]:
    """Embeddings worth quantizing."""
    return [table for table in graph.tables() if np.prod(table.shape) >= _SMALLEST]


def quantize_tables(
    graph: Graph, *, bits: int, block: int, keep: Collection[str] = (), finer: Collection[str] = ()
) -> list[str]:
    """Replace embedding lookups, in place.

    Args:
        graph: The model.
        bits: 8 or 4; rows of odd width get 8.
        block: Weights that share a scale, for 4 bits: a power of two from 16.
        keep: Nodes left as they are.
        finer: Nodes that get 8 bits.

    Returns:
        Names of the nodes that were replaced.
    """
    replacements: dict[str, list[Any]] = {}
    for table in large_tables(graph):
        if table.node not in keep:
            by_bytes = bits == 8 or table.shape[1] % 2 or table.node in finer
            replacements[table.node] = _rows(graph, table) if by_bytes else _blocks(graph, table, block)
    graph.replace(replacements)
    return list(replacements)


def _rows(graph: Graph, table: Table) -> list[Any]:
    from onnx import helper

    names = f"{table.weight}/rows/int8", f"{table.weight}/rows/int8/scale"
    if not graph.recall(*names):
        for name, values in zip(names, by_row(graph.array(table.weight)), strict=True):
            graph.store(name, np.asarray(values))
    stem = table.node
    return [
        helper.make_node("Gather", [names[0], table.indices], [f"{stem}/int8"], name=f"{stem}/int8", axis=0),
        helper.make_node("Gather", [names[1], table.indices], [f"{stem}/scale"], name=f"{stem}/scale", axis=0),
        helper.make_node("Cast", [f"{stem}/int8"], [f"{stem}/float"], name=f"{stem}/Cast", to=_FLOAT),
        helper.make_node("Mul", [f"{stem}/float", f"{stem}/scale"], [table.output], name=f"{stem}/Mul"),
    ]


def _blocks(graph: Graph, table: Table, block: int) -> list[Any]:
    from onnx import helper

    rows, width = table.shape
    names = f"{table.weight}/rows/int4", f"{table.weight}/rows/int4/scale"
    if not graph.recall(*names):
        packed, scales = by_block(graph.array(table.weight), bits=4, block=block)
        # Signed, because the operator's zero is then 0 without a tensor of zero points. Rows are cut from whole blocks
        # to their width, which is even: INT4 is packed without gaps.
        signed = packed.reshape(rows, -1)[:, : width // 2] ^ np.uint8(_SIGN)
        graph.store_raw(names[0], _INT4, (rows, width), signed.tobytes())
        graph.store(names[1], scales)
    graph.need(MICROSOFT, 1)
    return [
        helper.make_node(
            "GatherBlockQuantized",
            [names[0], table.indices, names[1]],
            [table.output],
            name=f"{table.node}/int4",
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=block,
        )
    ]
