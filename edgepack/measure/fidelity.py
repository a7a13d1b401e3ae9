"""How much of the source model an artifact keeps: KL divergence, perplexity, agreement; cosines for embedders.

Protocol of llama-perplexity (llama.cpp tools/perplexity/perplexity.cpp): the text is tokenized once, with special
tokens; windows of `window_tokens` from its start; the first token of each is replaced by BOS where the vocabulary adds
one; positions `window_tokens / 2` to `window_tokens - 2` are scored, each on the token after it; key-value cache in
float16. Unlike it, both models stand in memory and meet in float32: no logits file, no 16-bit
floor under small divergences.

Uncertainty: block bootstrap over windows (see `bootstrap.py`). llama-perplexity's own standard errors treat tokens as
independent and are smaller. Runs in a worker; both models are read by llama.cpp in that one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import ConformanceError, UsageError
from edgepack.measure import bootstrap
from edgepack.measure.bootstrap import Estimate
from edgepack.measure.details import Watch
from edgepack.measure.divergence import Floats, Scores, score
from edgepack.measurement import Measurement
from edgepack.text import read_text, text_sha256, windows
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.runtimes.llama_cpp import Model

Array = npt.NDArray[np.float64]


def fidelity(
    *,
    reference: str | None,
    candidate: str,
    text: str,
    windows: int,
    window_tokens: int,
    threads: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure `candidate` against `reference` on a text.

    Args:
        reference: Full-precision GGUF of the source; None leaves perplexity only.
        candidate: The artifact: a GGUF, or the first shard of a split one.
        text: Path of a UTF-8 text of at least two windows.
        windows: Most windows; embedders are measured on five sentences for each window.
        window_tokens: Tokens per window; for embedders the longest sentence.
        threads: Threads for llama.cpp and for the comparison.
        progress: In windows (sentences for embedders).

    Returns:
        `rows` (measurements), `windows` and `tokens` measured, `text_sha256`, `reference_type`; with a reference
        `details`: see `details.py`.

    Raises:
        InputRefused: The text is not text or too short.
        UsageError: Windows longer than the model was made for.
        ConformanceError: The two tokenize the text differently, or only the candidate gives NaN.
        StepError: llama.cpp can't load or run one of them.
    """
    from edgepack.runtimes.llama_cpp import describe_artifact

    content = read_text(text)
    found = describe_artifact(candidate)
    if window_tokens > found.trained_context:
        raise UsageError(
            f"measure.window_tokens is {window_tokens}, but the model's context is {found.trained_context} tokens",
            hint=f"Use --set measure.window_tokens={found.trained_context}.",
        )
    common: dict[str, Any] = {"text_sha256": text_sha256(content)}
    if reference is not None:
        common["reference_type"] = describe_artifact(reference).file_type
    if found.pooled:
        from edgepack.measure.cosine import embedder_rows

        if reference is None:
            return common | {"rows": []}
        return common | embedder_rows(reference, candidate, content, 5 * windows, window_tokens, threads, progress)
    scores, details = _measure(reference, candidate, content, windows, window_tokens, threads, progress)
    per_window = scored_in_window(window_tokens)
    rows = fidelity_rows(scores, per_window, f"the {common.get('reference_type')} source in llama.cpp", window_tokens)
    measured = {
        "rows": [row.as_json() for row in rows],
        "windows": len(scores.candidate_nll) // per_window,
        "tokens": len(scores.candidate_nll),
    }
    return common | measured | ({} if details is None else {"details": details})


def _measure(
    reference: str | None,
    candidate: str,
    content: str,
    limit: int,
    window_tokens: int,
    threads: int,
    progress: Progress,
) -> tuple[Scores, dict[str, Any] | None]:
    """Scores of all scored positions, window after window, and where the two models part."""
    watch = Watch(scored_in_window(window_tokens))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        paths = [path for path in (candidate, reference) if path is not None]
        models = [open_model(stack, path, window_tokens, threads) for path in paths]
        pieces = windows(_same_tokens(models, content), window_tokens, limit)
        found = []
        for done, total, logits, targets in _scored(models, pieces, window_tokens):
            found.append(score(logits[0], targets, reference=logits[1] if reference else None, pool=pool))
            if reference:
                watch.see(found[-1], logits[0], logits[1])
            progress(done, total)
        scores = join(found)
        return scores, watch.details(scores, pieces, models[0].detokenize)


def scored_in_window(window_tokens: int) -> int:
    """Scored positions of a window: all of its second half but the last, whose next token is in the next window."""
    return window_tokens - 1 - window_tokens // 2


def scored_windows(
    models: Sequence[Model], content: str, limit: int, window_tokens: int
) -> Iterator[tuple[int, int, list[Floats], npt.NDArray[np.int64]]]:
    """Decode the text window by window with every model.

    Args:
        models: Opened by `open_model`; the first says whether windows start with BOS.
        content: The text.
        limit: Most windows.
        window_tokens: Tokens per window.

    Yields:
        Windows done, all windows, every model's logits `[positions, vocabulary]`, the true next tokens `[positions]`.
    """
    yield from _scored(models, windows(_same_tokens(models, content), window_tokens, limit), window_tokens)


