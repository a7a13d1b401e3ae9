"""A float32 ONNX graph in memory: find what can be quantized, replace nodes, write it back the same way every time.

Works on the protobuf of the main graph; subgraphs (If, Loop) keep their weights. Noted shapes of stored tensors and of
values that are gone are dropped: onnxruntime's quantizers trust them and fail on a matrix that was transposed since.
Those of values that stay are kept: without, onnxruntime fuses less (no addition with its LayerNormalization).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, UsageError
from edgepack.onnx.export import DATA, MODEL, SINGLE_FILE_BYTES
from edgepack.onnx.graph import Port
from edgepack.onnx.strip import PRODUCER

_SMALL = 1024  # bytes; smaller tensors stay in model.onnx, as onnx.save_model does by default
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm whose right side is a stored matrix.

    Args:
        node: Name of the node.
        operator: `MatMul` or `Gemm`.
        input: The activation, [..., inputs].
        weight: Name of the stored matrix.
        transposed: Stored as [outputs, inputs] (Gemm transB).
        bias: Third input of a Gemm; empty: none.
        output: What it makes.
        shape: (inputs, outputs).
    """

    node: str
    operator: str
    input: str
    weight: str
    transposed: bool
    bias: str
    output: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Table:
    """A Gather of rows from a stored matrix: an embedding.

    Args:
        node: Name of the node.
        weight: The matrix, [rows, width].
        indices: Which rows.
        output: What it makes.
        shape: (rows, width).
    """

    node: str
    weight: str
    indices: str
    output: str
    shape: tuple[int, int]


