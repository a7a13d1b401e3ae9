"""Walk the graphs of an ONNX model and refuse what the format or onnxruntime does not allow.

Graphs, subgraphs (If, Loop, Scan), functions: every value is made before it is read, once; every tensor is where it
says (`stored.py`); every operator comes from a domain and version the runtime has; nothing asks for more than a device
has: depth of subgraphs, nodes after functions are expanded, sizes of constants that a few bytes ask for.

Source: onnx 1.23 `docs/IR.md` (static single assignment, topological order, scopes), `onnx/checker.cc`.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgepack.onnx.operators import Use
from edgepack.onnx.opsets import OPSETS, canonical, check_opsets
from edgepack.onnx.stored import TYPES, StoredTensor, Tensors, numbers, shown
from edgepack.onnx.wire import Message, Reader

MAX_SUBGRAPHS = 8  # graphs inside each other; exporters make two or three
MAX_CALLS = 16  # functions that call each other; torch's exporter makes two or three
MAX_NODES = 200_000  # with functions expanded
MAX_MADE = 1 << 30  # bytes of one constant that a node makes from its shape; a mask of 16,384 x 16,384 float32
MAX_VALUE = 1 << 36  # bytes of one value whose declared shape is fixed: 64 GiB

_FLOAT, _INT, _STRING, _TENSOR, _GRAPH = 1, 2, 3, 4, 5  # AttributeProto.AttributeType
_VALUES: Mapping[int, str] = {
    _FLOAT: "f",
    _INT: "i",
    _STRING: "s",
    _TENSOR: "t",
    _GRAPH: "g",
    6: "floats",
    7: "ints",
    8: "strings",
    9: "tensors",
    10: "graphs",
    11: "sparse_tensor",
    12: "sparse_tensors",
    13: "tp",
    14: "type_protos",
}
_LISTS = {"floats", "ints", "strings", "tensors", "graphs", "sparse_tensors", "type_protos"}
_FROM_SHAPE_INPUT = {"ConstantOfShape": 0, "Expand": 1}  # which input is the shape of what the node makes
_FROM_SHAPE_ATTRIBUTE = {"RandomNormal", "RandomUniform"}


@dataclass(frozen=True)
class Port:
    """An input or output of the model.

    Args:
        name: As the runtime knows it.
        type: Element type of a tensor; `sequence`, `map`, `optional`, `sparse` or `opaque` for others.
        shape: Each dimension a number, a name, or None where nothing is said; None for an unknown rank.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...] | None