def _scored(
    models: Sequence[Model], pieces: Sequence[Sequence[int]], window_tokens: int
) -> Iterator[tuple[int, int, list[Floats], npt.NDArray[np.int64]]]:
    """`scored_windows` of a text that is cut already."""
    first, stop = window_tokens // 2, window_tokens - 1
    together = models[0].sequences
    for start in range(0, len(pieces), together):
        block = pieces[start : start + together]
        fed = [[models[0].bos, *ids[1:]] for ids in block] if models[0].add_bos else block
        logits = [model.logits(fed, first, stop=stop).reshape(-1, model.vocab_size) for model in models]
        targets = np.array([ids[first + 1 : stop + 1] for ids in block], dtype=np.int64).ravel()
        yield start + len(block), len(pieces), logits, targets


def open_model(stack: ExitStack, path: str, window_tokens: int, threads: int) -> Model:
    """A model with room for the windows that fill one micro-batch.

    llama-perplexity decodes four windows of 512 at once; llama.cpp computes 512 tokens at a time either way, so more
    windows side by side bring no speed (measured), only four times the logits in memory.
    """
    from edgepack.runtimes.llama_cpp import MICRO_BATCH, Model

    together = max(1, MICRO_BATCH // window_tokens)
    return stack.enter_context(Model(path, context=window_tokens, threads=threads, sequences=together))


def _same_tokens(models: Sequence[Model], content: str) -> list[int]:
    """Tokens of the text; all vocabularies must agree, or logits of different tokens would be compared."""
    tokens = models[0].tokenize(content, add_special=True, parse_special=False)
    for other in models[1:]:
        if other.vocab_size != models[0].vocab_size:
            raise ConformanceError(
                f"{models[0].path.name} has a vocabulary of {models[0].vocab_size} tokens, "
                f"{other.path.name} one of {other.vocab_size}"
            )
        theirs = other.tokenize(content, add_special=True, parse_special=False)
        if theirs != tokens:
            differing = (i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b)
            place = next(differing, min(len(tokens), len(theirs)))
            raise ConformanceError(
                f"{models[0].path.name} and {other.path.name} tokenize the evaluation text differently from token "
                f"{place} on: {tokens[place : place + 4]} and {theirs[place : place + 4]}"
            )
    return tokens


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of consecutive blocks as one."""

    def column(name: str) -> Array | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    return Scores(
        np.concatenate([part.candidate_nll for part in parts]),
        column("reference_nll"),
        column("kld"),
        column("same_top"),
    )


def fidelity_rows(scores: Scores, per_window: int, against: str, window_tokens: int) -> list[Measurement]:
    """The measurements, or rows without a value when the source model itself gives no finite logits.

    Args:
        scores: Of all scored positions, window after window.
        per_window: Scored positions of each window.
        against: What the reference is and what ran it, for the notes; unused without a reference.
        window_tokens: Tokens per window.

    Raises:
        ConformanceError: The artifact alone gives NaN or infinite logits.
    """
    bad = ~np.isfinite(scores.candidate_nll if scores.kld is None else scores.kld)
    n = len(bad)
    if bad.any():
        return _refuse_nonfinite(scores, bad, per_window)

    def shaped(values: Array) -> Array:
        return values.reshape(-1, per_window)

    note = f"{n // per_window} windows of {window_tokens} tokens"
    rows = []
    if scores.kld is not None and scores.same_top is not None and scores.reference_nll is not None:
        against = f"{note}, against {against}"
        rows = [
            _row("mean_kld", bootstrap.mean(shaped(scores.kld)), "nats/token", n, against),
            _row("median_kld", bootstrap.quantile(shaped(scores.kld), 0.5), "nats/token", n, against),
            _row("kld_p99", bootstrap.quantile(shaped(scores.kld), 0.99), "nats/token", n, against),
            _row("top1_agreement", bootstrap.mean(shaped(scores.same_top)), "1", n, against),
            _row("source_perplexity", bootstrap.mean(shaped(scores.reference_nll), np.exp), "1", n, note),
        ]
    return [*rows, _row("perplexity", bootstrap.mean(shaped(scores.candidate_nll), np.exp), "1", n, note)]


def _row(name: str, estimate: Estimate, unit: str, n: int, note: str) -> Measurement:
    extra = {} if estimate.standard_error is None else {"standard_error": estimate.standard_error}
    return Measurement(name, estimate.value, unit, n=n, ci95=estimate.ci95, note=note, extra=extra)


def _refuse_nonfinite(scores: Scores, bad: npt.NDArray[np.bool_], per_window: int) -> list[Measurement]:
    """A candidate that computes NaN is broken; a source that does so too leaves nothing to compare with."""
    first = int(np.flatnonzero(bad)[0])
    where = (
        f"NaN or infinite logits at {int(bad.sum())} of {len(bad)} scored positions, first in window "
        f"{first // per_window}, scored position {first % per_window}"
    )
    if scores.reference_nll is None or np.isfinite(scores.reference_nll[bad]).all():
        raise ConformanceError(
            f"the artifact gives {where}", hint="Look for NaN or infinite weights: `edgepack inspect` on the source."
        )
    names = {"mean_kld": "nats/token", "median_kld": "nats/token", "kld_p99": "nats/token", "top1_agreement": "1"}
    names |= {"source_perplexity": "1", "perplexity": "1"}
    return [
        Measurement(name, None, unit, n=len(bad), measured_on=None, note=f"the source model gives {where}")
        for name, unit in names.items()
    ]
