"""Take out of an exported graph what says where and by whom it was made, and give its nodes names that mean something.

torch's exporter notes the source lines of the caller on every node: absolute paths, which leak and make the bytes
depend on the folder. All metadata, comments and stale shapes go. The one useful part of it, the module a node came
from, becomes the node's name (`encoder.layer.0.attention.self.query/MatMul`), which is what whoever keeps a node out
of quantization writes; a weight that was transposed while folding gets its module's name back.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from typing import Any

PRODUCER = "edgepack"  # without a version: an update that changes nothing in the graph must not change its bytes
_SCOPES = "pkg.torch.onnx.name_scopes"  # a Python list literal: every module from the root on, then the operation
_ROOT = "encoder."  # the wrapper's name of the transformers model
_FOLDED = "val_"  # what torch's exporter calls a constant without a name


def strip(model: Any) -> None:
    """Name the nodes after their modules and remove all metadata, in place.

    Args:
        model: An `onnx_ir.Model` as torch's exporter made it.
    """
    _name_nodes(model.graph)
    _name_weights(model.graph)
    model.producer_name, model.producer_version = PRODUCER, None
    model.domain = model.model_version = model.doc_string = None
    model.metadata_props.clear()
    for graph in _graphs(model):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
        for value in _values(graph):
            value.doc_string = None
            value.metadata_props.clear()


def _graphs(model: Any) -> Iterator[Any]:
    yield model.graph
    yield from model.graph.subgraphs()
    yield from model.functions.values()


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.outputs
    yield from getattr(graph, "initializers", {}).values()
    for node in graph:
        yield from node.outputs


def _module(node: Any) -> str:
    """Path of the module a node came from, in the transformers model; empty for the wrapper's own."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if path.startswith("_") else path.removeprefix(_ROOT)


def _name_nodes(graph: Any) -> None:
    seen: Counter[str] = Counter()
    for node in graph:
        module = _module(node)
        name = f"{module}/{node.op_type}" if module else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _name_weights(graph: Any) -> None:
    """Call every initializer as the checkpoint does; a folded one after the only module that reads it."""
    for name, value in list(graph.initializers.items()):
        users = [use.node for use in value.uses()]
        modules = {node.name.rpartition("/")[0] for node in users if node.op_type in ("MatMul", "Gemm", "Conv")}
        wanted = name.removeprefix(_ROOT)
        if name.startswith(_FOLDED) and len(modules) == 1 and "" not in modules and value.shape.rank() > 1:
            wanted = f"{modules.pop()}.weight"
        if wanted != name and wanted not in graph.initializers:
            value.name = wanted
