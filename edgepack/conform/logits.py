"""Proof that a float32 GGUF computes what its source does: transformers against llama.cpp on a few short texts.

Both engines work in float32: transformers with eager attention, llama.cpp with a float32 key-value cache and without
flash attention (either one rounds keys and values to float16 and moves log-probabilities by 1e-2). One after the
other, so that the model is in memory once. Every position counts, the first ones too: they do not depend on rotary
embeddings or masks, so where the first difference is says what is wrong.

An embedder is compared by its pooled vectors. Runs in a worker process only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import ConformanceError, StepError
from edgepack.gguf.file import GgufFile, read_gguf
from edgepack.gguf.pooling import read_pooling
from edgepack.worker import Progress

# Mean over the positions of a text, nats per token. Measured on random models: at most 1e-9 without GELU, 2e-6 with
# llama.cpp's float16 GELU table and strong weights (docs/architectures.md). Measured on tiny-llama-5m with one thing
# wrong: a norm 3, a RoPE permutation 0.6, twice the RoPE base 4e-3, ten times the norms' epsilon 2e-4. Less is missed.
MAX_MEAN_KLD = 1e-4
MIN_COSINE = 0.9999  # measured: above 0.9999999, with BERT's exact GELU computed as the tanh form

# (text, tokens of it): prose, code with numbers, other scripts. Long enough for attention and positions to matter,
# short enough for a model of some billion weights on a CPU.
_TEXTS: tuple[tuple[str, int], ...] = (
    ("The harbour was quiet when the first boats came in, and the market opened an hour later than usual.", 16),
    (
        "def moving_average(values, width=3):\n    total = sum(values[:width])\n"
        "    for i in range(width, len(values)):\n"
        "        yield total / width\n        total += values[i] - values[i - width]\n# 3.14159, 2.71828, 1.41421\n",
        48,
    ),
    (
        "Il pleuvait depuis trois jours. Дождь шёл третий день. 雨は三日間降り続いた。 Tres días de lluvia, y el río "
        "subía; 12 metros, 13 metros. Nobody in the village could remember such a spring, not even the oldest of them, "
        "who counted the floods by the names of the children born in those years. और फिर भी वे रुके रहे। "
        "Am vierten Tag hörte der Regen auf, und die Brücke stand noch.",
        96,
    ),
)
_POSITIONS = sum(length for _, length in _TEXTS)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """Token ids of one text, made by the GGUF's own vocabulary."""

    text: str
    ids: list[int]


def memory_bytes(parameters: int, *, vocabulary: int = 262_144) -> int:
    """Memory the comparison needs at its peak, for a caller to decide whether to run it.

    Weights in float32, an eighth more for tensors on their way from the file's type, the logits of both engines, and
    0.6 GB for torch and transformers themselves. Measured on Llama shapes of 5M, 37M and 174M weights in bf16: 0.40,
    0.60 and 1.44 GB resident, the mapped pages of the source (2 bytes per weight, reclaimable) included.

    Args:
        parameters: Weights of the model.
        vocabulary: Tokens; the default is that of the largest vocabularies in use.
    """
    return int(parameters * 4 * 1.125) + 2 * 4 * _POSITIONS * vocabulary + 600_000_000


def logits(*, reference_gguf: str, source: str, threads: int, progress: Progress) -> dict[str, Any]:
    """Compare a float32 GGUF in llama.cpp with its source folder in transformers.

    Args:
        reference_gguf: The GGUF, F32.
        source: The Hugging Face folder it was made from.
        threads: Threads for both engines.
        progress: Called with (texts done, 2 x texts): llama.cpp's first, then transformers'.

    Returns:
        `mean_kld` (nats per token), `max_abs_dlogp`, `texts`, `positions`; for an embedder `min_cosine`,
        `max_abs_difference` and `texts`. A source whose own logits are not finite, in both engines at the same places,
        leaves nothing to compare: `compared` (false) and `note`.

    Raises:
        ConformanceError: The engines disagree; names the text, the position, and both values.
        StepError: One of them could not load or run the model.
        InputRefused: The source is unsafe or malformed.
    """
    checkpoint = open_checkpoint(Path(source))  # the linter stands before every load
    header = read_gguf(Path(reference_gguf))
    pooling = None
    if header.get(f"{header.architecture}.pooling_type") is not None:
        pooling = read_pooling(checkpoint) or "mean"  # of the source: the file's own is what is being proved
    prompts, ours = _run_llama_cpp(header, pooling is not None, threads, progress)
    theirs = _run_transformers(source, prompts, pooling, threads, progress)
    if pooling is not None:
        return _compare_embeddings(prompts, theirs, ours)
    return _compare_logits(prompts, theirs, ours)


def _run_llama_cpp(
    header: GgufFile, embedder: bool, threads: int, progress: Progress
) -> tuple[list[Prompt], list[Floats]]:
    from edgepack.runtimes.llama_cpp import Model

    at = header.architecture
    trained = int(header.get(f"{at}.context_length"))
    # With long RoPE the graph chooses its factors by the size of the context, transformers by the length of the text.
    context = min(256, trained, int(header.get(f"{at}.rope.scaling.original_context_length", trained)))
    found: list[Floats] = []
    with Model(
        header.path, context=context, threads=threads, embeddings=embedder, kv_type="f32", flash_attention=False
    ) as model:
        prompts = [
            Prompt(text, model.tokenize(text, add_special=True, parse_special=False)[: min(length, context)])
            for text, length in _TEXTS
        ]
        prompts = [prompt for prompt in prompts if prompt.ids]
        for done, prompt in enumerate(prompts, 1):
            found.append(model.embed([prompt.ids])[0] if embedder else model.logits([prompt.ids])[0])
            progress(done, 2 * len(prompts))
    return prompts, found


