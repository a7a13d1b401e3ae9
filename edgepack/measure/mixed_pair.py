"""Two packages of one model side by side where at least one is ONNX: as `pair.py`, in whatever runtimes they need.

Decoders: one text, one tokenization, one set of windows; a GGUF in llama.cpp, an ONNX package in ORT GenAI, the source
in transformers, float32. Encoders: one set of inputs of batch size one, from the tokenizer that both share. Differences
are paired, by window or by sample. What can't be the same for both is refused: other tokens, another vocabulary,
outputs of another shape. Worker functions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import ConformanceError, InputRefused
from edgepack.measure import bootstrap
from edgepack.measure.divergence import Scores, score
from edgepack.measure.encoder_fidelity import LONGEST, by_model, estimates, fixed_length, reduced
from edgepack.measure.encoder_samples import Sample, image_samples, text_samples
from edgepack.measure.fidelity import join, open_model
from edgepack.measure.onnx_fidelity import source_tokens
from edgepack.measure.pair import pair_rows, shown
from edgepack.onnx.tasks import TASKS
from edgepack.runtimes.onnxruntime import CPU, NO_SPINNING, Session
from edgepack.text import read_text
from edgepack.text import windows as cut
from edgepack.worker import Progress, no_progress

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Logits = Callable[[Sequence[int], int, int], Floats]
Outputs = Sequence[Array]
TURNS = 20  # timed runs of each encoder, after a fifth as many warm-ups


def decoders(
    *,
    first: str,
    second: str,
    source: str | None,
    text: str,
    windows: int,
    window_tokens: int,
    threads: int,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measure two decoders on the same windows.

    Args:
        first: A: a GGUF, or a folder with genai_config.json.
        second: B.
        source: Folder of the source model; None holds B against A.
        text: Path of the evaluation text.
        windows: Most windows.
        window_tokens: Tokens per window.
        threads: Threads of every engine.
        progress: In windows.

    Returns:
        Rows as `pair.pair` gives them.

    Raises:
        ConformanceError: They tokenize the text differently, have other vocabularies, or one gives NaN.
        InputRefused: The text is too short.
    """
    content = read_text(text)
    parts: list[tuple[Scores, Scores]] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        sides = [_open(stack, path, content, window_tokens, threads) for path in (first, second)]
        tokens, bos = sides[0][1], sides[0][2]
        reference: Logits | None = None
        if source is not None:
            from edgepack.measure.source_model import SourceDecoder

            tokens, bos = source_tokens(Path(source), content)
            reference = SourceDecoder(source, threads=threads).logits
        for path, (_, theirs, start) in zip((first, second), sides, strict=True):
            _same_tokens(Path(path).name, tokens, theirs)
            if start != bos:
                raise ConformanceError(f"{Path(path).name} starts a text with token {start}, the other with {bos}")
        pieces = cut(tokens, window_tokens, windows)
        begin, stop = window_tokens // 2, window_tokens - 1
        for done, ids in enumerate(pieces, 1):
            fed = ids if bos is None else [bos, *ids[1:]]
            found = [logits(fed, begin, stop) for logits, _, _ in sides]
            expected = None if reference is None else reference(fed, begin, stop)
            _same_shape(found if expected is None else [*found, expected])
            targets = np.array(ids[begin + 1 : stop + 1], dtype=np.int64)
            a = score(found[0].copy(), targets, reference=None if expected is None else expected.copy(), pool=pool)
            b = score(
                found[1].copy(), targets, reference=np.array(found[0] if expected is None else expected), pool=pool
            )
            parts.append((a, b))
            progress(done, len(pieces))
    a, b = (join([part[side] for part in parts]) for side in (0, 1))
    return pair_rows(a, b, stop - begin)


