"""How much of the source model a decoder package for onnxruntime-genai keeps: the rows of `fidelity.py`, exactly.

The same text, tokens, windows, scored positions, mathematics and intervals as for a GGUF (see `fidelity.py`), so that
packages of one model in both formats can be compared. The package runs in onnxruntime-genai itself, window by window,
from an empty cache, as an app's prompt does. The reference is the source folder in transformers, float32, in the same
process; or its float32 GGUF in llama.cpp, where one is at hand: the two agree to 1e-6 nats (a test holds them to it).

Memory: both models, and the logits of one window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.conform.tokens import load_tokenizer, open_reference
from edgepack.errors import ConformanceError, UsageError
from edgepack.measure.details import Watch
from edgepack.measure.divergence import Scores, score
from edgepack.measure.fidelity import fidelity_rows, join, open_model
from edgepack.measure.token_text import token_bytes
from edgepack.runtimes.genai import Decoder
from edgepack.strict_json import parse_object
from edgepack.text import read_text, text_sha256
from edgepack.text import windows as cut
from edgepack.worker import Progress, no_progress

Floats = npt.NDArray[np.float32]
Logits = Callable[[Sequence[int], int, int], Floats]


def decoder_fidelity(
    *,
    candidate: str,
    source: str,
    text: str,
    windows: int,
    window_tokens: int,
    threads: int,
    reference_gguf: str | None = None,
    provider: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure a decoder package against its source on a text (worker function).

    Args:
        candidate: Folder with genai_config.json and the model.
        source: The Hugging Face folder: the tokenizer, and the reference unless `reference_gguf` is given.
        text: Path of a UTF-8 text of at least two windows.
        windows: Most windows.
        window_tokens: Tokens per window.
        threads: Threads for both models and for the comparison.
        reference_gguf: A full-precision GGUF of the source, to be the reference instead.
        provider: What onnxruntime-genai runs the package on.
        progress: In windows.

    Returns:
        `rows`, `windows`, `tokens`, `text_sha256`, `reference_type` and `details` as `fidelity.fidelity` returns them,
        `reference_engine`, and the `settings` of the runtime.

    Raises:
        InputRefused: The text is too short, the package or the source is unsound.
        UsageError: Windows longer than the model was made for.
        MissingError: onnxruntime-genai or the provider is missing.
        ConformanceError: Package and source have different vocabularies, or only the package gives NaN.
        StepError: One of them can't be loaded or run.
    """
    content = read_text(text)
    tokens, bos = source_tokens(Path(source), content)
    pieces = cut(tokens, window_tokens, windows)
    first, stop = window_tokens // 2, window_tokens - 1
    scores: list[Scores] = []
    watch = Watch(stop - first)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        package = stack.enter_context(_open(candidate, window_tokens, threads, provider))
        reference, kind, engine = _reference(stack, source, reference_gguf, content, tokens, window_tokens, threads)
        for done, ids in enumerate(pieces, 1):
            fed = ids if bos is None else [bos, *ids[1:]]
            found, expected = package.logits(fed, first, stop), np.array(reference(fed, first, stop))
            _same_shape(found, expected)
            targets = np.array(ids[first + 1 : stop + 1], dtype=np.int64)
            scores.append(score(found, targets, reference=expected, pool=pool))
            watch.see(scores[-1], found, expected)
            progress(done, len(pieces))
    rows = fidelity_rows(join(scores), stop - first, f"the {kind} source in {engine}", window_tokens)
    details = watch.details(join(scores), pieces, token_bytes(Path(source)))
    return ({} if details is None else {"details": details}) | {
        "rows": [row.as_json() for row in rows],
        "windows": len(pieces),
        "tokens": len(pieces) * (stop - first),
        "text_sha256": text_sha256(content),
        "reference_type": kind,
        "reference_engine": engine,
        "settings": package.settings,
    }


def source_tokens(source: Path, content: str) -> tuple[list[int], int | None]:
    """The text as the source's tokenizer reads it, special tokens around it but none inside, and its BOS.

    Args:
        source: The model folder.
        content: The text.

    Returns:
        Token ids; the token that starts every sequence, None where the tokenizer adds none. Both as llama.cpp has them
        for the GGUF of that model (`edgepack/conform/tokens.py` proves it for every GGUF that is built).

    Raises:
        InputRefused: No tokenizer, or one that can't be run.
    """
    reference = open_reference(source)
    before, after = reference.around
    path = source / "tokenizer.json"
    if path.is_file():
        tokenizer = load_tokenizer(parse_object(path.read_bytes(), str(path)), str(path))
        tokenizer.encode_special_tokens = True  # the text is data: "</s>" in it is four characters
        ids = list(tokenizer.encode(content, add_special_tokens=False).ids)
    else:
        ids = reference.encode(content)
    return [*before, *ids, *after], before[0] if before else None


def _open(candidate: str, window_tokens: int, threads: int, provider: str) -> Decoder:
    try:
        return Decoder(candidate, context=window_tokens, threads=threads, provider=provider, spinning=False)
    except UsageError as error:
        if "context" not in error.message:
            raise
        raise UsageError(
            f"measure.window_tokens is {window_tokens}: {error.message}",
            hint="Use --set measure.window_tokens=N with a smaller N.",
        ) from None


def _reference(
    stack: ExitStack,
    source: str,
    gguf: str | None,
    content: str,
    tokens: list[int],
    window_tokens: int,
    threads: int,
) -> tuple[Logits, str, str]:
    """What gives the reference's logits, the type of its weights, and the engine that computes them."""
    if gguf is None:
        from edgepack.measure.source_model import SourceDecoder

        return SourceDecoder(source, threads=threads).logits, "F32", "transformers"
    from edgepack.runtimes.llama_cpp import describe_artifact

    model = open_model(stack, gguf, window_tokens, threads)
    theirs = model.tokenize(content, add_special=True, parse_special=False)
    if theirs != tokens:
        place = next((i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b), len(theirs))
        raise ConformanceError(
            f"{Path(gguf).name} and the source's tokenizer read the evaluation text differently from token {place} on"
        )

    def logits(ids: Sequence[int], first: int, stop: int) -> Floats:
        found: Floats = model.logits([list(ids)], first, stop=stop)[0]
        return found

    return logits, str(describe_artifact(gguf).file_type), "llama.cpp"


def _same_shape(found: Floats, expected: Floats) -> None:
    if found.shape != expected.shape:
        raise ConformanceError(
            f"the package's logits have {found.shape[1]} values for each token, the source's {expected.shape[1]}",
            hint="They are not of one model, or the vocabulary was padded.",
        )
