"""Static quantization: QuantizeLinear and DequantizeLinear around operators, with ranges fixed by calibration data.

Ranges and the placement of the pairs are onnxruntime's; here are the choices: which operators, signed or unsigned, how
a range is taken, symmetric where the device wants it, and smoothing factors before. Static ranges cost no time at run
time and suit convolutions and neural processors; for transformers on a CPU dynamic ranges keep more.

Sources: onnxruntime.quantization (calibrate.py, qdq_quantizer.py; as quantize_static calls them), and for Qualcomm's
provider its execution_providers/qnn (get_qnn_qdq_config: 16-bit activations, what must be symmetric).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from edgepack.errors import StepError
from edgepack.onnx.calibrate import Feeds
from edgepack.onnx.recipes import Recipe
from edgepack.onnx.rewrite import Graph

OPSET_16_BIT = 21  # QuantizeLinear to 16 bits, in the standard
_TOGETHER = 16  # samples whose activations onnxruntime holds at a time
# What gains from 8 bits on a CPU. Element-wise operators between them only lose: all of them quantized keeps 0.81 of
# the cosine of all-MiniLM-L6-v2, products alone 0.93.
_CPU_OPERATORS = ("MatMul", "Gemm", "Conv")
PERCENTILE = 99.999  # onnxruntime's default


def quantize_static(graph: Graph, recipe: Recipe, feeds: Feeds, *, keep: Collection[str], arch: str, npu: bool) -> Graph:
    """Quantize with fixed ranges.

    Args:
        graph: The model in float32, smoothed already where the recipe says so.
        recipe: The row.
        feeds: Calibration data.
        keep: Nodes left as they are.
        arch: `x86_64` or `arm64`.
        npu: All operators and not only products: a neural processor has to run the whole graph.

    Raises:
        StepError: onnxruntime can't quantize it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    method = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }[recipe.calibrator]
    wide = recipe.activation_bits == 16
    if wide:
        graph.model.CopyFrom(onnx.version_converter.convert_version(graph.model, OPSET_16_BIT))
    # ARM multiplies signed by signed fastest, with zero points of 0; on x86-64 the instruction takes unsigned ones.
    symmetric = arch == "arm64" and not wide
    activation = QuantType.QUInt16 if wide else QuantType.QInt8 if symmetric else QuantType.QUInt8
    options: dict[str, Any] = {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        "MatMulConstBOnly": not npu,
        "DedicatedQDQPair": False,
        "QuantizeBias": True,
    }
    operators = sorted({node.op_type for node in graph.nodes}) if npu else list(_CPU_OPERATORS)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        path = Path(scratch) / "model.onnx"
        onnx.save_model(graph.model, path, save_as_external_data=True, location="model.onnx.data")
        try:
            calibrator = create_calibrator(
                path,
                operators,
                augmented_model_path=f"{scratch}/augmented.onnx",
                calibrate_method=method,
                use_external_data_format=True,
                providers=["CPUExecutionProvider"],
                extra_options={"percentile": PERCENTILE, "symmetric": symmetric},
            )
            for start in range(0, len(feeds), _TOGETHER):
                calibrator.collect_data(_Reader(feeds[start : start + _TOGETHER]))
            ranges = calibrator.compute_data()
            del calibrator
            model = onnx.load(path)
            quantizer = QDQQuantizer(
                model,
                True,  # per channel
                arch == "x86_64",  # 7-bit weights: this path has no pair-safe ones
                QuantType.QInt8,
                activation,
                ranges,
                [],
                sorted(keep),
                operators,
                options,
            )
            quantizer.quantize_model()
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AssertionError) as error:
            raise StepError(f"{recipe.name}: onnxruntime.quantization: {' '.join(str(error).split())[:300]}") from error
        return Graph(quantizer.model.model)


class _Reader:
    """What onnxruntime's calibrators read samples from."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next sample, None at the end."""
        return next(self._feeds, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to pre-process, on the root logger and on stdout."""
    import io

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
