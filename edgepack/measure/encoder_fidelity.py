"""How much of an encoder an ONNX model keeps: cosines and neighbours of vectors, labels of classifiers.

Every sample is one input of batch size one, as an app gives it (dynamic quantization takes its scales from the whole
batch, so a larger one would measure something else), encoded once and handed to both: the source in transformers,
float32, and the model in onnxruntime on the provider that was asked for. The 95 % intervals come from a bootstrap over
samples (see `bootstrap.py`). Runs in a worker.

What is measured depends on the task:

    feature-extraction, sentence-similarity   cosine_mean, cosine_p01, neighbour_agreement of vectors; hidden states
                                              are averaged over tokens (over positions, of images)
    text-, image-classification               label_agreement: the same most likely class
    text-classification with one score        rank_agreement: share of pairs of inputs put in the same order
    token-classification                      label_agreement over tokens
    question-answering                        label_agreement: the same first and last token of the answer
    fill-mask                                 label_agreement: the same token at the hidden place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import ConformanceError, InputRefused, UsageError
from edgepack.measure import bootstrap
from edgepack.measure.bootstrap import Estimate
from edgepack.measure.cosine import vector_estimates
from edgepack.measure.encoder_samples import Sample, image_samples, text_samples
from edgepack.measurement import Measurement
from edgepack.onnx.encoders import image_size, load, traceable
from edgepack.onnx.graph import Port
from edgepack.onnx.tasks import task_of
from edgepack.runtimes.onnxruntime import CPU, NO_SPINNING, Session
from edgepack.text import default_evaluation_text, read_text, text_sha256
from edgepack.worker import Progress, no_progress

VECTORS = ("feature-extraction", "sentence-similarity")
LONGEST = 512  # tokens of an input; sentences of the evaluation text have far fewer

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Outputs = Sequence[Array]


def encoder_fidelity(
    *,
    reference: str,
    candidate: str,
    task: str | None,
    text: str | None = None,
    images: str | None = None,
    samples: int,
    threads: int,
    provider: str = CPU,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure an ONNX encoder against its source (worker function).

    Args:
        reference: The source folder.
        candidate: The `.onnx` file, or a folder with exactly one.
        task: Task it was exported for; None: what the source was made for.
        text: Path of a UTF-8 text; None takes edgepack's own. Unused for images.
        images: `.npy` of preprocessed images; None makes synthetic ones. Unused for texts.
        samples: Most sentences or images.
        threads: Threads for both engines.
        provider: Execution provider that must run the model.
        progress: In samples, over both engines.

    Returns:
        `rows`, `samples`, `task`, `text_sha256` (texts only), and the `settings` of the runtime.

    Raises:
        InputRefused: Source, model, text or images are unsound.
        UsageError: The source has no head for the task.
        MissingError: The provider is missing.
        ConformanceError: Outputs of another shape, or NaN that the source does not give.
        StepError: One of the engines fails.
    """
    import torch

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(Path(reference))
    chosen = task_of(checkpoint.config, checkpoint.path, task)
    encoder = load(checkpoint, chosen)
    session = Session(model_file(candidate), provider=provider, threads=threads, config=NO_SPINNING)
    single = chosen.name == "text-classification" and int(encoder.config.num_labels) == 1
    facts: dict[str, Any] = {}
    if "pixel_values" in encoder.inputs:
        shape = (int(encoder.config.num_channels), *image_size(checkpoint, encoder.config))
        inputs = image_samples(images, samples, shape)
        what = "synthetic images" if images is None else "images"
    else:
        content = read_text(default_evaluation_text() if text is None else text)
        facts["text_sha256"] = text_sha256(content)
        longest = min(encoder.max_sequence or LONGEST, fixed_length(session.inputs) or LONGEST, LONGEST)
        tokenizer = checkpoint.path / "tokenizer.json"
        inputs = text_samples(chosen.name, content, samples, tokenizer, longest=longest, pairs=single)
        what = "sentences"
    module, names = traceable(encoder, exact=True), list(encoder.inputs)

    def by_source(sample: Sample) -> Outputs:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(sample.inputs[name]) for name in names))
        return [np.asarray(value.float().numpy()) for value in found]

    results = []
    for number, sample in enumerate(inputs, 1):
        theirs = by_source(sample)
        pair = theirs, by_model(sample, session, chosen.outputs, [output.shape for output in theirs])
        results.append(reduced(chosen.name, single, sample, *_checked(pair, chosen.outputs, number, session)))
        progress(number, len(inputs))
    measured = estimates(chosen.name, single, results)
    note = f"{len(inputs)} {what} against the source in transformers"
    rows = [
        Measurement(name, estimate.value, "1", n=n, ci95=estimate.ci95, note=note)
        for name, (estimate, n) in measured.items()
    ]
    facts |= {"rows": [row.as_json() for row in rows], "samples": len(inputs), "task": chosen.name}
    return facts | {"settings": session.settings}


