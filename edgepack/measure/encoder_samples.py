"""Inputs an encoder is measured on: sentences of the evaluation text as each task wants them, or images.

Sentences are encoded by tokenizer.json, as an app does it. Two sentences make a pair for rerankers (a query and a
passage) and for question answering (a question and a context of four more sentences); one token of each sentence is
hidden for fill-mask. Images are a user's own, ready for the model, or synthetic: smooth random fields with edges in
them, of zero mean and unit variance, the same in every run. Synthetic images show what the numbers do, not what a
camera sees: their rows say so. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.conform.tokens import load_tokenizer
from edgepack.errors import InputRefused
from edgepack.strict_json import parse_object
from edgepack.text import sentences

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]

CONTEXT_SENTENCES = 4  # of a question's context: some 100 tokens, far from any model's limit
MAX_TOKENIZER = 64 << 20  # bytes of tokenizer.json; the largest in use have 33 MB
MAX_IMAGES = 1 << 30  # bytes of a user's array of images
SEED = 20240501


@dataclass(frozen=True)
class Sample:
    """One input of the model.

    Args:
        inputs: `[1, tokens]` int64 ids, mask and types, or `pixel_values` `[1, channels, height, width]` float32.
        place: Of the token that was hidden, for fill-mask; None otherwise.
    """

    inputs: Inputs
    place: int | None = None


def text_samples(
    task: str, content: str, count: int, tokenizer: Path, *, longest: int, pairs: bool = False
) -> list[Sample]:
    """Sentences of a text as inputs of a task.

    Args:
        task: Its name, see `edgepack/onnx/tasks.py`.
        content: The evaluation text.
        count: Most sentences.
        tokenizer: tokenizer.json, with the model's settings of special tokens beside it.
        longest: Most tokens of an input.
        pairs: Text classification of two texts: a query and a passage.

    Raises:
        InputRefused: Fewer than two sentences, no tokenizer.json, or no mask token for fill-mask.
    """
    engine, mask = read_tokenizer(tokenizer), mask_token(tokenizer) if task == "fill-mask" else None
    engine.enable_truncation(longest)
    texts = sentences(content, count)
    found = []
    for index, text in enumerate(texts):
        if task == "question-answering":
            around = [texts[(index + step) % len(texts)] for step in range(1, 1 + CONTEXT_SENTENCES)]
            encoding = engine.encode(text, " ".join(around))
        elif pairs:
            encoding = engine.encode(text, texts[(index + 1) % len(texts)])
        else:
            encoding = engine.encode(text)
        found.append(_sample(encoding, None if mask is None else int(engine.token_to_id(mask))))
    return found


def _sample(encoding: Any, mask: int | None) -> Sample:
    ids = np.array([encoding.ids], dtype=np.int64)
    place = None
    if mask is not None:
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special] or [0]
        place = own[len(own) // 2]
        ids[0, place] = mask
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.array([encoding.type_ids], dtype=np.int64),
    }
    return Sample(inputs, place)


def read_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads.

    Raises:
        InputRefused: The file is missing, too large, or not a tokenizer.
    """
    if not path.is_file():
        raise InputRefused(
            f"{path}: not a file", hint="Save the model with a fast tokenizer: it writes tokenizer.json."
        )
    if path.stat().st_size > MAX_TOKENIZER:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes, at most {MAX_TOKENIZER} expected")
    return load_tokenizer(parse_object(path.read_bytes(), str(path)), str(path))


def mask_token(tokenizer: Path) -> str:
    """The text of the mask token, from the files beside tokenizer.json."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = tokenizer.parent / name
        if path.is_file():
            entry = parse_object(path.read_bytes(), str(path)).get("mask_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                return text
    raise InputRefused(
        f"{tokenizer.parent}: neither tokenizer_config.json nor special_tokens_map.json has a mask_token"
    )


def image_samples(images: str | None, count: int, shape: Sequence[int]) -> list[Sample]:
    """Images as inputs.

    Args:
        images: `.npy` file with a float32 array `[n, channels, height, width]` as the model's preprocessor gives it;
            None makes synthetic ones.
        count: Most images.
        shape: `(channels, height, width)` that the model takes.

    Raises:
        InputRefused: The file is not such an array.
    """
    pixels = _synthetic(count, tuple(shape)) if images is None else _read(Path(images), count, tuple(shape))
    return [Sample({"pixel_values": pixels[index : index + 1]}) for index in range(len(pixels))]


def _read(path: Path, count: int, shape: tuple[int, ...]) -> Array:
    if not path.is_file() or path.stat().st_size > MAX_IMAGES:
        raise InputRefused(f"{path}: not a file of at most {MAX_IMAGES} bytes")
    try:
        pixels = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputRefused(f"{path}: not an array of numpy (.npy): {' '.join(str(error).split())[:200]}") from None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.float32 or pixels.shape[1:] != shape or len(pixels) < 2:
        found = getattr(pixels, "shape", type(pixels).__name__)
        raise InputRefused(f"{path}: found {found}, expected a float32 array of at least 2 images of shape {shape}")
    if not np.isfinite(pixels).all():
        raise InputRefused(f"{path}: NaN or infinite pixels")
    return np.asarray(pixels[:count])


def _synthetic(count: int, shape: tuple[int, ...]) -> Array:
    """Random fields on grids of 4, 8 and 16 points, enlarged, the finest in steps so that there are edges."""
    generator = np.random.default_rng(SEED)
    channels, height, width = shape
    pixels = np.zeros((count, channels, height, width), dtype=np.float32)
    for points, strength in ((4, 1.0), (8, 0.7), (16, 0.5)):
        field = generator.standard_normal((count, channels, points, points)).astype(np.float32)
        pixels += strength * _enlarged(field, height, width, smooth=points < 16)
    pixels -= pixels.mean(axis=(2, 3), keepdims=True)
    scaled: Array = pixels / np.maximum(pixels.std(axis=(2, 3), keepdims=True), 1e-6)
    return scaled


def _enlarged(field: Array, height: int, width: int, *, smooth: bool) -> Array:
    """`[n, channels, points, points]` to height and width, linearly between points or in steps."""
    for axis, size in ((2, height), (3, width)):
        points = field.shape[axis]
        at = np.linspace(0, points - 1, size)
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, points - 1)
        part = (at - low).astype(np.float32) if smooth else np.zeros(size, np.float32)
        part = part[:, None] if axis == 2 else part
        field = field.take(low, axis) * (1 - part) + field.take(high, axis) * part
    return field
