"""How fast an ONNX model answers on this machine: encoders per batch and length, decoders token by token.

Encoders run in onnxruntime on inputs of exact length (real text where the package has its tokenizer.json), each
combination of batch and length warmed up and timed by itself. The main rows are those of the first batch and length;
the others carry theirs in their names: `latency_ms_p50_b4_t128`. Decoders run in onnxruntime-genai
with the workload, the rules and the rows of `latency.py`: prompt of real text, greedy, end-of-text ignored.

Runs in a fresh worker: peak memory is the whole process's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import UsageError
from edgepack.measure.encoder_fidelity import model_file, padded
from edgepack.measure.encoder_samples import read_tokenizer
from edgepack.measure.latency import (
    ENCODER_QUERIES,
    ENCODER_WARMUPS,
    Run,
    loading_row,
    memory_row,
    repeat,
    speed_row,
    speed_rows,
)
from edgepack.measure.memory import rss_mb
from edgepack.measurement import Measurement
from edgepack.onnx.graph import Port
from edgepack.runtimes.onnxruntime import CPU, Session
from edgepack.text import default_evaluation_text, read_text
from edgepack.worker import Progress, no_progress

LENGTHS = (16, 64, 128, 512)  # tokens: a query, a sentence or two, a passage, what most encoders end at
MANY_SAMPLES = 500  # below it a 99 % quantile rests on fewer than five samples beyond it: said in the row
EXTRA_SECONDS = 3.0  # for each combination beyond the main one, once it has ENCODER_QUERIES samples

Array = npt.NDArray[Any]


def encoder_latency(
    *,
    artifact: str,
    batch: int = 1,
    lengths: Sequence[int] = LENGTHS,
    more_batches: Sequence[int] = (),
    longest: int | None = None,
    image: Sequence[int] | None = None,
    repetitions: int,
    warmups: int = ENCODER_WARMUPS,
    threads: int,
    provider: str = CPU,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Time an encoder (worker function).

    Args:
        artifact: The `.onnx` file, or its folder; a tokenizer.json beside it makes the inputs real text.
        batch: Inputs computed together, for the main rows.
        lengths: Tokens of each input, that of the main rows first. Lengths that the model does not take are left out.
        more_batches: Other batches to time at every length.
        longest: Most tokens the model takes; None: as many as its graph says, or any.
        image: Height and width for a model that takes any; None where the graph has one size.
        repetitions: Timed runs are 20 times as many.
        warmups: Runs of each combination before them; at least ten are made.
        threads: Threads of one operator.
        provider: Execution provider that must run the model.
        progress: In combinations of batch and length.

    Returns:
        `rows`: `latency_ms_p50`, `_p90`, `_p99`, the same for every other combination, `load_ms`, `peak_rss_mb`; and
        the `settings`.

    Raises:
        InputRefused: The model is unsafe or damaged.
        MissingError: The provider is missing.
        UsageError: The graph takes none of the sizes.
        StepError: onnxruntime can't load or run it.
    """
    ids = _text_ids(model_file(artifact).parent, max(lengths))
    session, before = _load(artifact, provider, threads)
    tasks = _combinations(session.inputs, (batch, *more_batches), lengths, longest)
    rows: list[Measurement] = []
    for done, (rows_together, length) in enumerate(tasks):
        feeds = padded(_inputs(session.inputs, ids, rows_together, length, image), session.inputs)
        spans = _timed(session, feeds, max(ENCODER_WARMUPS, warmups), repetitions * ENCODER_QUERIES, main=done == 0)
        rows += _latency_rows(spans, rows_together, length, main=done == 0)
        progress(done + 1, len(tasks))
    rows = [*rows, loading_row(session.load_ms), memory_row(before)]
    return {"rows": [row.as_json() for row in rows], "settings": session.settings}


def _load(artifact: str, provider: str, threads: int) -> tuple[Session, float]:
    from edgepack.runtimes.onnxruntime import bindings

    bindings()
    before = rss_mb()
    return Session(model_file(artifact), provider=provider, threads=threads), before


def _text_ids(folder: Path, count: int) -> Array:
    """Token ids of real text where there is a tokenizer, else small numbers, which every vocabulary has."""
    path = next((path for path in (folder / "tokenizer.json", folder.parent / "tokenizer" / "tokenizer.json")
                 if path.is_file()), None)  # fmt: skip
    if path is None:
        return np.arange(count, dtype=np.int64) % 64
    text = read_text(default_evaluation_text())[: 64 * count]
    ids = list(read_tokenizer(path).encode(text).ids)
    while len(ids) < count:
        ids += ids
    return np.array(ids[:count], dtype=np.int64)


def _combinations(
    ports: Sequence[Port], batches: Sequence[int], lengths: Sequence[int], longest: int | None
) -> list[tuple[int, int | None]]:
    """(batch, tokens) to time, the main one first; tokens None for images."""
    shapes = {port.name: port.shape or () for port in ports}
    first = next(iter(shapes.values()), ())
    fixed_batch = first[0] if first and isinstance(first[0], int) else None
    counts = list(dict.fromkeys(batches)) if fixed_batch is None else [fixed_batch]
    if "input_ids" not in shapes:
        return [(count, None) for count in counts]
    axis = shapes["input_ids"][1] if len(shapes["input_ids"]) == 2 else None
    if isinstance(axis, int):
        return [(count, axis) for count in counts]
    if not lengths or min(lengths) < 1:
        raise UsageError(f"lengths {list(lengths)}: expected one or more tokens")
    top = longest or max(lengths)
    sizes = dict.fromkeys([min(lengths[0], top), *(length for length in lengths[1:] if length <= top)])
    return [(count, size) for count in counts for size in sizes]