def model_file(candidate: str) -> Path:
    """The model of a folder, or the file itself.

    Raises:
        InputRefused: The folder has no `.onnx` file, or several and none of them is `model.onnx`.
    """
    path = Path(candidate)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.onnx"))
    if (path / "model.onnx") in found:
        return path / "model.onnx"
    if len(found) != 1:
        raise InputRefused(f"{path}: {len(found)} .onnx files, expected model.onnx or a single one")
    return found[0]


def fixed_length(ports: Sequence[Port]) -> int | None:
    """Tokens of every input, where the graph takes one number only."""
    shape = next((port.shape for port in ports if port.name == "input_ids"), None)
    return shape[1] if shape is not None and len(shape) == 2 and isinstance(shape[1], int) else None


def by_model(
    sample: Sample, session: Session, outputs: Sequence[str], shapes: Sequence[tuple[int, ...] | None] | None = None
) -> Outputs:
    """One sample through an ONNX model.

    Args:
        sample: The input.
        session: The model.
        outputs: Names of the outputs wanted.
        shapes: What they are without padding; None for a graph that was padded to nothing.

    Returns:
        The outputs, without the rows and tokens that fixed shapes added.

    Raises:
        ConformanceError: The model has no such output.
    """
    missing = set(outputs) - {port.name for port in session.outputs}
    if missing:
        raise ConformanceError(f"{session.path.name}: has no output {min(missing)}; it was exported for another task")
    feeds = padded(sample.inputs, session.inputs)
    found = session.run(feeds, outputs)
    own, fed = (inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 for inputs in (sample.inputs, feeds))

    def trimmed(array: Array, shape: tuple[int, ...] | None) -> Array:
        """Without the rows and tokens that `padded` added; an embedding may be as wide as the input is long."""
        tokens = fed > own and array.ndim > 1 and array.shape[1] == fed and (shape is None or shape[1] == own)
        return np.asarray(array[:1, :own] if tokens else array[:1])

    known = [None] * len(outputs) if shapes is None else shapes
    return [trimmed(found[name], shape) for name, shape in zip(outputs, known, strict=True)]


def padded(inputs: Mapping[str, Array], ports: Sequence[Port]) -> dict[str, Array]:
    """Inputs as a graph takes them: rows repeated and tokens padded where its shapes are fixed, its element types.

    Raises:
        UsageError: An input is longer than the graph takes.
    """
    found: dict[str, Array] = {}
    for port in ports:
        if port.name not in inputs:
            raise InputRefused(f"the model wants an input {port.name}; known are {', '.join(inputs)}")
        array = inputs[port.name]
        shape = port.shape or (None,) * array.ndim
        wanted = [size if isinstance(size, int) else have for size, have in zip(shape, array.shape, strict=True)]
        if any(size < have for size, have in zip(wanted, array.shape, strict=True)):
            raise UsageError(f"input {port.name}: shape {list(array.shape)} does not fit in the model's {wanted}")
        if wanted != list(array.shape):
            # Rows are repeated, so that none is all padding; ids, mask and types of padding are 0 in every BERT-like
            # model, and what the mask hides does not matter.
            array = np.repeat(array, wanted[0], axis=0) if array.shape[0] == 1 else array
            array = np.pad(array, [(0, size - have) for size, have in zip(wanted, array.shape, strict=True)])
        found[port.name] = np.ascontiguousarray(array, dtype=np.dtype(port.type))
    return found


