"""Two artifacts of one model on the same windows and in the same minutes: divergence, perplexity, speed.

Fidelity: both are decoded window by window (protocol of `fidelity.py`). With a source model each is held against it,
otherwise B against A; differences are paired by window, which is far sharper than two separate intervals. Speed: runs
alternate A, B, A, B, so that a slow minute of the machine hits both. Worker functions.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from edgepack.errors import ConformanceError
from edgepack.measure import bootstrap
from edgepack.measure.bootstrap import Array, Estimate
from edgepack.measure.divergence import Scores, score
from edgepack.measure.fidelity import join, open_model, scored_windows
from edgepack.measure.latency import answer, prompt_of
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import read_text
from edgepack.worker import Progress, no_progress


def pair(
    *,
    first: str,
    second: str,
    reference: str | None,
    text: str,
    windows: int,
    window_tokens: int,
    threads: int,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measure two artifacts on the same windows.

    Args:
        first: GGUF A.
        second: GGUF B.
        reference: Full-precision GGUF of the source; None holds B against A.
        text: Path of the evaluation text.
        windows: Most windows.
        window_tokens: Tokens per window.
        threads: Threads for llama.cpp and for the comparison.
        progress: In windows.

    Returns:
        Rows `{name, unit, a, b, n, difference?}`; `difference` is B - A as `{value, ci95}`.

    Raises:
        ConformanceError: They tokenize differently, or one gives NaN.
        InputRefused: The text is too short.
    """
    content = read_text(text)
    parts: list[tuple[Scores, Scores]] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        paths = [path for path in (first, second, reference) if path is not None]
        models = [open_model(stack, path, window_tokens, threads) for path in paths]
        for done, total, logits, targets in scored_windows(models, content, windows, window_tokens):
            source = logits[2].copy() if reference else None
            a = score(logits[0] if reference else logits[0].copy(), targets, reference=source, pool=pool)
            b = score(logits[1], targets, reference=logits[2] if reference else logits[0], pool=pool)
            parts.append((a, b))
            progress(done, total)
    a, b = (join([part[side] for part in parts]) for side in (0, 1))
    per_window = window_tokens - 1 - window_tokens // 2
    return pair_rows(a, b, per_window)


def pair_rows(a: Scores, b: Scores, per_window: int) -> list[dict[str, Any]]:
    """Rows of two artifacts' scores on the same windows.

    Args:
        a: Of A; without `kld` where B is held against A.
        b: Of B.
        per_window: Scored positions of a window.

    Raises:
        ConformanceError: NaN or infinite scores.
    """

    def shaped(values: Array) -> Array:
        if not np.isfinite(values).all():
            raise ConformanceError(f"NaN or infinite logits at {int((~np.isfinite(values)).sum())} positions")
        return values.reshape(-1, per_window)

    n = len(a.candidate_nll)
    nll = shaped(a.candidate_nll), shaped(b.candidate_nll)
    ratio = bootstrap.mean(nll[1] - nll[0], np.exp)
    rows = [
        {"name": "perplexity", "unit": "1", "n": n}
        | {side: float(np.exp(values.mean())) for side, values in zip("ab", nll, strict=True)}
        | {"b_over_a": shown(ratio)}
    ]
    if b.kld is None or b.same_top is None:
        return rows
    for name, unit in (("mean_kld", "nats/token"), ("top1_agreement", "1")):
        column = "kld" if name == "mean_kld" else "same_top"
        right = shaped(getattr(b, column))
        row: dict[str, Any] = {"name": name, "unit": unit, "n": n, "b": float(right.mean())}
        if a.kld is None:
            row |= {"name": f"{name}_b_from_a" if name == "mean_kld" else f"{name}_of_a_and_b", "a": None}
            row["ci95"] = shown(bootstrap.mean(right))["ci95"]
        else:
            left = shaped(getattr(a, column))
            row |= {"a": float(left.mean()), "difference": shown(bootstrap.mean(right - left))}
        rows.append(row)
    return rows


def shown(estimate: Estimate) -> dict[str, Any]:
    """An estimate as it stands in a row."""
    return {"value": estimate.value, "ci95": list(estimate.ci95) if estimate.ci95 else None}


def speed(
    *,
    first: str,
    second: str,
    prompt_tokens: int,
    decode_tokens: int,
    repetitions: int,
    threads: int,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Time two artifacts in turns: A, B, A, B; the first turn of each is a warm-up.

    Args:
        first: GGUF A.
        second: GGUF B.
        prompt_tokens: Tokens of the prompt.
        decode_tokens: Tokens timed after the first.
        repetitions: Counted turns of each.
        threads: CPU threads.
        progress: In turns.

    Returns:
        Rows `{name, unit, a, b, n}` with medians: `ttft_ms_p50`, `prefill_tokens_per_s`, `decode_tokens_per_s_p50`.
    """
    runs: tuple[list[Any], list[Any]] = ([], [])
    with ExitStack() as stack:
        context = prompt_tokens + decode_tokens
        models = [stack.enter_context(Model(path, context=context, threads=threads)) for path in (first, second)]
        prompts = [prompt_of(model, prompt_tokens) for model in models]
        for turn in range(repetitions + 1):
            for side in (0, 1):
                runs[side].append(answer(models[side], prompts[side], decode_tokens))
                progress(2 * turn + side + 1, 2 * (repetitions + 1))
    kept = [side[1:] for side in runs]
    values = {
        "ttft_ms_p50": ("ms", [np.median([run.ttft_ms for run in side]) for side in kept], repetitions),
        "prefill_tokens_per_s": (
            "tokens/s",
            [1000 * prompt_tokens / np.median([run.prefill_ms for run in side]) for side in kept],
            repetitions,
        ),
        "decode_tokens_per_s_p50": (
            "tokens/s",
            [1000 / np.median([run.token_ms for run in side]) for side in kept],
            repetitions * decode_tokens,
        ),
    }
    return [
        {"name": name, "unit": unit, "a": float(both[0]), "b": float(both[1]), "n": n}
        for name, (unit, both, n) in values.items()
    ]
