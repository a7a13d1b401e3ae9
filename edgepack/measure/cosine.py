"""How much of an embedder an artifact keeps: cosines between its vectors and the source's, and neighbours kept.

Sentences come from the start of the evaluation text, each encoded with the model's own special tokens and pooling. The
95 % intervals come from a bootstrap over sentences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import ConformanceError
from edgepack.measure import bootstrap
from edgepack.measure.bootstrap import Estimate
from edgepack.measurement import Measurement
from edgepack.text import sentences
from edgepack.worker import Progress

_TOGETHER = 16  # sentences encoded in one call: they share 512-token batches

Floats = npt.NDArray[np.float32]


def embedder_rows(
    reference: str, candidate: str, content: str, count: int, longest: int, threads: int, progress: Progress
) -> dict[str, Any]:
    """Measure the vectors of `candidate` against those of `reference`.

    Args:
        reference: Full-precision GGUF of the source.
        candidate: The artifact.
        content: Evaluation text.
        count: Most sentences.
        longest: Tokens per sentence; longer ones are cut.
        threads: Threads for llama.cpp.
        progress: In sentences, over both models.

    Returns:
        `rows` with `cosine_mean`, `cosine_p01` (1 % quantile) and `neighbour_agreement` (share of sentences whose
        nearest other sentence is the same one), and the number of `sentences`.

    Raises:
        ConformanceError: The vectors differ in width, or the candidate's are not finite.
    """
    texts = sentences(content, count)
    source = _vectors(reference, texts, longest, threads, progress, 0)
    found = _vectors(candidate, texts, longest, threads, progress, len(texts))
    if source.shape != found.shape:
        raise ConformanceError(
            f"the artifact's vectors have {found.shape[1]} values, its reference's {source.shape[1]}"
        )
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        raise ConformanceError(
            f"the artifact gives NaN or infinite vectors for {int(bad.sum())} of {len(texts)} sentences"
        )
    note = f"{len(texts)} sentences against the source in llama.cpp"
    rows = [
        Measurement(name, estimate.value, "1", n=len(texts), ci95=estimate.ci95, note=note).as_json()
        for name, estimate in vector_estimates(source, found).items()
    ]
    return {"rows": rows, "sentences": len(texts)}


def vector_estimates(source: Floats, found: Floats) -> dict[str, Estimate]:
    """How alike two sets of vectors are, `[samples, width]` each: the three rows of the module's description."""
    source, found = _unit(source), _unit(found)
    cosines = (source * found).sum(axis=1, dtype=np.float64)[:, None]
    kept = (_neighbours(source) == _neighbours(found)).astype(np.float64)[:, None]
    return {
        "cosine_mean": bootstrap.mean(cosines),
        "cosine_p01": bootstrap.quantile(cosines, 0.01),
        "neighbour_agreement": bootstrap.mean(kept),
    }


def _vectors(path: str, texts: list[str], longest: int, threads: int, progress: Progress, before: int) -> Floats:
    """Pooled vectors `[sentences, width]`."""
    from edgepack.runtimes.llama_cpp import Model

    parts = []
    with Model(path, context=longest, threads=threads, batch=longest, sequences=_TOGETHER, embeddings=True) as model:
        ids = [model.tokenize(text, add_special=True, parse_special=False) for text in texts]
        for start in range(0, len(ids), _TOGETHER):
            parts.append(model.embed([_cut(one, longest) for one in ids[start : start + _TOGETHER]]))
            progress(before + min(len(ids), start + _TOGETHER), 2 * len(ids))
    return np.concatenate(parts)


def _cut(ids: list[int], longest: int) -> list[int]:
    """Cut in front of the last token, which closes the sequence (SEP, EOS)."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]


def _unit(vectors: Floats) -> Floats:
    length: Floats = np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32)
    unit: Floats = (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit


def _neighbours(vectors: Floats) -> npt.NDArray[np.int64]:
    """Index of the most similar other vector."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    nearest: npt.NDArray[np.int64] = similar.argmax(axis=1)
    return nearest