def _open(
    stack: ExitStack, path: str, content: str, window_tokens: int, threads: int
) -> tuple[Logits, list[int], int | None]:
    """An artifact's logits, its tokens of the text, and the token it starts a text with."""
    if not Path(path).is_dir():
        model = open_model(stack, path, window_tokens, threads)

        def of_gguf(ids: Sequence[int], first: int, stop: int) -> Floats:
            found: Floats = model.logits([list(ids)], first, stop=stop)[0]
            return np.array(found)

        tokens = model.tokenize(content, add_special=True, parse_special=False)
        return of_gguf, tokens, model.bos if model.add_bos else None
    from edgepack.runtimes.genai import Decoder

    decoder = stack.enter_context(Decoder(path, context=window_tokens, threads=threads, spinning=False))
    own, start = source_tokens(Path(path), content)
    return decoder.logits, own, start


def _same_tokens(name: str, tokens: Sequence[int], theirs: Sequence[int]) -> None:
    if list(tokens) == list(theirs):
        return
    place = next((i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b), None)
    place = min(len(tokens), len(theirs)) if place is None else place
    raise ConformanceError(
        f"{name} tokenizes the evaluation text differently from token {place} on: {list(theirs[place : place + 4])}, "
        f"expected {list(tokens[place : place + 4])}",
        hint="Windows would not be the same: the two are not of one model.",
    )


def _same_shape(found: Sequence[Floats]) -> None:
    widths = [array.shape[1] for array in found]
    if len(set(widths)) > 1:
        raise ConformanceError(f"logits have {' and '.join(map(str, widths))} values: not of one model")


