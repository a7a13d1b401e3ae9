"""A model for minimal builds of onnxruntime: `model.ort` and the list of operators and types such a build needs.

Converted by onnxruntime's own tool (onnxruntime.tools.convert_onnx_models_to_ort, style `Fixed`: optimised here, and
nothing on the device), for the device's kind of processor, then loaded and compared with the ONNX model it was made of:
the same outputs for the fixed inputs of `onnx_samples.py`. Worker function.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import ConformanceError, StepError
from edgepack.measure.onnx_samples import fixed_feeds
from edgepack.onnx.check import check_model
from edgepack.onnx.providers import CPU
from edgepack.runtimes.onnxruntime import Session, bindings, native_errors, reason
from edgepack.worker import Progress

ORT, OPERATORS = "model.ort", "model.required_operators_and_types.config"
# Of the largest output: both run here, but optimised for another processor the sums may be taken in another order.
TOLERANCE = 1e-3
MAX_BYTES = (1 << 31) - (1 << 20)  # a flatbuffer's offsets are 31 bits


def convert(*, model: str, files: Sequence[str], folder: str, arch: str, progress: Progress) -> dict[str, Any]:
    """Write `model.ort` and its operator list beside copies of the model's own files.

    Args:
        model: The `.onnx` file.
        files: Names of all files of the model, in its folder.
        folder: An existing folder for the result.
        arch: `arm64` or `x86_64`: of the device.
        progress: In steps: converted, compared.

    Returns:
        `files` written, `bytes` of model.ort, `max_abs_diff` to the ONNX model.

    Raises:
        StepError: onnxruntime can't convert or load it, or the model is too large for the format.
        ConformanceError: It computes something else than the ONNX model.
    """
    source, target = Path(model), Path(folder)
    if check_model(source, libraries=False).total_bytes > MAX_BYTES:
        raise StepError(f"{source.name}: models of 2 GB and more have no .ort form", hint="Leave onnx.ort out.")
    for name in files:
        shutil.copyfile(source.parent / name, target / name)
    with tempfile.TemporaryDirectory() as scratch:
        _convert(source, Path(scratch), arch)
        for name in (ORT, OPERATORS):
            found = Path(scratch) / name
            if not found.is_file():
                raise StepError(f"{source.name}: onnxruntime's converter wrote no {name}")
            shutil.copyfile(found, target / name)
    _without_comments(target / OPERATORS)
    progress(1, 2)
    difference = _compare(source, target / ORT)
    progress(2, 2)
    return {"files": [ORT, OPERATORS], "bytes": (target / ORT).stat().st_size, "max_abs_diff": difference}


def _convert(source: Path, scratch: Path, arch: str) -> None:
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_onnx_models_to_ort(
                source,
                output_dir=scratch,
                optimization_styles=[OptimizationStyle.Fixed],
                target_platform="arm" if arch == "arm64" else "amd64",
                enable_type_reduction=True,
            )
    except native_errors() as error:
        raise StepError(f"{source.name}: onnxruntime can't convert it to .ort: {reason(error)}") from error
    finally:
        logging.disable(previous)


def _without_comments(path: Path) -> None:
    """The converter's first lines name the folder it worked in."""
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if line and not line.startswith("#")) + "\n", encoding="utf-8")


def _compare(source: Path, converted: Path) -> float:
    """Largest difference of an output, relative to the largest value or 1."""
    api: Any = bindings()
    session = Session(source, provider=CPU, threads=1)
    options = api.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        other = api.InferenceSession(str(converted), options, providers=[CPU])
    except native_errors() as error:
        raise StepError(f"{converted.name}: onnxruntime can't load it: {reason(error)}") from error
    worst = 0.0
    for feeds, _ in fixed_feeds(session):
        expected = session.run(feeds)
        found = dict(zip(expected, other.run(list(expected), feeds), strict=True))
        for name, values in expected.items():
            scale = max(1.0, float(np.abs(values).max()))
            worst = max(worst, float(np.abs(values - found[name]).max()) / scale)
    if not worst <= TOLERANCE:
        raise ConformanceError(f"{converted.name}: its outputs are {worst:.2g} from those of {source.name}")
    return worst
