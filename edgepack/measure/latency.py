"""How fast an artifact answers on this machine: load, first token, prompt speed, decode speed, peak memory.

The workload is fixed: one prompt of real text, greedy decoding, end-of-text ignored, exact token counts, warm-ups
first, pauses where asked. Decode speed counts only tokens after the first (MLPerf Client's rule: the first belongs to
the time to first token), each timed by itself, so that slow tokens show. Settings are llama-bench's: batch 2048,
micro-batch 512, flash attention chosen by llama.cpp; `llama-bench -p P -n N -d P` times the same work.

Runs in a fresh worker: peak memory is the whole process's, Python's share before loading is stated beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import UsageError
from edgepack.measure.memory import peak_rss_mb, rss_mb
from edgepack.measurement import Measurement
from edgepack.text import default_evaluation_text, read_text
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.runtimes.llama_cpp import Model

FEW_SAMPLES = 50  # below it a 90 % quantile rests on fewer than five samples beyond it: said in the row
ENCODER_WARMUPS = 10  # at least, and QUERIES per repetition: encoders answer in milliseconds
ENCODER_QUERIES = 20


@dataclass(frozen=True)
class Run:
    """One timed answer, in milliseconds.

    Args:
        prefill_ms: The prompt's computation.
        ttft_ms: From the prompt's tokens to the first generated token, its choice included.
        token_ms: One value for every token after the first.
    """

    prefill_ms: float
    ttft_ms: float
    token_ms: tuple[float, ...]


def latency(
    *,
    artifact: str,
    prompt_tokens: int,
    decode_tokens: int,
    repetitions: int,
    warmups: int,
    pause_seconds: float,
    threads: int,
    context: int,
    gpu_layers: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Time an artifact.

    Args:
        artifact: GGUF, or the first shard of a split one.
        prompt_tokens: Tokens of the prompt.
        decode_tokens: Tokens timed after the first.
        repetitions: Timed runs.
        warmups: Runs before them that are not counted; at least one is made.
        pause_seconds: Rest before each timed run.
        threads: CPU threads.
        context: Length of the key-value cache, which is part of the memory measured.
        gpu_layers: Layers on the accelerator; -1 moves all.
        progress: In runs, warm-ups included.

    Returns:
        `rows`, and the `settings` they were measured with.

    Raises:
        UsageError: Prompt and decoded tokens do not fit in the context.
        StepError: llama.cpp can't load or run the artifact.
    """
    from edgepack.runtimes.llama_cpp import bindings, describe_artifact

    # Single tokens are short: threads that sleep between operations lose 5 %. At this value none is lost (measured).
    os.environ["GOMP_SPINCOUNT"] = "10000"
    bindings()
    before = rss_mb()
    found = describe_artifact(artifact)
    settings = {"threads": threads, "context": context, "gpu_layers": gpu_layers, "prompt_tokens": prompt_tokens}
    if found.pooled:
        timed = _encoder(artifact, prompt_tokens, repetitions, warmups, threads, gpu_layers, progress)
        return {"rows": _json([*timed, memory_row(before)]), "settings": settings}
    if prompt_tokens + decode_tokens > context:
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens and {decode_tokens} decoded ones do not fit in a context of {context}",
            hint="Lower measure.prompt_tokens or measure.decode_tokens, or raise runtime.context.",
        )
    model, load_ms = _load(artifact, context=context, threads=threads, gpu_layers=gpu_layers)
    with model:
        prompt = prompt_of(model, prompt_tokens)
        runs = repeat(
            lambda: answer(model, prompt, decode_tokens), max(1, warmups), repetitions, pause_seconds, progress
        )
    rows = [*speed_rows(runs, prompt_tokens), loading_row(load_ms), memory_row(before)]
    return {"rows": _json(rows), "settings": settings | {"decode_tokens": decode_tokens}}


def _load(artifact: str, **options: Any) -> tuple[Model, float]:
    from edgepack.runtimes.llama_cpp import Model

    started = time.perf_counter()
    model = Model(artifact, **options)
    return model, 1000 * (time.perf_counter() - started)


def prompt_of(model: Model, count: int) -> list[int]:
    """Real text of exactly `count` tokens, BOS first where the vocabulary adds one; repeated if it is too short."""
    text = read_text(default_evaluation_text())[: 64 * count]
    tokens = model.tokenize(text, add_special=True, parse_special=False)
    while len(tokens) < count:
        tokens += model.tokenize(text, add_special=False, parse_special=False)
    return tokens[:count]


def answer(model: Model, prompt: Sequence[int], decode_tokens: int) -> Run:
    """One run from an empty cache: the prompt, the first token, and `decode_tokens` after it."""
    model.clear()
    started = time.perf_counter()
    model.feed(prompt, 0)
    prefilled = time.perf_counter()
    token = model.greedy()
    last = time.perf_counter()
    ttft = last - started
    spans = []
    for position in range(len(prompt), len(prompt) + decode_tokens):
        model.feed((token,), position)
        token = model.greedy()
        now = time.perf_counter()
        spans.append(1000 * (now - last))
        last = now
    return Run(1000 * (prefilled - started), 1000 * ttft, tuple(spans))


