"""Proof that an exported graph computes what transformers computes, at several batch sizes, lengths and paddings.

onnxruntime on the CPU against the torch model, both float32. The shapes include those where an exporter that confused
an axis with a constant would fail: one, the length of the positions, sizes other than the traced. Padded positions of
per-token outputs are compared as well: they are computed in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import ConformanceError
from edgepack.onnx.encoders import Encoder, sample, traceable

# Largest |difference| in units of max(1, largest |output|): logits of a vocabulary reach 20, float32 has 7 digits.
# Measured over all tested families: below 5e-6 (docs/encoders.md). A wrong mask or a wrong axis gives 1e-2 and more.
MAX_DIFFERENCE = 1e-4
_LONGEST = 96  # tokens; longer ones cost time and find nothing more
_SEED = 20_259


def compare(encoder: Encoder, path: Path, fixed: Mapping[str, int]) -> dict[str, Any]:
    """Run the graph and the model on the same random inputs.

    Args:
        encoder: The loaded model.
        path: model.onnx.
        fixed: Length of every axis that was fixed at export.

    Returns:
        `max_abs_diff` (largest absolute difference of any output), `shapes` (what was compared).

    Raises:
        ConformanceError: They differ, or the graph gives something else than numbers; says at which input and output.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    reference = traceable(encoder, exact=True)
    worst, shapes = 0.0, []
    for number, (sizes, padded) in enumerate(cases(encoder, fixed)):
        inputs = sample(encoder, sizes, _SEED + number, padded=padded)
        with torch.no_grad():
            expected = reference(*inputs)
        feeds = {name: tensor.numpy() for name, tensor in zip(encoder.inputs, inputs, strict=True)}
        found = session.run(list(encoder.task.outputs), feeds)
        where = ", ".join(f"{axis} {length}" for axis, length in sizes.items()) or "fixed shape"
        for name, ours, theirs in zip(encoder.task.outputs, found, expected, strict=True):
            worst = max(worst, _difference(name, np.asarray(ours), theirs.numpy(), f"{path.name}: at {where}"))
        shapes.append(dict(sizes))
    return {"max_abs_diff": worst, "shapes": shapes}


def _difference(name: str, ours: Any, theirs: Any, where: str) -> float:
    if ours.shape != theirs.shape:
        raise ConformanceError(
            f"{where}: output {name} has shape {list(ours.shape)}; transformers gives {list(theirs.shape)}"
        )
    difference = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0))
    allowed = MAX_DIFFERENCE * max(1.0, float(np.abs(theirs).max(initial=0.0)))
    if not difference <= allowed:  # NaN is not
        raise ConformanceError(
            f"{where}: output {name} differs from transformers by {difference:.3g}, at most {allowed:.3g} is allowed",
            hint="The graph does not compute what the model computes; please report the model.",
        )
    return difference


def cases(encoder: Encoder, fixed: Mapping[str, int]) -> Iterator[tuple[dict[str, int], tuple[int, ...]]]:
    """Sizes of every free or fixed axis, and tokens per row, to compare at.

    Args:
        encoder: The model, for the axes it has and its longest input.
        fixed: Axes with one length only.

    Yields:
        (axis -> length, tokens of each row or nothing for no padding).
    """
    if "pixel_values" in encoder.inputs:
        for batch, height, width in ((1, 64, 64), (3, 96, 64), (2, 65, 131)):
            sizes = {"batch": batch, "height": height, "width": width} | dict(fixed)
            yield _used(encoder, sizes), ()
        return
    longest = min(encoder.max_sequence or _LONGEST, _LONGEST)
    for batch, wanted in ((1, 1), (1, 9), (2, longest), (3, 17), (5, 4)):
        sizes = {"batch": batch, "sequence": min(wanted, longest)} | dict(fixed)
        rows, length = sizes["batch"], sizes["sequence"]
        # Row 0 is full, the others get shorter and shorter.
        yield _used(encoder, sizes), tuple(max(1, length - row * max(1, length // 3)) for row in range(rows))


def _used(encoder: Encoder, sizes: Mapping[str, int]) -> dict[str, int]:
    axes = {axis for shape in encoder.inputs.values() for axis in shape}
    return {axis: length for axis, length in sizes.items() if axis in axes}