@dataclass
class Walk:
    """What was seen on the way through all graphs of a model.

    Args:
        reader: The model file.
        tensors: Where tensors are checked.
        opsets: Operator set versions of the model.
        functions: (domain, name, overload) -> FunctionProto.
    """

    reader: Reader
    tensors: Tensors
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str, str], Message] = field(default_factory=dict)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    uses: dict[Use, str] = field(default_factory=dict)
    initializers: list[StoredTensor] = field(default_factory=list)
    constants: list[StoredTensor] = field(default_factory=list)
    calls: dict[tuple[str, str, str], int] = field(default_factory=dict)
    open_calls: int = 0

    def model(self, graph: Message) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """Check the main graph and all functions; the model's inputs (without initializers) and outputs."""
        if not graph.get("node"):
            raise self.tensors.refuse("the graph has no nodes")
        for key, function in self.functions.items():
            self.function(key, function)
        self._count(self.graph(graph, set(), self.opsets, "graph", 0))
        self.tensors.finish()
        stored = {tensor.name for tensor in self.initializers}
        inputs = [value for value in graph.get("input", ()) if value.get("name") not in stored]
        return tuple(map(self.port, inputs)), tuple(map(self.port, graph.get("output", ())))

    def function(self, key: tuple[str, str, str], function: Message) -> int:
        """Check a function once, before what calls it; the nodes it expands to."""
        if key in self.calls:
            if self.calls[key] < 0:
                raise self.tensors.refuse(f"function {shown(key[1])} calls itself")
            return self.calls[key]
        self.calls[key] = -1
        self.open_calls += 1
        if self.open_calls > MAX_CALLS:
            raise self.tensors.refuse(f"more than {MAX_CALLS} functions that call each other")
        where = f"function {shown(key[1])}"
        opsets = check_opsets(self.tensors, function.get("opset_import", ()), where, self.opsets)
        names = list(function.get("input", ()))
        if len(set(names)) != len(names):
            raise self.tensors.refuse(f"{where}: two inputs of one name")
        known = set(names)
        count = self.nodes(function.get("node", ()), known, known, opsets, where, 0, {})
        self._outputs(function.get("output", ()), known, where)
        for value in function.get("value_info", ()):
            self.port(value)
        self.calls[key] = self._count(count)
        self.open_calls -= 1
        return count

    def _count(self, nodes: int) -> int:
        if nodes > MAX_NODES:
            raise self.tensors.refuse(f"{nodes:,} nodes with functions expanded, at most {MAX_NODES:,} allowed")
        return nodes

    def graph(self, graph: Message, known: set[str], opsets: Mapping[str, int], where: str, depth: int) -> int:
        """Check one graph and those inside it.

        Args:
            graph: GraphProto.
            known: Names of the graphs around it; grows while this graph is walked.
            opsets: Operator set versions in force.
            where: For messages.
            depth: 0 for the model's own graph.

        Returns:
            The nodes in it with functions expanded.
        """
        if depth > MAX_SUBGRAPHS:
            raise self.tensors.refuse(f"{where}: more than {MAX_SUBGRAPHS} graphs inside each other")
        own: set[str] = set()
        shapes: dict[str, StoredTensor] = {}
        for value in graph.get("input", ()):
            name = self.port(value).name
            if not name or name in own or name in known:
                raise self.tensors.refuse(f"{where}: input {shown(name)!r} has no name or one that is taken")
            own.add(name)
        stored: set[str] = set()
        for tensor in graph.get("initializer", ()):
            self._initializer(self.tensors.check(tensor, "initializer"), stored, known, where, shapes)
        for tensor in graph.get("sparse_initializer", ()):
            self._initializer(self.sparse(tensor, "sparse initializer"), stored, known, where, {})
        if depth and stored & own:
            raise self.tensors.refuse(f"{where}: {shown(min(stored & own))} is an input of a subgraph and stored too")
        own |= stored
        known |= own
        count = self.nodes(graph.get("node", ()), known, own, opsets, where, depth, shapes)
        self._outputs([value.get("name", "") for value in graph.get("output", ())], own, where)
        for value in (*graph.get("output", ()), *graph.get("value_info", ())):
            self.port(value)
        known -= own
        return count

    def _initializer(
        self, tensor: StoredTensor, stored: set[str], known: set[str], where: str, shapes: dict[str, StoredTensor]
    ) -> None:
        if not tensor.name or tensor.name in stored or tensor.name in known:
            raise self.tensors.refuse(f"{where}: initializer {shown(tensor.name)!r} has no name or one that is taken")
        stored.add(tensor.name)
        self.initializers.append(tensor)
        shapes[tensor.name] = tensor

    def _outputs(self, names: Sequence[str], known: set[str], where: str) -> None:
        if not names:
            raise self.tensors.refuse(f"{where}: has no outputs")
        for name in names:
            if not name or name not in known:
                raise self.tensors.refuse(f"{where}: nothing makes its output {shown(name)!r}")
        if len(set(names)) != len(names):
            raise self.tensors.refuse(f"{where}: two outputs of one name")

    def nodes(
        self,
        nodes: Sequence[Message],
        known: set[str],
        own: set[str],
        opsets: Mapping[str, int],
        where: str,
        depth: int,
        shapes: dict[str, StoredTensor],
    ) -> int:
        """Check nodes in their order.

        Args:
            nodes: NodeProtos.
            known: Values that may be read; grows.
            own: Those of this graph; grows.
            opsets: Operator set versions in force.
            where: For messages.
            depth: Of subgraphs.
            shapes: Constants by name, for nodes that make tensors of a given shape; grows.

        Returns:
            The nodes with functions expanded.
        """
        count = 0
        for node in nodes:
            operator = str(node.get("op_type", ""))
            at = f"{where}: node {shown(str(node.get('name') or '?'))} ({shown(operator)})"
            count += self._operator(node, operator, opsets, at)
            for name in node.get("input", ()):
                if name and name not in known:
                    raise self.tensors.refuse(f"{at}: reads {shown(name)!r}, which nothing before it makes")
            made = self._attributes(node, known, opsets, at, depth, in_function=where.startswith("function"))
            count += made[0]
            self._made_size(node, operator, made[1], shapes, at)
            outputs = [name for name in node.get("output", ()) if name]
            if not outputs:
                raise self.tensors.refuse(f"{at}: has no outputs")
            for name in outputs:
                if name in known:
                    raise self.tensors.refuse(f"{at}: makes {shown(name)!r}, which is there already")
                known.add(name)
                own.add(name)
            if operator == "Constant" and "value" in made[1]:
                shapes[outputs[0]] = made[1]["value"]
        return count

    def _operator(self, node: Message, operator: str, opsets: Mapping[str, int], at: str) -> int:
        """Book a node's operator; how many nodes it stands for."""
        domain = canonical(str(node.get("domain", "")))
        key = (domain, operator, str(node.get("overload", "")))
        if not operator:
            raise self.tensors.refuse(f"{at}: has no operator")
        if key in self.functions:
            return self.function(key, self.functions[key])
        if domain not in OPSETS:
            raise self.tensors.refuse(
                f"{at}: operator domain {shown(domain)} is not one that onnxruntime has; it has "
                f"{', '.join(name or 'ai.onnx' for name in OPSETS)}"
            )
        if domain not in opsets:
            raise self.tensors.refuse(f"{at}: no operator set is imported for {shown(domain) or 'ai.onnx'}")
        self.operators[domain, operator] += 1
        attributes = frozenset(
            (str(one.get("name", "")), None if "ref_attr_name" in one else int(one.get("type", 0)))
            for one in node.get("attribute", ())
        )
        sizes = len(node.get("input", ())), len(node.get("output", ()))
        self.uses.setdefault(Use(domain, operator, opsets[domain], *sizes, attributes), at)
        return 1

    def _attributes(
        self, node: Message, known: set[str], opsets: Mapping[str, int], at: str, depth: int, *, in_function: bool
    ) -> tuple[int, dict[str, StoredTensor]]:
        """Check a node's attributes; the nodes inside them, and their dense tensors."""
        count, seen, found = 0, set[str](), dict[str, StoredTensor]()
        for attribute in node.get("attribute", ()):
            name = str(attribute.get("name", ""))
            if not name or name in seen:
                raise self.tensors.refuse(f"{at}: attribute {shown(name)!r} has no name or is there twice")
            seen.add(name)
            self._one_value(attribute, f"{at}: attribute {shown(name)}", in_function)
            place = f"{at}: attribute {shown(name)}:"
            for tensor in (*one(attribute, "t"), *attribute.get("tensors", ())):
                found[name] = self.tensors.check(tensor, place)
                self.constants.append(found[name])
            for tensor in (*one(attribute, "sparse_tensor"), *attribute.get("sparse_tensors", ())):
                self.constants.append(self.sparse(tensor, place))
            for graph in (*one(attribute, "g"), *attribute.get("graphs", ())):
                count += self.graph(graph, known, opsets, f"{at}.{shown(name)}", depth + 1)
        return count, found

    def _one_value(self, attribute: Message, at: str, in_function: bool) -> None:
        """An attribute has the one value its type names, or refers to one of the function it is in."""
        kind = attribute.get("type", 0)
        filled = [key for key in _VALUES.values() if key in attribute]
        if "ref_attr_name" in attribute:
            if not in_function or filled:
                raise self.tensors.refuse(f"{at}: refers to a function's attribute outside one, or has a value too")
            return
        expected = _VALUES.get(kind)
        if expected is None:
            raise self.tensors.refuse(f"{at}: type {kind} is not known")
        if filled != [expected] and not (expected in _LISTS | {"s"} and not filled):
            raise self.tensors.refuse(f"{at}: type {kind} wants {expected}, found {', '.join(filled) or 'nothing'}")

    def sparse(self, tensor: Message, place: str) -> StoredTensor:
        """Check a sparse tensor: its values, and one index for each."""
        if "values" not in tensor or "indices" not in tensor:
            raise self.tensors.refuse(f"{place}: has no values or no indices")
        values = self.tensors.check(tensor["values"], place)
        indices = self.tensors.check(tensor["indices"], f"{place} {shown(values.name)} indices")
        dims = numbers(self.reader, tensor.get("dims", ()))
        if min(dims, default=0) < 1 or math.prod(dims) * max(8, values.type.bits) > 8 * MAX_MADE:
            raise self.tensors.refuse(f"{place} {shown(values.name)}: shape {dims[:8]} is too large, or not one")
        stored = math.prod(values.shape)
        fits = indices.shape in ((stored,), (stored, len(dims))) and indices.type.name == "int64"
        if len(values.shape) != 1 or not fits or stored > math.prod(dims):
            raise self.tensors.refuse(f"{place} {shown(values.name)}: {values.shape} values, {indices.shape} indices")
        return values

    def _made_size(
        self,
        node: Message,
        operator: str,
        tensors: Mapping[str, StoredTensor],
        shapes: Mapping[str, StoredTensor],
        at: str,
    ) -> None:
        """A node that makes a tensor from a constant shape must not ask for more than MAX_MADE."""
        dims: list[int] = []
        if operator in _FROM_SHAPE_ATTRIBUTE:
            for attribute in node.get("attribute", ()):
                if attribute.get("name") == "shape":
                    dims = numbers(self.reader, attribute.get("ints", ()))
        elif operator in _FROM_SHAPE_INPUT:
            names = node.get("input", ())
            place = _FROM_SHAPE_INPUT[operator]
            tensor = shapes.get(names[place]) if len(names) > place else None
            dims = self._values(tensor) if tensor is not None else []
        made = tensors.get("value")
        bits = made.type.bits if made is not None else 32
        if min(dims, default=0) < 0 or math.prod(dims) * bits > 8 * MAX_MADE:
            raise self.tensors.refuse(f"{at}: makes a tensor of shape {dims[:8]}; at most {MAX_MADE:,} bytes allowed")

    def _values(self, tensor: StoredTensor) -> list[int]:
        """Values of a small int64 constant whose bytes are in the model file; empty for others."""
        if tensor.type.name != "int64" or tensor.location is not None or tensor.span is None or tensor.nbytes > 256:
            return []
        return list(struct.unpack(f"<{tensor.nbytes // 8}q", self.reader.bytes_of(tensor.span)))

    def port(self, value: Message) -> Port:
        """An input, output or declared value; its type must be one, and its size possible."""
        name = str(value.get("name", ""))
        kinds = [key for key in value.get("type", {}) if key != "denotation"]
        if len(kinds) > 1:
            raise self.tensors.refuse(f"value {shown(name)}: has {len(kinds)} types")
        if kinds != ["tensor_type"]:
            return Port(name, kinds[0].removesuffix("_type").removesuffix("_tensor") if kinds else "unknown", None)
        tensor = value["type"]["tensor_type"]
        kind = TYPES.get(tensor.get("elem_type", 0))
        if kind is None:
            raise self.tensors.refuse(f"value {shown(name)}: element type {tensor.get('elem_type', 0)} is not known")
        if "shape" not in tensor:
            return Port(name, kind.name, None)
        shape: list[int | str | None] = []
        size = max(8, kind.bits)
        for dim in tensor["shape"].get("dim", ()):
            if "dim_value" in dim and "dim_param" in dim:
                raise self.tensors.refuse(f"value {shown(name)}: a dimension with both a value and a name")
            number = dim.get("dim_value")
            shape.append(dim.get("dim_param") or None if number is None else number)
            if number is not None:
                size *= number
                if number < 0 or size > 8 * MAX_VALUE:
                    raise self.tensors.refuse(f"value {shown(name)}: shape {shape[:8]}; negative, or above 64 GiB")
        return Port(name, kind.name, tuple(shape))


def one(message: Message, key: str) -> tuple[Any, ...]:
    """A singular field as a tuple of nothing or its value."""
    return (message[key],) if key in message else ()
