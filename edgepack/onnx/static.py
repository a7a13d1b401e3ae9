"""Static quantization: QuantizeLinear and DequantizeLinear around operators, with ranges fixed by calibration data.

Where the pairs go is onnxruntime's decision; here are the choices: which operators, signed or unsigned, ranges and
weights' scales. Static ranges cost no time at run time and suit convolutions and neural processors; for transformers on
a CPU dynamic ranges keep more.

Sources: onnxruntime.quantization (qdq_quantizer.py; used as quantize_static does), and for neural processors its
execution_providers/qnn (get_qnn_qdq_config: 16-bit activations, what has to be symmetric).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import StepError
from edgepack.onnx.calibrate import Feed, activations
from edgepack.onnx.integers import by_output, widest_pairs
from edgepack.onnx.ranges import find_range
from edgepack.onnx.rewrite import MICROSOFT, Graph

Ranges = dict[str, tuple[np.float32, np.float32]]

_PRODUCTS = ("MatMul", "Gemm")
# Between convolutions everything stays in 8 bits; between the products of a transformer it must not: all operators in 8
# bits keep 0.81 of the cosine of all-MiniLM-L6-v2, products alone 0.93 (both without smoothing).
_AROUND_CONVOLUTIONS = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu")
# What hides a padded token from attention on a neural processor: far below any score (exp(-100) is 4e-44, exp(-30)
# 1e-13), and near enough for the steps of the range it shares with them: 0.002 at 16 bits, 0.2 at 8.
_HIDDEN = {16: -100.0, 8: -30.0}
_LOWEST = -1e30
_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


def operators(graph: Graph) -> tuple[str, ...]:
    """Operators that are quantized on a CPU."""
    convolutions = [node for node in graph.nodes if node.op_type == "Conv"]
    mostly = len(convolutions) > len(graph.products())
    return (*_PRODUCTS, "Conv", *(_AROUND_CONVOLUTIONS if mostly else ()))


def find_ranges(graph: Graph, path: Path, feeds: Sequence[Feed], how: str, threads: int) -> Ranges:
    """Ranges of everything that the quantized operators read and make.

    Args:
        graph: The float32 graph.
        path: The same as a file.
        feeds: Calibration data.
        how: See `ranges.find_range`.
        threads: For running it.
    """
    wanted = operators(graph)
    given = {port.name for port in graph.inputs if port.type != "float32"}
    values: dict[str, None] = {}
    for node in graph.nodes:
        if node.op_type in wanted and not node.domain and not (_inner_product(graph, node)):
            values |= dict.fromkeys(name for name in node.input if name and name not in graph.stored)
            if node.op_type not in _PRODUCTS:
                values |= dict.fromkeys(node.output)
    names = [name for name in values if name not in given]
    return {name: find_range(arrays, how) for name, arrays in activations(path, names, feeds, threads=threads)}


def quantize_static(graph: Graph, ranges: Ranges, *, keep: Collection[str], arch: str) -> Graph:
    """Quantize products and convolutions for a CPU.

    Args:
        graph: The float32 graph, whose activations had these ranges.
        ranges: From `find_ranges`.
        keep: Nodes left as they are.
        arch: `x86_64`: unsigned activations, weights that saturate no 16-bit sum. `arm64`: both signed, zero points 0.

    Raises:
        StepError: onnxruntime can't quantize it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    graph.settle()
    wanted = operators(graph)
    symmetric = arch == "arm64"
    # Products between two activations (of attention) stay in float: they have no weights to save.
    left = {node.name for node in graph.nodes if _inner_product(graph, node)}
    data = {name: TensorData(lowest=low, highest=high) for name, (low, high) in ranges.items()}
    options: dict[str, Any] = {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        "MatMulConstBOnly": True,
        "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),
        "TensorQuantOverrides": {} if symmetric else _pair_safe(graph, wanted, keep),
    }
    with _quiet("8-bit QDQ"):
        quantizer = QDQQuantizer(
            graph.model,
            True,  # a scale per output
            False,
            QuantType.QInt8,
            QuantType.QInt8 if symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            sorted(left | set(keep)),
            sorted(wanted),
            options,
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return Graph(quantizer.model.model, graph.inputs)


def quantize_for_npu(graph: Graph, feeds: Sequence[Feed], *, keep: Collection[str], bits: int) -> Graph:
    """Quantize a whole graph for a neural processor, which runs nothing in float.

    Args:
        graph: The float32 graph, with fixed shapes.
        feeds: Calibration data.
        keep: Nodes left as they are.
        bits: Of activations: 8 or 16.

    Raises:
        StepError: onnxruntime can't quantize it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    graph.settle()
    _moderate_masks(graph, _HIDDEN[bits])
    with tempfile.TemporaryDirectory() as scratch, _quiet(f"a{bits}w8"):
        source, result = f"{scratch}/model.onnx", f"{scratch}/quantized.onnx"
        onnx.save_model(graph.model, source, save_as_external_data=True, location="model.onnx.data")
        config = get_qnn_qdq_config(
            source,
            _Reader([*feeds, *_half_hidden(feeds)]),
            activation_type=QuantType.QUInt16 if bits == 16 else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            weight_symmetric=True,
            nodes_to_exclude=sorted(keep),
        )
        config.use_external_data_format = True
        quantize(source, result, config)
        model = onnx.load(result)
    used = {node.domain for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in used | {"", MICROSOFT}]:
        model.opset_import.remove(entry)
    return Graph(model, graph.inputs)


def _inner_product(graph: Graph, node: Any) -> bool:
    """A product of two activations."""
    return node.op_type in _PRODUCTS and not any(name in graph.stored for name in node.input[:2])


def _pair_safe(graph: Graph, wanted: Collection[str], keep: Collection[str]) -> Mapping[str, list[dict[str, Any]]]:
    """Scales of weights that saturate nothing, as onnxruntime takes them: one entry per channel, the first names it."""
    from onnxruntime.quantization import QuantType

    def entries(axis: int, scales: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.int8(0)} for scale in scales
        ]
        found[0]["axis"] = axis
        return found

    overrides = {}
    if set(wanted) & set(_PRODUCTS):
        for product in graph.products():
            if product.node not in keep:
                scales = by_output(graph.matrix(product), pair_safe=True)[1]
                overrides[product.weight] = entries(0 if product.transposed else 1, scales)
    for node in graph.nodes:
        if node.op_type == "Conv" and node.name not in keep and node.input[1] in graph.stored:
            kernel = graph.array(node.input[1])
            overrides[node.input[1]] = entries(0, widest_pairs(kernel.reshape(len(kernel), -1)))
    return overrides


def _half_hidden(feeds: Sequence[Feed]) -> list[Feed]:
    """The first sample, its second half hidden: what hides padding must be in the ranges, however long the texts."""
    hidden = [dict(feed) for feed in feeds[:1] if "attention_mask" in feed]
    for feed in hidden:
        mask = np.array(feed["attention_mask"])
        mask[:, mask.shape[1] // 2 :] = 0
        feed["attention_mask"] = mask
    return hidden


def _moderate_masks(graph: Graph, value: float) -> None:
    """Replace what hides padding, the lowest float32, by `value`, in place.

    Attention scores get it added and are quantized with it: a range of 3e38 in 2^16 steps leaves every score 0.
    """
    from onnx import numpy_helper

    for tensor in graph.model.graph.initializer:
        if tensor.data_type == 1:
            array = numpy_helper.to_array(tensor)
            if array.size and array.min() < _LOWEST:
                found = np.where(array < _LOWEST, value, array).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(found, tensor.name))


class _Reader:
    """What onnxruntime's calibrators read samples from."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = list(feeds)
        self._next = 0

    def get_next(self) -> Feed | None:
        """The next sample, None at the end."""
        self._next += 1
        return self._feeds[self._next - 1] if self._next <= len(self._feeds) else None

    def rewind(self) -> None:
        """Start again."""
        self._next = 0

    def set_range(self, start_index: int, end_index: int) -> None:
        """Not used: samples are few."""


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Without onnxruntime's advice on logger and stdout, its errors as ours."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StepError(f"{what}: onnxruntime.quantization: {reason}") from error
    finally:
        logging.disable(previous)
