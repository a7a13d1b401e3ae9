"""float16: half the size.

A CPU has no float16 kernels for most operators (onnxruntime would cast around every one of them), so there only the
stored weights are float16: a Cast follows each, which onnxruntime folds into float32 weights when it loads the model.
Speed and memory are those of float32, and so is the fidelity, but for weights that lose more than their last bits.
For GPUs the whole graph computes in float16, by onnxruntime's own converter; inputs and outputs stay float32.

Sources: onnxruntime.transformers.float16 (convert_float_to_float16); float16 range from IEEE 754.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from edgepack.errors import StepError
from edgepack.onnx.rewrite import Graph

_FLOAT = 1  # TensorProto.FLOAT
_SMALLEST = 1024  # weights; norms and biases stay as they are
# float16 ends at 65504; smaller than 2^-24 is 0. A matrix with larger values keeps float32.
_LARGEST = float(np.finfo(np.float16).max)


def store_half(graph: Graph, keep: Collection[str] = ()) -> list[str]:
    """Store large float32 tensors as float16, each followed by a Cast, in place.

    Args:
        graph: The model.
        keep: Nodes whose weights stay float32.

    Returns:
        Names of the tensors.
    """
    from onnx import helper

    kept = {name for node in graph.nodes if node.name in keep for name in node.input}
    casts, done = [], []
    for name in [name for name, tensor in graph.stored.items() if tensor.data_type == _FLOAT and name not in kept]:
        values = graph.array(name)
        if values.size < _SMALLEST or np.abs(values).max() > _LARGEST:
            continue
        half = graph.store(f"{name}/float16", values.astype(np.float16))
        del graph.stored[name]
        casts.append(helper.make_node("Cast", [half], [name], name=f"{name}/Cast", to=_FLOAT))
        done.append(name)
    nodes = list(graph.nodes)
    del graph.nodes[:]
    graph.nodes.extend(casts + nodes)
    return done


def compute_half(graph: Graph, keep: Collection[str] = ()) -> Graph:
    """A graph that computes in float16, for GPUs.

    Args:
        graph: The model.
        keep: Nodes that stay in float32.

    Raises:
        StepError: onnxruntime's converter can't convert it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph.settle()
    try:
        model: Any = convert_float_to_float16(
            graph.model, keep_io_types=True, disable_shape_infer=False, node_block_list=sorted(keep)
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise StepError(f"float16: onnxruntime's converter: {' '.join(str(error).split())[:300]}") from error
    return Graph(model, graph.inputs)