def _inputs(
    ports: Sequence[Port], ids: Array, batch: int, length: int | None, image: Sequence[int] | None
) -> Mapping[str, Array]:
    if length is None:
        shape = next((port.shape or () for port in ports if port.name == "pixel_values"), ())
        size = [axis if isinstance(axis, int) else None for axis in shape[1:]]
        if None in size[1:] and image is not None:
            size[1:] = list(image)
        if len(size) != 3 or None in size:
            raise UsageError(f"the model takes images of any size {list(shape)}: give height and width")
        pixels = np.random.default_rng(0).standard_normal((batch, *size))  # type: ignore[arg-type]
        return {"pixel_values": pixels.astype(np.float32)}
    rows = np.tile(ids[:length], (batch, 1))
    return {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}


def _timed(session: Session, feeds: Mapping[str, Array], warmups: int, count: int, *, main: bool) -> Array:
    """Milliseconds of each run."""
    for _ in range(warmups):
        session.run(feeds)
    spans: list[float] = []
    begun = time.perf_counter()
    while len(spans) < count:
        started = time.perf_counter()
        session.run(feeds)
        ended = time.perf_counter()
        spans.append(1000 * (ended - started))
        if not main and ended - begun > EXTRA_SECONDS and len(spans) >= ENCODER_QUERIES:
            break
    return np.array(spans)


def _latency_rows(spans: Array, batch: int, length: int | None, *, main: bool) -> list[Measurement]:
    mark = "" if main else f"_b{batch}" + ("" if length is None else f"_t{length}")
    extra = {"batch": float(batch)} | ({} if length is None else {"tokens": float(length)})
    quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    rows = []
    for name, fraction in quantiles.items():
        value = float(np.quantile(spans, fraction))
        row = speed_row(f"latency_ms_{name}{mark}", value, "ms", len(spans), tail=name == "p90", extra=extra)
        rows.append(row)
    if len(spans) < MANY_SAMPLES:
        rows[-1] = Measurement(
            **{**vars(rows[-1]), "note": f"few samples: {len(spans)}, a 1 % tail wants {MANY_SAMPLES}"}
        )
    return rows


def decoder_latency(
    *,
    artifact: str,
    prompt_tokens: int,
    decode_tokens: int,
    repetitions: int,
    warmups: int,
    pause_seconds: float,
    threads: int,
    context: int,
    provider: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Time a decoder package through onnxruntime-genai (worker function).

    Args:
        artifact: Folder with genai_config.json, the model and its tokenizer.
        prompt_tokens: Tokens of the prompt.
        decode_tokens: Tokens timed after the first.
        repetitions: Timed runs.
        warmups: Runs before them that are not counted; at least one is made.
        pause_seconds: Rest before each timed run.
        threads: Threads of one operator.
        context: Length of the key-value cache, which is part of the memory measured.
        provider: What onnxruntime-genai must run it on.
        progress: In runs, warm-ups included.

    Returns:
        `rows` with the names of `latency.latency`, and the `settings`.

    Raises:
        UsageError: Prompt and decoded tokens do not fit in the context, or the context is longer than the model's.
        InputRefused: The folder is unsound.
        MissingError: onnxruntime-genai or the provider is missing.
        StepError: It can't load or run the package.
    """
    from edgepack.runtimes.genai import Decoder, bindings

    if prompt_tokens + decode_tokens + 1 > context:
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens, the first one and {decode_tokens} more do not fit in a context of "
            f"{context}",
            hint="Lower measure.prompt_tokens or measure.decode_tokens, or raise runtime.context.",
        )
    bindings()
    before = rss_mb()
    with Decoder(artifact, context=context, threads=threads, provider=provider) as decoder:
        prompt = _prompt(decoder, prompt_tokens)
        runs: list[Run] = repeat(
            lambda: answer(decoder, prompt, decode_tokens), max(1, warmups), repetitions, pause_seconds, progress
        )
        load_ms = decoder.load_ms
        settings = decoder.settings
    rows = [*speed_rows(runs, prompt_tokens), loading_row(load_ms), memory_row(before)]
    sizes = {"context": context, "prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens, "threads": threads}
    return {"rows": [row.as_json() for row in rows], "settings": settings | sizes}


def _prompt(decoder: Any, count: int) -> list[int]:
    """Real text of exactly `count` tokens, read by the package's own tokenizer; repeated if it is too short."""
    text = read_text(default_evaluation_text())[: 64 * count]
    ids = [int(number) for number in decoder.tokenizer().encode(text)]
    while len(ids) < count:
        ids += ids
    return ids[:count]


def answer(decoder: Any, prompt: Sequence[int], decode_tokens: int) -> Run:
    """One run from an empty cache: the prompt, the first token, and `decode_tokens` after it."""
    decoder.clear()
    started = time.perf_counter()
    decoder.feed(prompt)
    prefilled = time.perf_counter()
    decoder.step()
    last = time.perf_counter()
    ttft = last - started
    spans = []
    for _ in range(decode_tokens):
        decoder.step()
        now = time.perf_counter()
        spans.append(1000 * (now - last))
        last = now
    return Run(1000 * (prefilled - started), 1000 * ttft, tuple(spans))