@dataclass
class Graph:
    """A model that is being rewritten.

    Args:
        model: ModelProto with all weights in memory.
        inputs: What it reads.
        stored: Initializers by name; `settle` writes them back into the model.
        made: Tensors that were made for this graph or another copy of it, by name: a name says all that shaped them.
    """

    model: Any
    inputs: tuple[Port, ...]
    stored: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stored = self.stored or {tensor.name: tensor for tensor in self.model.graph.initializer}
        names = [node.name for node in self.model.graph.node if node.name]
        if len(names) != len(set(names)):
            name = next(name for name in names if names.count(name) > 1)
            raise InputRefused(f"two nodes are named {name!r}; expected names to tell nodes apart")

    @property
    def nodes(self) -> Any:
        """The nodes, in order."""
        return self.model.graph.node

    def array(self, name: str) -> npt.NDArray[Any]:
        """A stored tensor.

        Raises:
            InputRefused: It holds NaN or infinity, which no integer stands for.
        """
        from onnx import numpy_helper

        values: npt.NDArray[Any] = numpy_helper.to_array(self.stored[name])
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputRefused(f"tensor {name}: NaN or infinite values; expected finite weights to quantize")
        return values

    def copy(self) -> Graph:
        """The same graph to rewrite in another way; stored tensors are shared, not copied."""
        import onnx

        model = onnx.ModelProto()
        kept = list(self.model.graph.initializer)
        del self.model.graph.initializer[:]
        model.CopyFrom(self.model)
        self.model.graph.initializer.extend(kept)
        return Graph(model, self.inputs, dict(self.stored), self.made)

    def recall(self, *names: str) -> bool:
        """Put tensors that were made before into this graph; False if one was not."""
        if not all(name in self.made for name in names):
            return False
        self.stored |= {name: self.made[name] for name in names}
        return True

    def store(self, name: str, values: npt.NDArray[Any]) -> str:
        """Add a tensor, once per name; the name."""
        from onnx import numpy_helper

        if not self.recall(name):
            self.made[name] = self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def store_raw(self, name: str, type: int, shape: Sequence[int], content: bytes) -> str:
        """Add a tensor of an element type that numpy lacks, once per name; the name."""
        from onnx import helper

        if not self.recall(name):
            self.made[name] = self.stored[name] = helper.make_tensor(name, type, shape, content, raw=True)
        return name

    def readers(self, value: str) -> list[Any]:
        """Nodes that read a value, those in subgraphs excepted."""
        return [node for node in self.nodes if value in node.input]

    def read_outside(self, value: str) -> bool:
        """Whether something other than a node of the main graph reads a value: an output, or a subgraph."""
        if any(output.name == value for output in self.model.graph.output):
            return True
        return any(value in node.input for graph in _subgraphs(self.model.graph) for node in graph.node)

    def products(self) -> list[Product]:
        """All products with stored float32 matrices, in order."""
        return [found for node in self.nodes if (found := self._product(node)) is not None]

    def tables(self) -> list[Table]:
        """All embeddings from stored float32 matrices, in order."""
        found = []
        for node in self.nodes:
            if node.op_type == "Gather" and not node.domain and _attribute(node, "axis", 0) == 0:
                shape = self._matrix(node.input[0])
                if shape is not None:
                    found.append(Table(node.name, node.input[0], node.input[1], node.output[0], shape))
        return found

    def _product(self, node: Any) -> Product | None:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            return None
        shape = self._matrix(node.input[1])
        if shape is None or node.input[0] in self.stored:
            return None
        if node.op_type == "MatMul":
            return Product(node.name, "MatMul", node.input[0], node.input[1], False, "", node.output[0], shape)
        plain = _attribute(node, "transA", 0) == 0 and _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0)
        if not plain or _attribute(node, "alpha", 1.0) != 1.0:
            return None
        transposed = bool(_attribute(node, "transB", 0))
        bias = node.input[2] if len(node.input) > 2 else ""
        shape = shape[::-1] if transposed else shape
        return Product(node.name, "Gemm", node.input[0], node.input[1], transposed, bias, node.output[0], shape)

    def _matrix(self, name: str) -> tuple[int, int] | None:
        tensor = self.stored.get(name)
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != 1:  # TensorProto.FLOAT
            return None
        return int(tensor.dims[0]), int(tensor.dims[1])

    def matrix(self, product: Product) -> npt.NDArray[np.float32]:
        """Its weights as [inputs, outputs]."""
        values: npt.NDArray[np.float32] = self.array(product.weight)
        return values.T if product.transposed else values

    def replace(self, replacements: Mapping[str, Sequence[Any]]) -> None:
        """Put new nodes in the places of named ones."""
        nodes = [new for node in self.nodes for new in replacements.get(node.name, [node])]
        del self.nodes[:]
        self.nodes.extend(nodes)

    def need(self, domain: str, version: int) -> None:
        """Import an operator set, or a newer version of one."""
        from onnx import helper

        for entry in self.model.opset_import:
            if entry.domain == domain:
                entry.version = max(entry.version, version)
                return
        self.model.opset_import.append(helper.make_opsetid(domain, version))

    def settle(self) -> None:
        """Make the model whole again: stored tensors in it, in the order of their first use, and unused ones gone."""
        graph = self.model.graph
        used = dict.fromkeys(name for node in graph.node for name in node.input)
        used |= dict.fromkeys(name for inner in _subgraphs(graph) for node in inner.node for name in node.input)
        used |= dict.fromkeys(output.name for output in graph.output)
        self.stored = {name: self.stored[name] for name in used if name in self.stored}
        made = {name for node in graph.node for name in node.output}
        shapes = [value for value in graph.value_info if value.name in made]
        del graph.value_info[:]
        graph.value_info.extend(shapes)
        del graph.initializer[:]
        graph.initializer.extend(self.stored.values())

    def write(self, folder: Path) -> list[str]:
        """Write model.onnx, with model.onnx.data beside it for large models.

        Returns:
            Names of the files.
        """
        import onnx

        self.settle()
        self.model.producer_name, self.model.producer_version = PRODUCER, ""
        del self.model.metadata_props[:]
        for node in self.nodes:
            del node.metadata_props[:]
        if sum(_nbytes(tensor) for tensor in self.stored.values()) <= SINGLE_FILE_BYTES:
            onnx.save_model(self.model, folder / MODEL)
            return [MODEL]
        onnx.save_model(self.model, folder / MODEL, save_as_external_data=True, location=DATA, size_threshold=_SMALL)
        return [MODEL, DATA]


def read_graph(folder: Path) -> Graph:
    """Load the model of a folder with its weights.

    Raises:
        InputRefused: There is none, or `check.py` refuses it.
    """
    import onnx

    from edgepack.onnx.check import check_model

    path = folder / MODEL
    facts = check_model(path)
    return Graph(onnx.load(path), facts.inputs)


def known_nodes(graph: Graph, names: Sequence[str], what: str) -> frozenset[str]:
    """Names of nodes that a user or the search gave.

    Raises:
        UsageError: One is no node of the graph, or none that would be quantized.
    """
    known = {product.node for product in graph.products()} | {table.node for table in graph.tables()}
    known |= {node.name for node in graph.nodes if node.op_type in ("Conv", "ConvTranspose")}
    for name in names:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"{what}: {name!r} is no node with weights",
                hint=f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(known)[:3])}, ...",
            )
    return frozenset(names)


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _subgraphs(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield inner
                yield from _subgraphs(inner)


def _nbytes(tensor: Any) -> int:
    return len(tensor.raw_data) or 8 * math.prod(tensor.dims)
