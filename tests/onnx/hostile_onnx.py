"""ONNX files made to hurt: each function lays a model in a folder and returns the file to check."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Make = Callable[[Path], Path]
CASES: dict[str, tuple[Make, str]] = {}  # name -> (how to make it, what the message says)


def case(name: str, says: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        CASES[name] = (make, says)
        return make

    return keep


def value(name: str, shape: list[Any] | None = None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [2, 3] if shape is None else shape)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    *,
    initializers: tuple[onnx.TensorProto, ...] = (),
    sparse: tuple[onnx.SparseTensorProto, ...] = (),
    opsets: dict[str, int] | None = None,
    functions: tuple[onnx.FunctionProto, ...] = (),
    ir_version: int = 10,
) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", ["x"], ["y"])] if nodes is None else nodes
    graph = helper.make_graph(
        nodes, "g", [value("x")], [value("y")], list(initializers), sparse_initializer=list(sparse)
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": 20}).items()]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=ir_version)


def save(folder: Path, made: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def stored_outside(location: str, offset: int | str = 0, length: int | str | None = 24) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    told = {"location": location, "offset": offset, "length": length}
    for key, entry in told.items():
        if entry is not None:
            tensor.external_data.add(key=key, value=str(entry))
    return tensor


def with_external(folder: Path, *where: Any, name: str = "model.onnx.data", **more: Any) -> Path:
    """A model that adds an external tensor; 24 bytes of data lie in `name`."""
    (folder / name).write_bytes(np.arange(6, dtype=np.float32).tobytes())
    return save(folder, adding(stored_outside(*where, **more)))


def adding(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], initializers=(tensor,))


def _locations() -> None:
    bad = {
        "parent": "../secret.data",
        "absolute": "/etc/hostname",
        "detour": "a/../../secret.data",
        "folder in it": "sub/w.data",
        "backslash": "..\\secret.data",
        "drive": "C:secret.data",
        "share": "\\\\srv\\share",
        "device": "/dev/zero",
        "reserved": "NUL",
        "reserved with a suffix": "com1.data",
        "trailing dot": "model.onnx.data.",
        "empty": "",
        "dot": ".",
        "newline": "a\nb",
        "memory": "*/_ORT_MEM_ADDR_/*",
        "memory in another place": "_ORT_MEM_ADDR_/*",
    }
    for name, location in bad.items():

        def make(folder: Path, location: str = location) -> Path:
            inner = folder / "inner"
            inner.mkdir()
            (folder / "secret.data").write_bytes(bytes(24))
            return with_external(inner, location)

        CASES[f"external {name}"] = (make, "expected the plain name of a file beside it")
    for name, (offset, length, says) in {
        "offset past the end": (1 << 20, 24, "which has 24"),
        "offset near the end": (4, 24, "which has 24"),
        "length past the end": (0, 1 << 40, "its shape and type need 24"),
        "length too short": (0, 23, "its shape and type need 24"),
        "negative offset": (-4, 24, "expected a number of bytes"),
        "negative length": (0, -1, "expected a number of bytes"),
        "huge offset": (2**64 - 24, 24, "expected a number of bytes"),
        "wrapping offset": (10**18 - 1, 24, "which has 24"),
        "offset in another notation": ("0x10", 24, "expected a number of bytes"),
        "offset in other digits": ("٣", 24, "expected a number of bytes"),
        "offset that is no number": ("", 24, "expected a number of bytes"),
    }.items():

        def ranged(folder: Path, offset: Any = offset, length: Any = length) -> Path:
            return with_external(folder, "model.onnx.data", offset, length)

        CASES[f"external {name}"] = (ranged, says)


_locations()


@case("external symlink", "symbolic link")
def _symlink(folder: Path) -> Path:
    (folder / "w.data").symlink_to("model.onnx.data")
    return with_external(folder, "w.data")


@case("external in a linked folder", "no such file|plain name|not a directory")
def _symlinked_parent(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "sub").symlink_to("real")
    (folder / "real" / "w.data").write_bytes(bytes(24))
    return with_external(folder, "sub/w.data")


@case("external hard link", "2 hard links")
def _hardlink(folder: Path) -> Path:
    (folder / "secret").write_bytes(bytes(24))
    os.link(folder / "secret", folder / "w.data")
    return with_external(folder, "w.data")


@case("external missing", "no such file")
def _missing(folder: Path) -> Path:
    return with_external(folder, "w.data")


@case("external folder", "not a regular file|is a directory")
def _folder(folder: Path) -> Path:
    (folder / "w.data").mkdir()
    return with_external(folder, "w.data")


@case("external fifo", "not a regular file")
def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.data")
    return with_external(folder, "w.data")


@case("external in the model itself", "the model file itself")
def _itself(folder: Path) -> Path:
    return with_external(folder, "model.onnx")


@case("external twice told", "two location")
def _twice(folder: Path) -> Path:
    tensor = stored_outside("model.onnx.data")
    tensor.external_data.add(key="location", value="../secret")
    (folder / "model.onnx.data").write_bytes(bytes(24))
    return save(folder, adding(tensor))


@case("external with an unknown key", "an unknown basepath")
def _basepath(folder: Path) -> Path:
    tensor = stored_outside("model.onnx.data")
    tensor.external_data.add(key="basepath", value="/etc")
    (folder / "model.onnx.data").write_bytes(bytes(24))
    return save(folder, adding(tensor))


@case("external and inside", "has raw_data as well")
def _both(folder: Path) -> Path:
    tensor = stored_outside("model.onnx.data")
    tensor.raw_data = bytes(24)
    (folder / "model.onnx.data").write_bytes(bytes(24))
    return save(folder, adding(tensor))


@case("external overlap", "overlaps")
def _overlap(folder: Path) -> Path:
    second = stored_outside("model.onnx.data", 20)
    second.name = "v"
    (folder / "model.onnx.data").write_bytes(bytes(64))
    nodes = [helper.make_node("Add", ["x", "w"], ["z"]), helper.make_node("Add", ["z", "v"], ["y"])]
    return save(folder, model(nodes, initializers=(stored_outside("model.onnx.data"), second)))


@case("external sparse", "expected the plain name")
def _sparse(folder: Path) -> Path:
    values = stored_outside("../secret.data")
    values.dims[:] = [6]
    indices = numpy_helper.from_array(np.arange(6), "w_i")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[2, 3])
    return save(folder, model([helper.make_node("Add", ["x", "w"], ["y"])], sparse=(sparse,)))


@case("external in a Constant", "expected the plain name")
def _constant(folder: Path) -> Path:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=stored_outside("../secret.data")),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    return save(folder, model(nodes))


@case("external in a sparse Constant", "expected the plain name")
def _sparse_constant(folder: Path) -> Path:
    values = stored_outside("../secret.data")
    values.dims[:] = [6]
    sparse = onnx.SparseTensorProto(values=values, indices=numpy_helper.from_array(np.arange(6), "i"), dims=[2, 3])
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.append(helper.make_attribute("sparse_value", sparse))
    return save(folder, model([node, helper.make_node("Add", ["x", "w"], ["y"])]))


def branches(*inner: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True), "c")),
        helper.make_node("If", ["c"], ["y"], then_branch=inner[0], else_branch=inner[-1]),
    ]


@case("external in a subgraph", "expected the plain name")
def _subgraph(folder: Path) -> Path:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "b", [], [value("z")], [stored_outside("..")]
    )
    return save(folder, model(branches(inner)))


@case("external in a function", "expected the plain name")
def _function(folder: Path) -> Path:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=stored_outside("../secret.data")),
        helper.make_node("Add", ["a", "w"], ["b"]),
    ]
    function = helper.make_function("local", "f", ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])
    call = helper.make_node("f", ["x"], ["y"], domain="local")
    return save(folder, model([call], opsets={"": 20, "local": 1}, functions=(function,)))


@case("function that calls itself", "calls itself")
def _recursion(folder: Path) -> Path:
    nodes = [helper.make_node("f", ["a"], ["b"], domain="local")]
    function = helper.make_function("local", "f", ["a"], ["b"], nodes, [helper.make_opsetid("local", 1)])
    call = helper.make_node("f", ["x"], ["y"], domain="local")
    return save(folder, model([call], opsets={"": 20, "local": 1}, functions=(function,)))


@case("functions that double each other", "functions expanded|that call each other")
def _laughs(folder: Path) -> Path:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    functions = []
    for level in range(14):
        call = [("Neg", "")] * 8 if level == 0 else [(f"f{level - 1}", "local")] * 8
        nodes = [
            helper.make_node(name, [f"v{i}"], [f"v{i + 1}"], domain=domain) for i, (name, domain) in enumerate(call)
        ]
        functions.append(helper.make_function("local", f"f{level}", ["v0"], ["v8"], nodes, imports))
    call_all = helper.make_node("f13", ["x"], ["y"], domain="local")
    return save(folder, model([call_all], opsets={"": 20, "local": 1}, functions=tuple(functions)))


@case("a thousand functions deep", "that call each other")
def _deep_functions(folder: Path) -> Path:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    functions = [
        helper.make_function(
            "local", f"f{i}", ["a"], ["b"], [helper.make_node(f"f{i + 1}", ["a"], ["b"], domain="local")], imports
        )
        for i in range(1000)
    ]
    last = helper.make_function("local", "f1000", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], imports)
    call = helper.make_node("f0", ["x"], ["y"], domain="local")
    return save(folder, model([call], opsets={"": 20, "local": 1}, functions=(*functions, last)))


@case("dimensions that lie", "expected 0 to 2|has 24 bytes")
def _lying(folder: Path) -> Path:
    tensor = numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    tensor.dims[:] = [1 << 20, 1 << 20]
    return save(folder, adding(tensor))


@case("dimensions whose product wraps", "expected 0 to 2")
def _wrapping(folder: Path) -> Path:
    tensor = numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    tensor.dims[:] = [1 << 32, 1 << 32, 1]
    return save(folder, adding(tensor))


@case("negative dimension", "expected 0 to 2")
def _negative(folder: Path) -> Path:
    tensor = numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    tensor.dims[:] = [-2, -3]
    return save(folder, adding(tensor))


@case("too few typed values", "float_data has 5 values")
def _few(folder: Path) -> Path:
    return save(folder, adding(TensorProto(name="w", data_type=1, dims=[2, 3], float_data=[1.0] * 5)))


@case("packed integers of another number", "int32_data has 3 values")
def _packed(folder: Path) -> Path:
    return save(folder, adding(TensorProto(name="w", data_type=TensorProto.INT32, dims=[2], int32_data=[1, 300, -1])))


@case("a tensor without data", "has no data")
def _nothing(folder: Path) -> Path:
    return save(folder, adding(TensorProto(name="w", data_type=1, dims=[2, 3])))


@case("unknown element type", "element type 99")
def _type(folder: Path) -> Path:
    return save(folder, adding(TensorProto(name="w", data_type=99, dims=[2, 3], raw_data=bytes(24))))


@case("a constant of 32 GB", "makes a tensor of shape")
def _large(folder: Path) -> Path:
    shape = numpy_helper.from_array(np.array([1 << 33]), "s")
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])]
    return save(folder, model(nodes, initializers=(shape,)))


@case("a constant of 32 GB from a Constant node", "makes a tensor of shape")
def _large_constant(folder: Path) -> Path:
    nodes = [
        helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.array([1 << 17, 1 << 17]))),
        helper.make_node("Expand", ["x", "s"], ["y"]),
    ]
    return save(folder, model(nodes))


@case("random numbers without end", "makes a tensor of shape")
def _random(folder: Path) -> Path:
    return save(folder, model([helper.make_node("RandomNormal", [], ["y"], shape=[1 << 20, 1 << 20])]))


@case("an output of an exabyte", "above 64 GiB")
def _exabyte(folder: Path) -> Path:
    made = model()
    made.graph.output[0].CopyFrom(value("y", [1 << 30, 1 << 30]))
    return save(folder, made)


@case("unknown domain", "domain evil is not one")
def _domain(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Steal", ["x"], ["y"], domain="evil")]))


@case("unknown imported domain", "set evil is not one")
def _imported(folder: Path) -> Path:
    return save(folder, model(opsets={"": 20, "evil": 1}))


@case("custom operators", "ai.onnx.contrib")
def _custom(folder: Path) -> Path:
    node = helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")
    return save(folder, model([node], opsets={"": 20, "ai.onnx.contrib": 1}))


@case("opset 9999", "onnxruntime has 7 to")
def _opset(folder: Path) -> Path:
    return save(folder, model(opsets={"": 9999}))


@case("opset 9999 by its other name", "onnxruntime has 7 to")
def _alias(folder: Path) -> Path:
    return save(folder, model(opsets={"ai.onnx": 9999}))


@case("the standard opset twice", "twice")
def _two_opsets(folder: Path) -> Path:
    return save(folder, model(opsets={"": 20, "ai.onnx": 13}))


@case("no opset", "imports no operator set")
def _no_opset(folder: Path) -> Path:
    made = model()
    del made.opset_import[:]
    return save(folder, made)


@case("IR version of the future", "IR version 99")
def _ir(folder: Path) -> Path:
    return save(folder, model(ir_version=99))


@case("unknown operator", "no such operator")
def _operator(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Teleport", ["x"], ["y"])]))


@case("operator newer than its opset", "from version 20 on")
def _newer(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Gelu", ["x"], ["y"])], opsets={"": 17}))


@case("wrong number of inputs", "has 3 inputs")
def _arity(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Add", ["x", "x", "x"], ["y"])]))


@case("unknown attribute", "does not know")
def _attribute(folder: Path) -> Path:
    return save(folder, model([helper.make_node("MatMulNBits", ["x", "x", "x"], ["y"], domain="com.microsoft", evil=1)],
                              opsets={"": 20, "com.microsoft": 1}))  # fmt: skip


@case("attribute of another type", "attribute axis has type")
def _attribute_type(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Softmax", ["x"], ["y"], axis="one")]))


@case("attribute with two values", "type 2 wants i")
def _two_values(folder: Path) -> Path:
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    node.attribute[0].s = b"x"
    return save(folder, model([node]))


@case("cycle", "nothing before it makes")
def _cycle(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Identity", ["a"], ["b"])]
    return save(folder, model([*nodes, helper.make_node("Identity", ["a"], ["y"])]))


@case("a value made twice", "is there already")
def _ssa(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Identity", ["x"], ["y"])] * 2))


@case("an output nothing makes", "nothing makes its output")
def _output(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Identity", ["x"], ["z"])]))


@case("If nested 20 deep", "inside each other")
def _nested(folder: Path) -> Path:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [value("z")])
    for level in range(20):
        node = helper.make_node("If", ["c"], [f"z{level}"], then_branch=inner, else_branch=inner)
        if level > 3:  # both branches double the file; one is enough to be deep
            other = helper.make_graph([helper.make_node("Identity", ["x"], ["q"])], "q", [], [value("q")])
            node = helper.make_node("If", ["c"], [f"z{level}"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([node], "b", [], [value(f"z{level}")])
    return save(folder, model(branches(inner)))


@case("messages nested a thousand deep", "messages inside each other|reaches byte")
def _bomb(folder: Path) -> Path:
    body = b""
    for _ in range(1000):  # TypeProto.sequence_type.elem_type, again and again
        body = b"\x22" + varint(len(body) + len(varint(len(body))) + 1) + b"\x0a" + varint(len(body)) + body
    info = b"\x0a\x01x\x12" + varint(len(body)) + body
    graph = b"\x5a" + varint(len(info)) + info
    (folder / "model.onnx").write_bytes(b"\x08\x0a\x3a" + varint(len(graph)) + graph)
    return folder / "model.onnx"


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


@case("a million empty nodes", "fields")
def _nodes(folder: Path) -> Path:
    graph = b"\x0a\x00" * 1_000_000
    (folder / "model.onnx").write_bytes(b"\x08\x0a\x3a" + varint(len(graph)) + graph)
    return folder / "model.onnx"


@case("many small subgraphs", "fields|no outputs|has no operator|lacks the attribute|inputs")
def _many(folder: Path) -> Path:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [value("z")])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner)
    nodes = []
    for number in range(6000):
        node.output[0] = f"y{number}"
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    return save(folder, model([*nodes, helper.make_node("Identity", ["y0"], ["y"])]))


@case("unknown field", "is not one of ONNX's Model")
def _field(folder: Path) -> Path:
    path = save(folder, model())
    path.write_bytes(path.read_bytes() + b"\xf2\x7f\x03PK!")
    return path


@case("two models in one file", "is there twice")
def _two_graphs(folder: Path) -> Path:
    path = save(folder, model())
    path.write_bytes(path.read_bytes() * 2)
    return path


@case("training information", "training information")
def _training(folder: Path) -> Path:
    made = model()
    made.training_info.add()
    return save(folder, made)


@case("empty file", "is empty")
def _empty(folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(b"")
    return folder / "model.onnx"


@case("empty graph", "has no nodes")
def _no_nodes(folder: Path) -> Path:
    return save(folder, model([]))


@case("no graph", "has no graph")
def _no_graph(folder: Path) -> Path:
    made = model()
    made.ClearField("graph")
    return save(folder, made)


@case("truncated", "reaches byte|does not end")
def _truncated(folder: Path) -> Path:
    path = with_external(folder, "model.onnx.data")
    path.write_bytes(path.read_bytes()[:-9])
    return path


@case("pickle", "is not one of ONNX's|wire type|not an ONNX file")
def _pickle(folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system")
    return folder / "model.onnx"


@case("text", "is not one of ONNX's|wire type|reaches byte")
def _text(folder: Path) -> Path:
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    return folder / "model.onnx"


@case("names that are not UTF-8", "is not UTF-8")
def _encoding(folder: Path) -> Path:
    path = save(folder, model())
    path.write_bytes(path.read_bytes().replace(b"Identity", b"Ident\xff\xfey"))
    return path


@case("a name of two megabytes", "Node.name has")
def _long(folder: Path) -> Path:
    made = model()
    made.graph.node[0].name = "x" * (2 << 20)
    return save(folder, made)


@case("a name full of escapes", r"domain .*x1b")
def _escapes(folder: Path) -> Path:
    return save(folder, model([helper.make_node("Identity", ["x"], ["y"], domain="\x1b[31m\u202e")]))


@case("model is a symlink", "symbolic link")
def _linked(folder: Path) -> Path:
    (folder / "real.onnx").write_bytes(model().SerializeToString())
    (folder / "model.onnx").symlink_to("real.onnx")
    return folder / "model.onnx"


@case("model is a folder", "not a regular file|is a directory")
def _is_folder(folder: Path) -> Path:
    (folder / "model.onnx").mkdir()
    return folder / "model.onnx"


@case("model is missing", "no such file")
def _is_missing(folder: Path) -> Path:
    return folder / "model.onnx"