def _checked(
    pair: tuple[Outputs, Outputs], names: Sequence[str], number: int, session: Session
) -> tuple[Outputs, Outputs]:
    """Both sides, of one shape and finite."""
    found = []
    for name, theirs, ours in zip(names, *pair, strict=True):
        if theirs.shape != ours.shape:
            raise ConformanceError(
                f"{session.path.name}: output {name} has shape {list(ours.shape)}, the source's {list(theirs.shape)}"
            )
        if not np.isfinite(ours).all():
            whose = "the model" if np.isfinite(theirs).all() else "the source too"
            raise ConformanceError(f"{session.path.name}: NaN or infinite {name} for sample {number}, from {whose}")
        found.append(ours.astype(np.float32))
    return pair[0], found


def reduced(task: str, single: bool, sample: Sample, theirs: Outputs, ours: Outputs) -> tuple[Array, Array]:
    """What one sample leaves: two vectors, two scores, or the labels of both sides. Whole outputs are not kept."""
    if task in VECTORS:
        return _vector(theirs[0]), _vector(ours[0])
    if single:
        return theirs[0].reshape(1), ours[0].reshape(1)
    if task == "question-answering":  # the answer is one label: its first and last token together
        a, b = ([int(output.argmax()) for output in side] for side in (theirs, ours))
        return np.array([a[0] * LONGEST + a[1]]), np.array([b[0] * LONGEST + b[1]])
    a, b = theirs[0][0], ours[0][0]
    if task == "fill-mask":
        a, b = a[sample.place], b[sample.place]
    return np.atleast_1d(a.argmax(axis=-1)), np.atleast_1d(b.argmax(axis=-1))


def estimates(task: str, single: bool, results: Sequence[tuple[Array, Array]]) -> dict[str, tuple[Estimate, int]]:
    """Row name -> estimate and the number of things it rests on."""
    if task in VECTORS:
        source, found = (np.stack([result[side] for result in results]) for side in (0, 1))
        return {name: (estimate, len(results)) for name, estimate in vector_estimates(source, found).items()}
    if single:
        scores = [np.array([float(result[side][0]) for result in results]) for side in (0, 1)]
        return {"rank_agreement": (_rank_agreement(*scores), len(results) * (len(results) - 1) // 2)}
    same = [a == b for a, b in results]
    hits = np.array([one.sum() for one in same], dtype=np.float64)
    counts = np.array([one.size for one in same], dtype=np.float64)
    return {"label_agreement": (bootstrap.ratio(hits, counts), int(counts.sum()))}


def _vector(output: Array) -> Array:
    """One vector of an output: itself `[1, width]`, the mean of `[1, tokens, width]` or of `[1, width, high, wide]`."""
    row: Array = output[0]
    if row.ndim == 1:
        return row
    return np.asarray(row.mean(axis=0) if row.ndim == 2 else row.mean(axis=tuple(range(1, row.ndim))))


def _rank_agreement(source: Floats, found: Floats) -> Estimate:
    """Share of pairs of samples that both scores order alike: (Kendall's tau + 1) / 2; ties in both are kept."""
    same = np.sign(source[:, None] - source[None]) == np.sign(found[:, None] - found[None])
    upper = np.triu(np.ones_like(same), 1)
    value = float(same[upper].mean())
    weights = bootstrap.draws(len(source)).astype(np.float64)
    kept = ((weights @ (same & upper)) * weights).sum(axis=1)
    # A sample drawn twice makes a pair with itself, which has no order: those are left out on both sides.
    total = ((weights @ upper.astype(np.float64)) * weights).sum(axis=1)
    return bootstrap.estimate(value, kept / total, len(source))
