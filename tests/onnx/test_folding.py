"""Factors put into the values of an attention: the graph computes the same, with no node more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.onnx.folding import fold_into_values
from edgepack.onnx.quantize import smooth_in_float
from edgepack.onnx.rewrite import Graph, read_graph
from edgepack.onnx.units import units

WIDTH, HEADS = 12, 3


def attention(folder: Path, *, layers: int = 1, shared: bool = False, second_reader: bool = False) -> Path:
    """Layers of `softmax(x x^T) v` with `v = x W + b`, cut into heads and merged, and an output projection."""
    random = np.random.default_rng(0)
    stored = {
        "heads": np.array([0, -1, HEADS, WIDTH // HEADS]),
        "merged": np.array([0, -1, WIDTH]),
    }
    nodes, shapes, value = [], [], "x"
    for layer in range(layers):
        own, at = "shared" if shared else f"layer{layer}", f"{layer}"
        for name, shape in (("v", (WIDTH, WIDTH)), ("bias", (WIDTH,)), ("out", (WIDTH, WIDTH))):
            stored.setdefault(f"{own}.{name}", random.standard_normal(shape).astype(np.float32) * 0.3)
        rows = [
            ("Reshape", [value, "heads"], f"q{at}", {}),
            ("Transpose", [f"q{at}"], f"qh{at}", {"perm": [0, 2, 1, 3]}),
            ("Transpose", [f"q{at}"], f"kh{at}", {"perm": [0, 2, 3, 1]}),
            ("MatMul", [f"qh{at}", f"kh{at}"], f"scores{at}", {}),
            ("Softmax", [f"scores{at}"], f"p{at}", {"axis": -1}),
            ("MatMul", [value, f"{own}.v"], f"v{at}", {}),
            ("Add", [f"v{at}", f"{own}.bias"], f"vb{at}", {}),
            ("Reshape", [f"vb{at}", "heads"], f"vs{at}", {}),
            ("Transpose", [f"vs{at}"], f"vh{at}", {"perm": [0, 2, 1, 3]}),
            ("MatMul", [f"p{at}", f"vh{at}"], f"c{at}", {}),
            ("Transpose", [f"c{at}"], f"ct{at}", {"perm": [0, 2, 1, 3]}),
            ("Reshape", [f"ct{at}", "merged"], f"cm{at}", {}),
            ("MatMul", [f"cm{at}", f"{own}.out"], f"y{at}", {}),
            ("Add", [f"y{at}", f"cm{at}" if second_reader else value], f"z{at}", {}),
        ]
        nodes += [
            helper.make_node(kind, read, [made], name=f"{made}/{kind}", **more) for kind, read, made, more in rows
        ]
        shapes.append(helper.make_tensor_value_info(f"vs{at}", TensorProto.FLOAT, ["b", "s", HEADS, WIDTH // HEADS]))
        value = f"z{at}"
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", WIDTH])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["b", "s", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
        value_info=shapes,
    )
    folder.mkdir(exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


def outputs(graph: Graph, folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    graph.write(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 7, WIDTH)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def smoothed(model: Path, folder: Path) -> tuple[Graph, frozenset[str], list[str]]:
    """The graph with random factors for the output projections, those that were folded, and its operators before."""
    graph = read_graph(model)
    before = [node.op_type for node in graph.nodes]
    chosen = [unit for unit in units(graph.products()) if unit.name.startswith("y")]
    factors = {unit.name: np.exp(np.random.default_rng(2).standard_normal(WIDTH)).astype(np.float32) for unit in chosen}
    folded = fold_into_values(graph, chosen, factors)
    found = [unit for unit in units(graph.products()) if unit.name in factors]
    smooth_in_float(graph, found, factors, folded)
    return graph, folded, before


@pytest.mark.parametrize(("layers", "shared"), [(1, False), (3, False), (3, True)])
def test_values_take_the_factors_and_the_graph_computes_the_same(tmp_path: Path, layers: int, shared: bool) -> None:
    model = attention(tmp_path / "model", layers=layers, shared=shared)
    graph, folded, before = smoothed(model, tmp_path / "out")
    assert folded and [node.op_type for node in graph.nodes] == before
    expected = outputs(read_graph(model), tmp_path / "plain")
    np.testing.assert_allclose(outputs(graph, tmp_path / "out"), expected, atol=1e-5)


def test_a_context_that_something_else_reads_keeps_its_own_division(tmp_path: Path) -> None:
    model = attention(tmp_path / "model", second_reader=True)
    graph, folded, before = smoothed(model, tmp_path / "out")
    assert not folded and len(graph.nodes) == len(before) + 1
    expected = outputs(read_graph(model), tmp_path / "plain")
    np.testing.assert_allclose(outputs(graph, tmp_path / "out"), expected, atol=1e-5)


def test_values_of_which_no_shape_is_known_are_left_alone(tmp_path: Path) -> None:
    model = attention(tmp_path / "model")
    graph = read_graph(model)
    del graph.model.graph.value_info[:]
    unit = next(unit for unit in units(graph.products()) if unit.name.startswith("y"))
    assert not fold_into_values(graph, [unit], {unit.name: np.ones(WIDTH, np.float32)})
