"""Golden samples of ONNX artifacts: fixed inputs and what the artifact makes of them here.

They travel in `evidence/samples.jsonl`; an app on the device repeats an input and compares. Loading the artifact in its
own runtime for them is the plainest proof that the runtime takes it. Worker functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgepack.measure.samples import CONTINUATION, PROMPTS
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.runtimes.onnxruntime import Session

Array = npt.NDArray[Any]

TOKENS, IMAGE_SIDE = 16, 64  # of the fixed inputs, where the graph leaves the axis free
SHOWN = 16  # values of each output that are kept


def samples(*, artifact: str, threads: int, provider: str, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Run an encoder on fixed inputs that any language can make.

    Args:
        artifact: The `.onnx` file.
        threads: Threads of one operator.
        provider: Execution provider that must run it.
        progress: In inputs.

    Returns:
        For each input its rule (`inputs`: name -> rule, shape); of each output the shape, the first values and the
        Euclidean norm.

    Raises:
        StepError: onnxruntime can't load or run it.
        MissingError: The provider is missing.
    """
    from edgepack.runtimes.onnxruntime import Session

    session = Session(artifact, provider=provider, threads=threads)
    found = []
    for done, (feeds, rules) in enumerate(fixed_feeds(session), 1):
        outputs = session.run(feeds)
        found.append({"inputs": rules, "outputs": {name: _summary(value) for name, value in outputs.items()}})
        progress(done, 2)
    return found


def fixed_feeds(session: Session) -> Iterator[tuple[dict[str, Array], dict[str, Any]]]:
    """Inputs of batch 1 and 2 for a model, and the rules they follow; only one, of its own, for a fixed batch.

    Args:
        session: The model.
    """
    for batch in (1, 2):
        feeds, rules = {}, {}
        for port in session.inputs:
            shape = tuple(_axis(axis, batch, index, port) for index, axis in enumerate(port.shape or ()))
            feeds[port.name], rules[port.name] = _fixed(port.name, shape)
        yield feeds, rules
        if any(isinstance((port.shape or ("",))[0], int) for port in session.inputs):
            break


def _axis(axis: Any, batch: int, index: int, port: Any) -> int:
    if isinstance(axis, int):
        return axis
    if index == 0:
        return batch
    return TOKENS if len(port.shape) == 2 else IMAGE_SIDE


def _fixed(name: str, shape: tuple[int, ...]) -> tuple[Array, dict[str, Any]]:
    """An input by its rule: counting token ids, a full mask, a ramp of pixels."""
    size = int(np.prod(shape))
    if name == "input_ids":
        return (5 + np.arange(size) % 90).reshape(shape), {"rule": "5 + index mod 90", "shape": list(shape)}
    if name == "attention_mask":
        return np.ones(shape, dtype=np.int64), {"rule": "1", "shape": list(shape)}
    if name == "pixel_values":
        ramp = (np.arange(size) % 255 / 127.5 - 1).astype(np.float32)
        return ramp.reshape(shape), {"rule": "index mod 255 / 127.5 - 1", "shape": list(shape)}
    return np.zeros(shape, dtype=np.int64), {"rule": "0", "shape": list(shape)}


def _summary(value: Array) -> dict[str, Any]:
    flat = value.astype(np.float64).ravel()
    return {
        "shape": list(value.shape),
        "first": [round(float(x), 6) for x in flat[:SHOWN]],
        "norm": round(float(np.linalg.norm(flat)), 6),
    }


def generate(*, artifact: str, threads: int, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Continue the fixed prompts of `measure/samples.py` greedily, through ORT GenAI.

    Args:
        artifact: Folder with genai_config.json.
        threads: Threads of one operator.
        progress: In prompts.

    Returns:
        One dictionary a prompt: `prompt`, `prompt_ids`, `ids`, `text`.

    Raises:
        StepError: ORT GenAI can't load or run it.
    """
    from edgepack.runtimes.genai import Decoder

    found = []
    with Decoder(artifact, threads=threads, spinning=False) as decoder:
        tokenizer = decoder.tokenizer()
        for done, prompt in enumerate(PROMPTS, 1):
            prompt_ids = [int(token) for token in tokenizer.encode(prompt)]
            decoder.clear()
            decoder.feed(prompt_ids)
            ids = [decoder.step() for _ in range(CONTINUATION)]
            text = tokenizer.decode(np.asarray(ids, dtype=np.int32))
            found.append({"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids, "text": text})
            progress(done, len(PROMPTS))
    return found
