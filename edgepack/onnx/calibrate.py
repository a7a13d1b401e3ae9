"""Calibration data as inputs of an encoder's graph, and what flows through the graph when it reads them.

One sentence or image at a time and without padding, so that what is seen is what an app sends. A graph is run in
passes, each of which hands out as many inner values as fit in memory. Knows nothing of quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import StepError, UsageError
from edgepack.measure.encoder_fidelity import padded
from edgepack.measure.encoder_samples import Sample, image_samples, text_samples
from edgepack.onnx.graph import Port
from edgepack.runtimes.onnxruntime import CPU, bindings, native_errors, reason
from edgepack.text import read_text

Floats = npt.NDArray[np.float32]
Feed = dict[str, npt.NDArray[Any]]

# Tokens of a sample. What embedders are trained on, more than any sentence has, and a bound on what a sample takes.
LONGEST = 256
_HELD = 256 << 20  # bytes of activations held at a time


def read_samples(
    data: str | None, source: Path, inputs: Sequence[Port], count: int, *, task: str, pairs: bool = False
) -> list[Sample]:
    """Samples for a graph, as `measure/encoder_samples.py` makes them for measuring.

    Args:
        data: A UTF-8 text, or `.npy` with preprocessed images for graphs that read images; None: synthetic images.
        source: Folder of tokenizer.json.
        inputs: The graph's inputs.
        count: Most samples.
        task: What the graph does: it decides how sentences are put together.
        pairs: For classifiers of two texts.

    Raises:
        InputRefused: The data is of another kind, or empty; there is no tokenizer.
        UsageError: The graph reads neither texts nor images; a text model got no text.
    """
    ports = {port.name: port for port in inputs}
    if "pixel_values" in ports:
        shape = (ports["pixel_values"].shape or ())[1:]
        height, width = (side if isinstance(side, int) else 224 for side in shape[1:])  # convolutional: any size
        channels = shape[0] if isinstance(shape[0], int) else 3
        return image_samples(data, count, (channels, height, width))
    if "input_ids" not in ports:
        raise UsageError(f"the graph reads {', '.join(sorted(ports))}; expected input_ids or pixel_values")
    if data is None:
        raise UsageError("calibrating a text model needs a text", hint="Give one with --calibration.")
    fixed = (ports["input_ids"].shape or (None, None))[1]
    longest = min(LONGEST, fixed) if isinstance(fixed, int) else LONGEST
    return text_samples(task, read_text(data), count, source / "tokenizer.json", longest=longest, pairs=pairs)


def feed(sample: Sample, inputs: Sequence[Port]) -> Feed:
    """What a graph reads of a sample; rows repeated and tokens padded where its shape is fixed."""
    return padded(sample.inputs, inputs)


def activations(
    path: Path, values: Sequence[str], feeds: Sequence[Mapping[str, Any]], *, threads: int
) -> Iterator[tuple[str, list[Floats]]]:
    """Run a graph and hand out values inside it, one after the other.

    Args:
        path: model.onnx.
        values: Names of float32 values in the main graph.
        feeds: Inputs.
        threads: Of one operator.

    Yields:
        Name, and one [tokens, channels] array per feed.

    Raises:
        StepError: onnxruntime fails.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    waiting = list(dict.fromkeys(values))
    sizes = {name: arrays[0].nbytes for name, arrays in _run(model, path, waiting, feeds[:1], threads).items()}
    while waiting:
        now = [waiting.pop(0)]
        held = sizes[now[0]] * len(feeds)
        while waiting and held + sizes[waiting[0]] * len(feeds) <= _HELD:
            now.append(waiting.pop(0))
            held += sizes[now[-1]] * len(feeds)
        yield from _run(model, path, now, feeds, threads).items()


def _run(
    model: Any, path: Path, names: Sequence[str], feeds: Sequence[Mapping[str, Any]], threads: int
) -> dict[str, list[Floats]]:
    """Values inside a graph, per feed. The graph goes to onnxruntime as bytes; its external data stays in its file."""
    from onnx import helper

    if not names:
        return {}
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    api: Any = bindings()
    options = api.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = api.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        found: dict[str, list[Floats]] = {name: [] for name in names}
        for one in feeds:
            for name, array in zip(names, session.run(list(names), dict(one)), strict=True):
                found[name].append(array.reshape(-1, array.shape[-1]))
    except native_errors() as error:
        raise StepError(f"{path.name}: onnxruntime can't run it for calibration: {reason(error)}") from error
    return found