def _run_transformers(
    source: str, prompts: Sequence[Prompt], pooling: str | None, threads: int, progress: Progress
) -> list[Floats]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    loader = transformers.AutoModelForCausalLM if pooling is None else transformers.AutoModel
    try:
        model = loader.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StepError(f"{source}: transformers can't load it: {reason[0][:300]}") from error
    rows = int(model.get_input_embeddings().weight.shape[0])
    if any(max(prompt.ids) >= rows for prompt in prompts):
        raise ConformanceError(
            f"logits: the GGUF's vocabulary gives token {max(max(prompt.ids) for prompt in prompts)}, and the source's "
            f"embedding has {rows} rows: they are not of one model"
        )
    found: list[Floats] = []
    with torch.inference_mode():
        for done, prompt in enumerate(prompts, 1):
            output = model(torch.tensor([prompt.ids]), use_cache=False) if pooling is None else None
            if output is not None:
                found.append(output.logits[0].float().numpy())
            else:
                hidden = model(torch.tensor([prompt.ids])).last_hidden_state[0].float().numpy()
                found.append({"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[str(pooling)])
            progress(len(prompts) + done, 2 * len(prompts))
    return found


def _compare_logits(prompts: Sequence[Prompt], theirs: Sequence[Floats], ours: Sequence[Floats]) -> dict[str, Any]:
    """Mean KL divergence of llama.cpp from transformers, and the largest difference of a log-probability."""
    klds: list[npt.NDArray[np.float64]] = []
    largest = 0.0
    for number, (prompt, reference, found) in enumerate(zip(prompts, theirs, ours, strict=True), 1):
        if reference.shape != found.shape:
            raise ConformanceError(
                f"logits: transformers has {reference.shape[-1]} tokens in its vocabulary, llama.cpp {found.shape[-1]}"
            )
        if not np.isfinite(reference).all() and np.array_equal(np.isfinite(reference), np.isfinite(found)):
            return {
                "compared": False,
                "note": f"the source's own logits are NaN or infinite in transformers, first in text {number}",
            }
        kld = np.empty(len(reference))
        for position in range(len(reference)):  # row by row: float64 copies of a 256k vocabulary are large
            expected, actual = _log_softmax(reference[position]), _log_softmax(found[position])
            kld[position] = (np.exp(expected) * (expected - actual)).sum()
            largest = max(largest, float(np.abs(expected - actual).max()))
        klds.append(kld)
        if not kld.mean() <= MAX_MEAN_KLD:  # not finite is a difference too
            raise _disagreement(number, prompt, kld, reference, found)
    every = np.concatenate(klds)
    return {
        "mean_kld": float(every.mean()),
        "max_abs_dlogp": largest,
        "texts": len(prompts),
        "positions": len(every),
    }


def _log_softmax(row: Floats) -> npt.NDArray[np.float64]:
    shifted = row.astype(np.float64) - float(row.max())
    values: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return values


def _disagreement(
    number: int, prompt: Prompt, kld: npt.NDArray[np.float64], reference: Floats, found: Floats
) -> ConformanceError:
    """The first position beyond the limit, and what it says about the cause."""
    first = int(np.argmax(~(kld <= MAX_MEAN_KLD)))
    tops = int(np.argmax(reference[first])), int(np.argmax(found[first]))
    cause = (
        "the first position differs, so weights, norms or activations do"
        if first == 0
        else f"positions before {first} agree, so rotary embedding, mask or window may be at fault"
    )
    return ConformanceError(
        f"logits: text {number} ({prompt.text[:32]!r}), position {first} of {len(kld)}: KL divergence "
        f"{kld[first]:.3g} nats (mean {kld.mean():.3g}, expected below {MAX_MEAN_KLD:g}); likeliest token "
        f"{tops[0]} in transformers, {tops[1]} in llama.cpp",
        hint=f"{cause}; please report the model",
    )


def _compare_embeddings(prompts: Sequence[Prompt], theirs: Sequence[Floats], ours: Sequence[Floats]) -> dict[str, Any]:
    cosines, largest = [], 0.0
    for number, (prompt, reference, found) in enumerate(zip(prompts, theirs, ours, strict=True), 1):
        if reference.shape != found.shape:
            raise ConformanceError(f"embeddings: transformers gives {reference.size} values, llama.cpp {found.size}")
        a, b = reference.astype(np.float64), found.astype(np.float64)
        cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        if not cosine >= MIN_COSINE:
            raise ConformanceError(
                f"embeddings: text {number} ({prompt.text[:32]!r}): cosine {cosine:.6f} between transformers and "
                f"llama.cpp; expected at least {MIN_COSINE}",
                hint="Pooling, positions or weights differ; please report the model.",
            )
        cosines.append(cosine)
        largest = max(largest, float(np.abs(a - b).max()))
    return {"min_cosine": min(cosines), "max_abs_difference": largest, "texts": len(prompts)}
