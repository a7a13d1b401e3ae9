"""What each tensor's quantization costs, for every type it may be stored in, in nats per token.

The error d of a row of weights changes an output by d . x. With H = E[x x^T] of the inputs and g the mean squared
gradient of that output (`statistics.py`), the divergence this causes is

    cost = 1/2 sum over rows n of  g_n  d_n H d_n^T

to second order, errors of different tensors taken as independent. That needs no forward pass for a tensor or a type:
one pass with gradients over a few windows prices all of them, at three forward passes a window. What the sum
leaves out is of the same kind everywhere, so that ranking holds (measured: docs/allocation.md).

Errors are those of the encoder that will write the tensor, column feedback included, on rows sampled evenly over it: a
cost is scaled from the sample by the rows' own weighted size. An embedding that is looked up adds the error of what is
looked up, weighed by the gradient of the embedding's output.

Works on the rows of the GGUF; needs no transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.calibrate.moments import Moments, open_moments
from edgepack.errors import StepError
from edgepack.gguf import ggml
from edgepack.gguf.blocks import SCALAR, dequantize
from edgepack.gguf.feedback import quantize_rows_with_feedback
from edgepack.gguf.model import TensorSpec, describe
from edgepack.gguf.types import TYPES, GgmlType, row_bytes
from edgepack.worker import Progress, no_progress

# Rows a tensor is priced on. Costs of 256 rows lie within 3 % of those of all (docs/allocation.md).
SAMPLED_ROWS = 256
_RUN = 16  # rows read together: what a tensor is sampled in, unless a transform wants more

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Sample:
    """Rows of a tensor, and what makes them stand for all of it."""

    rows: Floats
    weights: npt.NDArray[np.float64]  # of each row's d H d^T, scaled to the whole tensor
    lookups: float  # of the mean over rows of sum_j look_j d_j^2


def sensitivity(
    *,
    model: str,
    statistics: str,
    kinds: Sequence[str],
    feedback: bool,
    threads: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Price every matrix of a model in every type.

    Args:
        model: Checkpoint folder.
        statistics: Folder that `collect` filled.
        kinds: Names of types; one whose block does not divide a tensor's width is left out for it.
        feedback: Price the types that column feedback can write as written with it.
        threads: Tensors priced at a time.
        progress: In weights priced.

    Returns:
        `costs`: tensor -> type -> nats per token; `plain`: the same without feedback.

    Raises:
        StepError: A tensor has no statistics.
    """
    spec = describe(Path(model))
    known = open_moments(Path(statistics))
    tensors = [tensor for tensor in spec.tensors if not tensor.keep_f32]
    total = sum(min(tensor.rows, SAMPLED_ROWS) * tensor.width for tensor in tensors) * len(kinds)
    price = partial(_price, known=known, kinds=[TYPES[name] for name in kinds], feedback=feedback, tied=spec.tied)
    costs: dict[str, dict[str, float]] = {}
    plain: dict[str, dict[str, float]] = {}
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for tensor, found in zip(tensors, pool.map(price, tensors), strict=True):
            costs[tensor.name] = {name: values[1] for name, values in found.items()}
            plain[tensor.name] = {name: values[0] for name, values in found.items()}
            done += min(tensor.rows, SAMPLED_ROWS) * tensor.width * len(kinds)
            progress(done, total)
    return {"costs": costs, "plain": plain, "sampled_rows": SAMPLED_ROWS}


def _price(
    tensor: TensorSpec, *, known: Moments, kinds: Sequence[GgmlType], feedback: bool, tied: bool
) -> dict[str, tuple[float, float]]:
    """Type -> cost as ggml writes it, cost as it will be written."""
    table = tensor.name == "token_embd.weight"
    if not table and tensor.name not in known:
        raise StepError(f"{tensor.name}: no calibration statistics; they are of another model")
    multiplied = tensor.name in known
    sample = _sample(tensor, known, multiplied=multiplied, table=table)
    importance = known.importance(tensor.name) if multiplied else None
    out: dict[str, tuple[float, float]] = {}
    for kind in kinds:
        if tensor.width % kind.block or (importance is None and kind.name in ggml.ABORTS_WITHOUT_IMATRIX):
            continue
        data = np.empty(len(sample.rows) * row_bytes(kind, tensor.width), dtype=np.uint8)
        saved = 1.0  # ggml's cost over that with feedback
        if feedback and multiplied and kind.name in SCALAR:
            inputs = known.feedback(tensor.name)
            damped = quantize_rows_with_feedback(
                sample.rows, kind, data, importance, inputs.factor, inputs.order,
                moments=inputs.moments, damping=inputs.damping,
            )  # fmt: skip
            before, after = sample.weights @ damped
            saved = before / after if after > 0 else 1.0
        else:
            ggml.quantize_rows(sample.rows, kind, data, importance)
        error = dequantize(data.reshape(len(sample.rows), -1), kind, tensor.width) - sample.rows
        cost = float(sample.weights @ known.quadratic(tensor.name, error)) if multiplied else 0.0
        looked = sample.lookups * float(np.square(error, dtype=np.float64).mean(axis=0) @ known.lookups) if table else 0
        out[kind.name] = float(saved * cost + looked), cost + looked
    return out


def _sample(tensor: TensorSpec, known: Moments, *, multiplied: bool, table: bool) -> _Sample:
    places = list(_places(tensor))
    rows = np.concatenate([np.asarray(tensor.read(start, stop), dtype=np.float32) for start, stop in places])
    if not multiplied:
        return _Sample(rows, np.zeros(len(rows)), 0.5)
    gradient = known.gradient(tensor.name).astype(np.float64)
    taken = gradient[np.concatenate([np.arange(start, stop) for start, stop in places])]
    # The sample stands for all rows in proportion to their gradients.
    scale = gradient.sum() / taken.sum() if taken.sum() > 0 else tensor.rows / len(rows)
    return _Sample(np.ascontiguousarray(rows), 0.5 * taken * scale, 0.5 if table else 0.0)


def _places(tensor: TensorSpec) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop), spread evenly, of `SAMPLED_ROWS` rows in all or the whole tensor."""
    run = max(_RUN, tensor.row_block)
    runs = -(-tensor.rows // run)
    wanted = min(runs, max(1, SAMPLED_ROWS // run))
    for k in range(wanted):
        start = (k * runs // wanted) * run
        yield start, min(start + run, tensor.rows)
