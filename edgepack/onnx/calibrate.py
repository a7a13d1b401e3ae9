"""Calibration data: sentences of a text, images of a folder, or ready arrays, as inputs of an encoder's graph.

One sentence or image at a time and without padding, so that what is seen is what an app sends. Also runs a graph on them
and hands out what flows into chosen nodes, in passes that hold a bounded part of it. Knows nothing of quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import InputRefused, MissingError, UsageError
from edgepack.text import read_text, sentences

Feeds = list[dict[str, npt.NDArray[Any]]]

LONGEST = 256  # tokens of a sentence; what embedders are trained on, and an upper bound on the time a sentence takes
_HELD = 256 << 20  # bytes of activations held at a time
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def read_feeds(data: str | Path, source: Path, inputs: Sequence[Any], count: int, *, longest: int = LONGEST) -> Feeds:
    """Inputs for a graph from calibration data.

    Args:
        data: A text (for graphs with `input_ids`), a folder of images (`pixel_values`), or an `.npz` with one array per
            input whose first axis counts samples.
        source: Folder with the tokenizer or image processor.
        inputs: The graph's inputs: name, type and shape, as an onnxruntime session lists them.
        count: Most samples.
        longest: Tokens of a sentence; longer ones are cut.

    Returns:
        One dictionary a sample, batch 1.

    Raises:
        InputRefused: The data is of another kind, or empty.
        MissingError: Images can't be read without Pillow.
    """
    data = Path(data)
    names = {port.name for port in inputs}
    if data.suffix == ".npz":
        return _arrays(data, inputs, count)
    if "pixel_values" in names:
        return _images(data, source, count)
    if "input_ids" not in names:
        raise UsageError(
            f"the graph reads {', '.join(sorted(names))}: calibration data for it has to be an .npz with these arrays"
        )
    fixed = next((port.shape[1] for port in inputs if port.name == "input_ids"), None)
    texts = sentences(read_text(data), count)
    encodings = tokenize(source, texts, longest=min(longest, fixed) if isinstance(fixed, int) else longest)
    return [_fill(feed, inputs) for feed in encodings]


def tokenize(source: Path, texts: Sequence[str], *, longest: int) -> Feeds:
    """Token ids, mask and types of each text, [1, tokens], by the folder's own fast tokenizer.

    Raises:
        InputRefused: The folder has no tokenizer.json.
    """
    from tokenizers import Tokenizer

    path = source / "tokenizer.json"
    if not path.is_file():
        raise InputRefused(f"{source}: no tokenizer.json, which turns calibration text into tokens")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return [
        {
            "input_ids": np.array([encoding.ids], np.int64),
            "attention_mask": np.ones((1, len(encoding.ids)), np.int64),
            "token_type_ids": np.array([encoding.type_ids], np.int64),
        }
        for encoding in tokenizer.encode_batch(list(texts))
    ]


def _fill(feed: dict[str, npt.NDArray[Any]], inputs: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
    """What the graph reads of a feed; rows padded and repeated where its shape is fixed."""
    found = {}
    for port in inputs:
        if port.name not in feed:
            raise UsageError(f"the graph reads {port.name}, which no tokenizer gives; calibration data has to be .npz")
        batch, length = port.shape
        row = feed[port.name]
        if isinstance(length, int):
            row = np.pad(row, ((0, 0), (0, length - row.shape[1])))
        found[port.name] = np.repeat(row, batch, axis=0) if isinstance(batch, int) else row
    return found


def _arrays(path: Path, inputs: Sequence[Any], count: int) -> Feeds:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {port.name: archive[port.name] for port in inputs}
    except (OSError, ValueError, KeyError) as error:
        raise InputRefused(f"{path}: calibration arrays can't be read: {' '.join(str(error).split())[:200]}") from None
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise InputRefused(f"{path}: arrays of {sorted(lengths)} samples, expected one number above 0 for all")
    size = next((port.shape[0] for port in inputs if isinstance(port.shape[0], int)), 1)
    stop = min(lengths.pop(), count * size) // size * size
    return [
        {name: array[start : start + size] for name, array in arrays.items()} for start in range(0, stop, size)
    ]


def _images(folder: Path, source: Path, count: int) -> Feeds:
    if not folder.is_dir():
        raise InputRefused(f"{folder}: not a folder; expected a folder of images, or an .npz with pixel_values")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES and path.is_file())[:count]
    if not paths:
        raise InputRefused(f"{folder}: no images in it (looked for {', '.join(sorted(_IMAGES))})")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingError("reading calibration images needs Pillow", hint="pip install Pillow") from None
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    feeds = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = processor(images=image.convert("RGB"), return_tensors="np")["pixel_values"]
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputRefused(f"{path}: not an image: {' '.join(str(error).split())[:200]}") from None
        feeds.append({"pixel_values": np.asarray(pixels, np.float32)})
    return feeds


def open_session(model: Path | bytes, threads: int = 0, *, weights: Path | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: A file, or the bytes of one.
        threads: 0: all cores.
        weights: Where the external data of a model given as bytes lies.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


def activations(
    path: Path, values: Sequence[str], feeds: Feeds, *, threads: int = 0
) -> Iterator[tuple[str, list[npt.NDArray[np.float32]]]]:
    """Run a graph and hand out values inside it, one after the other.

    Args:
        path: model.onnx.
        values: Names of float32 values in the main graph.
        feeds: Inputs.
        threads: 0: all cores.

    Yields:
        Name, and one [tokens, channels] array per sample.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    waiting = list(dict.fromkeys(values))
    sizes = {name: array.nbytes for name, [array] in _run(model, path, waiting, feeds[:1]).items()}
    while waiting:
        now, held = [waiting.pop(0)], 0
        while waiting and (held := held + sizes[waiting[0]] * len(feeds)) < _HELD:
            now.append(waiting.pop(0))
        yield from _run(model, path, now, feeds, threads).items()


def _run(
    model: Any, path: Path, names: Sequence[str], feeds: Feeds, threads: int = 0
) -> dict[str, list[npt.NDArray[np.float32]]]:
    """Values inside a graph, per sample."""
    from onnx import helper

    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = open_session(model.SerializeToString(), threads, weights=path.parent)
    found: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
    for feed in feeds:
        for name, array in zip(names, session.run(list(names), feed), strict=True):
            found[name].append(array.reshape(-1, array.shape[-1]))
    return found