def encoders(
    *,
    first: str,
    second: str,
    source: str | None,
    tokenizer: str | None,
    longest: int | None,
    task: str,
    text: str,
    samples: int,
    threads: int,
    speed: bool,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measure two encoders on the same inputs.

    Args:
        first: A: an `.onnx` file, or a GGUF of an embedder.
        second: B.
        source: Folder of the source model; None holds B against A.
        tokenizer: tokenizer.json of both; None for images.
        longest: Most tokens of an input that both take; None where nothing says it.
        task: What they were made for.
        text: Path of the evaluation text.
        samples: Most sentences or images.
        threads: Threads of every engine.
        speed: Time both, in turns.
        progress: In samples.

    Returns:
        Rows `{name, unit, a, b, n, difference?}`; `difference` is B - A as `{value, ci95}`, paired by sample.

    Raises:
        ConformanceError: Outputs of another shape, or NaN.
        InputRefused: The text is too short, or a GGUF for a task that it can't have.
    """
    with ExitStack() as stack:
        sides = [_encoder(stack, path, task, threads) for path in (first, second)]
        ports = [port for _, session in sides if session is not None for port in session.inputs]
        single = any(
            port.shape is not None and port.shape[-1] == 1
            for _, session in sides
            if session is not None
            for port in session.outputs
        )
        single = single and task == "text-classification"
        reference = None if source is None else _source(source, task, threads)
        if tokenizer is None:
            shape = next(port.shape for port in ports if port.name == "pixel_values") or ()
            sizes = tuple(axis if isinstance(axis, int) else 224 for axis in shape[1:])
            inputs = image_samples(None, samples, sizes)
        else:
            most = min([fixed_length(ports) or LONGEST, longest or LONGEST, LONGEST, *_limit(source)])
            inputs = text_samples(task, read_text(text), samples, Path(tokenizer), longest=most, pairs=single)
        kept: tuple[list[Any], list[Any]] = ([], [])
        for done, sample in enumerate(inputs, 1):
            a, b = (side(sample) for side, _ in sides)
            if reference is None:
                _finite(a, b)
                kept[1].append(reduced(task, single, sample, a, b))
            else:
                theirs = reference(sample)
                for which, ours in enumerate((a, b)):
                    _finite(theirs, ours)
                    kept[which].append(reduced(task, single, sample, theirs, ours))
            progress(done, len(inputs))
        rows = _encoder_rows(task, single, kept)
        sessions = [session for _, session in sides]
        if speed and all(session is not None for session in sessions):
            rows.append(_in_turns([side for side, _ in sides], inputs))
    return rows


def _encoder(
    stack: ExitStack, path: str, task: str, threads: int
) -> tuple[Callable[[Sample], Outputs], Session | None]:
    if path.endswith(".onnx"):
        session = Session(path, provider=CPU, threads=threads, config=NO_SPINNING)
        by_token = task in ("feature-extraction", "token-classification", "question-answering", "fill-mask")

        def run(sample: Sample) -> Outputs:
            own = sample.inputs["input_ids"].shape[1] if "input_ids" in sample.inputs else 0
            shapes = [(1, own if by_token else 0)] * len(TASKS[task].outputs)
            return by_model(sample, session, TASKS[task].outputs, shapes)

        return run, session
    if task != "sentence-similarity":
        raise InputRefused(f"{Path(path).name}: a GGUF holds embedders, not models for {task}")
    from edgepack.runtimes.llama_cpp import Model

    model = stack.enter_context(Model(path, context=LONGEST, threads=threads, batch=LONGEST, embeddings=True))
    return lambda sample: [model.embed([[int(token) for token in sample.inputs["input_ids"][0]]])], None


def _source(source: str, task: str, threads: int) -> Callable[[Sample], Outputs]:
    import torch

    from edgepack.onnx.encoders import load, traceable
    from edgepack.onnx.tasks import task_of

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(Path(source))
    encoder = load(checkpoint, task_of(checkpoint.config, checkpoint.path, task))
    module, names = traceable(encoder, exact=True), list(encoder.inputs)

    def run(sample: Sample) -> Outputs:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(sample.inputs[name]) for name in names))
        return [np.asarray(value.float().numpy()) for value in found]

    return run


def _limit(source: str | None) -> list[int]:
    if source is None:
        return []
    positions = open_checkpoint(Path(source)).config.get("max_position_embeddings")
    return [positions - 2] if isinstance(positions, int) and positions > 4 else []  # RoBERTa's table starts at 2


def _finite(theirs: Outputs, ours: Outputs) -> None:
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape:
            raise ConformanceError(f"outputs of shape {list(b.shape)} and {list(a.shape)}: not of one model")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ConformanceError("NaN or infinite outputs")


def _encoder_rows(task: str, single: bool, kept: tuple[list[Any], list[Any]]) -> list[dict[str, Any]]:
    right = estimates(task, single, kept[1])
    if not kept[0]:
        return [
            {"name": f"{name}_of_a_and_b", "unit": "1", "a": None, "b": estimate.value, "n": n}
            | {"ci95": shown(estimate)["ci95"]}
            for name, (estimate, n) in right.items()
        ]
    left = estimates(task, single, kept[0])
    rows = []
    for name, (estimate, n) in right.items():
        row = {"name": name, "unit": "1", "a": left[name][0].value, "b": estimate.value, "n": n}
        difference = _difference(name, kept)
        rows.append(row | ({} if difference is None else {"difference": difference}))
    return rows


def _difference(name: str, kept: tuple[list[Any], list[Any]]) -> dict[str, Any] | None:
    """B - A of what is a mean over samples, with its paired interval."""
    if name == "cosine_mean":
        a, b = (np.array([_cosine(*pair) for pair in side]) for side in kept)
        return shown(bootstrap.mean((b - a)[:, None]))
    if name == "label_agreement":
        hits = [np.array([float((x == y).sum()) for x, y in side]) for side in kept]
        counts = np.array([float(x.size) for x, _ in kept[0]])
        return shown(bootstrap.ratio(hits[1] - hits[0], counts))
    return None


def _cosine(a: Array, b: Array) -> float:
    left, right = a.astype(np.float64), b.astype(np.float64)
    return float(left @ right / max(float(np.linalg.norm(left) * np.linalg.norm(right)), 1e-30))


def _in_turns(sides: Sequence[Callable[[Sample], Outputs]], inputs: Sequence[Sample]) -> dict[str, Any]:
    """Median latency of both, on the same inputs, A B A B."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + TURNS // 5):
        for side, run in enumerate(sides):
            started = time.perf_counter()
            run(inputs[turn % len(inputs)])
            times[side].append(1000 * (time.perf_counter() - started))
    a, b = (statistics.median(side[TURNS // 5 :]) for side in times)
    return {"name": "latency_ms_p50", "unit": "ms", "a": a, "b": b, "n": TURNS}