def repeat(
    once: Callable[[], Any], warmups: int, repetitions: int, pause_seconds: float, progress: Progress
) -> list[Any]:
    """Run warm-ups, then the counted runs, each after the pause."""
    kept = []
    for number in range(warmups + repetitions):
        if number >= warmups and pause_seconds:
            time.sleep(pause_seconds)
        result = once()
        if number >= warmups:
            kept.append(result)
        progress(number + 1, warmups + repetitions)
    return kept


def speed_rows(runs: Sequence[Run], prompt_tokens: int) -> list[Measurement]:
    """The measurements of a decoder's timed answers, the same for every runtime."""
    ttft = np.array([run.ttft_ms for run in runs])
    prefill = prompt_tokens / np.array([run.prefill_ms for run in runs]) * 1000
    tokens = np.array([run.token_ms for run in runs])
    # Tokens over time, as llama-bench counts: it prints the mean of its runs.
    whole = {"mean": 1000 / float(tokens.mean()), "median_of_runs": 1000 / float(np.median(tokens.mean(axis=1)))}
    # The rate that 90 % of tokens reach is the reciprocal of the 90 % quantile of their times.
    rates = {name: 1000 / float(np.quantile(tokens, q)) for name, q in (("p50", 0.5), ("p10", 0.9), ("p90", 0.1))}
    return [
        speed_row("ttft_ms_p50", float(np.quantile(ttft, 0.5)), "ms", len(runs)),
        speed_row("ttft_ms_p90", float(np.quantile(ttft, 0.9)), "ms", len(runs), tail=True),
        speed_row(
            "prefill_tokens_per_s",
            float(np.median(prefill)),
            "tokens/s",
            len(runs),
            extra={"min": float(prefill.min()), "max": float(prefill.max())},
        ),
        speed_row("decode_tokens_per_s_p50", rates["p50"], "tokens/s", tokens.size, extra=whole),
        speed_row("decode_tokens_per_s_p10", rates["p10"], "tokens/s", tokens.size, tail=True),
        speed_row("decode_tokens_per_s_p90", rates["p90"], "tokens/s", tokens.size, tail=True),
    ]


def speed_row(
    name: str, value: float, unit: str, n: int, *, tail: bool = False, extra: dict[str, float] | None = None
) -> Measurement:
    """A speed row that says so when its tail rests on few samples."""
    note = f"few samples: {n}, a 10 % tail wants {FEW_SAMPLES}" if tail and n < FEW_SAMPLES else None
    shown = {key: round(number, 4) for key, number in (extra or {}).items()}
    return Measurement(name, round(value, 4), unit, n=n, note=note, extra=shown)


def loading_row(load_ms: float) -> Measurement:
    """The time from the call to a model that can be used."""
    note = "model and context, the file most likely in the system's cache; the first run's warm-up is not in it"
    return Measurement("load_ms", round(load_ms, 3), "ms", n=1, note=note)


def memory_row(before_mb: float) -> Measurement:
    """Peak memory of this process, and what it had before the model was loaded."""
    note = f"whole measuring process; {before_mb:.0f} MB of it are Python and libraries before the model is loaded"
    return Measurement(
        "peak_rss_mb", round(peak_rss_mb(), 1), "MB", n=1, note=note, extra={"before_load": round(before_mb, 1)}
    )


def _encoder(
    artifact: str, tokens: int, repetitions: int, warmups: int, threads: int, gpu_layers: int, progress: Progress
) -> list[Measurement]:
    """Time an embedder: one sequence of `tokens` tokens at a time."""
    from edgepack.runtimes.llama_cpp import describe_artifact

    trained = describe_artifact(artifact).trained_context
    length = min(tokens, trained)
    model, load_ms = _load(
        artifact, context=length, batch=length, threads=threads, gpu_layers=gpu_layers, embeddings=True
    )
    with model:
        ids = prompt_of(model, length)

        def once() -> float:
            started = time.perf_counter()
            model.embed([ids])
            return 1000 * (time.perf_counter() - started)

        spans = np.array(repeat(once, max(ENCODER_WARMUPS, warmups), repetitions * ENCODER_QUERIES, 0.0, progress))
    note = {"tokens": float(length)}
    return [
        speed_row("latency_ms_p50", float(np.quantile(spans, 0.5)), "ms", len(spans), extra=note),
        speed_row("latency_ms_p90", float(np.quantile(spans, 0.9)), "ms", len(spans), tail=True, extra=note),
        loading_row(load_ms),
    ]


def _json(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [row.as_json() for row in rows]
