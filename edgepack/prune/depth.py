"""Which layers a model can best do without.

    influence  1 - mean cosine of what a layer is given and what it makes of it: one pass (ShortGPT, arXiv:2403.03853)
    angular    the run of layers over which hidden states turn least: mean of arccos(cosine) / pi (Gromov et al.,
               arXiv:2403.17887; over all positions instead of the last of each text)
    greedy     leave out the layer whose loss moves the outputs least, and again without it (SLEB, arXiv:2402.09025),
               by KL divergence from the full model instead of perplexity; for encoders by cosine of their vectors

Nothing protects first or last layers but their scores. Where the runtime hard-codes a pattern of layers, runs of its
length go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgepack.figures import significant
from edgepack.prune.likeness import Reference
from edgepack.prune.request import Method
from edgepack.prune.running import Running
from edgepack.worker import Progress, no_progress


@dataclass(frozen=True)
class Chosen:
    """Layers to drop, and why.

    Args:
        layers: Their numbers, ascending.
        evidence: What was compared, for reports.
    """

    layers: tuple[int, ...]
    evidence: dict[str, Any]


def choose(
    running: Running,
    references: Sequence[Reference],
    count: int,
    method: Method,
    *,
    run: int = 1,
    stays: Sequence[int] = (),
    progress: Progress = no_progress,
) -> Chosen:
    """Choose layers.

    Args:
        running: The full model on calibration text.
        references: Its outputs, batch by batch.
        count: Layers to drop, a multiple of `run`.
        method: How.
        run: Layers that only go together, neighbours among those that are left.
        stays: Layers that can't go.
        progress: In batches.
    """
    if method == "greedy":
        return _greedy(running, references, count, run, frozenset(stays), progress)
    cosines, turned = _cosines(running, count, progress)
    if method == "angular":
        starts = [at for at in range(len(turned)) if not set(range(at, at + count)) & set(stays)]
        start = min(starts, key=lambda at: turned[at])
        evidence = {"angular_distance": {str(at): _round(turned[at]) for at in range(len(turned))}}
        return Chosen(tuple(range(start, start + count)), evidence)
    influence = [1 - value for value in cosines]
    gone: list[int] = []
    while len(gone) < count:
        candidates = _candidates(len(influence), gone, run, frozenset(stays))
        gone += min(candidates, key=lambda layers: sum(influence[number] for number in layers))
    return Chosen(tuple(sorted(gone)), {"block_influence": [_round(value) for value in influence]})


def _greedy(
    running: Running, references: Sequence[Reference], count: int, run: int, stays: frozenset[int], progress: Progress
) -> Chosen:
    layers = len(running.layers)
    gone: list[int] = []
    steps: list[dict[str, Any]] = []
    rounds = [len(_candidates(layers, range(done), run, frozenset())) for done in range(0, count, run)]
    total, done = sum(rounds) * len(references), 0
    positions = sum(reference.count for reference in references)
    while len(gone) < count:
        candidates = _candidates(layers, gone, run, stays)
        scores = dict.fromkeys(candidates, 0.0)
        for batch, reference in zip(running.batches, references, strict=True):
            _, given = running.remember(batch, gone)
            for candidate in candidates:
                # Layers before the candidate are as they were: what it was given goes on to the next that stays.
                with running.resuming(candidate[0], given[candidate[0]], {*gone, *candidate}):
                    scores[candidate] += reference.distance(running.outputs(batch))
                done += 1
                progress(min(done, total), total)
        best = min(candidates, key=lambda layers: scores[layers])
        gone += best
        steps.append(
            {
                "dropped": list(best),
                "distance": _round(scores[best] / positions),
                "candidates": {_named(layers): _round(score / positions) for layers, score in scores.items()},
            }
        )
    return Chosen(tuple(sorted(gone)), {"rounds": steps})


def _candidates(layers: int, gone: Sequence[int], run: int, stays: frozenset[int]) -> list[tuple[int, ...]]:
    """Runs of neighbours among the layers that are left."""
    left = [number for number in range(layers) if number not in set(gone)]
    found = [tuple(left[at : at + run]) for at in range(len(left) - run + 1)]
    return [layers for layers in found if not stays & set(layers)]


def _cosines(running: Running, count: int, progress: Progress) -> tuple[list[float], list[float]]:
    """Mean cosine over each layer, and mean angle (in half turns) over each run of `count` layers."""
    layers = len(running.layers)
    cosines, angles, positions = [0.0] * layers, [0.0] * (layers - count + 1), 0
    for done, batch in enumerate(running.batches, 1):
        _, given = running.remember(batch)
        real = batch.get("attention_mask")
        states = [hidden.flatten(0, 1) if real is None else hidden[real.bool()] for hidden in given]
        positions += len(states[0])
        for number in range(layers):
            cosines[number] += _cosine(states[number], states[number + 1]).sum().item()
        for number in range(layers - count + 1):
            cosine = _cosine(states[number], states[number + count]).clamp(-1, 1)
            angles[number] += (torch.arccos(cosine) / math.pi).sum().item()
        progress(done, len(running.batches))
    return [value / positions for value in cosines], [value / positions for value in angles]


def block_influence(running: Running, progress: Progress = no_progress) -> list[float]:
    """1 - mean cosine of what each layer is given and gives, over all positions."""
    return [1 - value for value in _cosines(running, 1, progress)[0]]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(a.double(), b.double(), dim=-1)


def _named(layers: tuple[int, ...]) -> str:
    return "+".join(map(str, layers))


def _round(value: float) -> float:
    return significant(value)


def set_distance(running: Running, references: Sequence[Reference], gone: Sequence[int]) -> float:
    """Mean distance of outputs from the full model's with some layers left out.

    Args:
        running: The full model on some text.
        references: Its outputs, batch by batch.
        gone: Layers left out.
    """
    with running.without(gone):
        total = sum(
            reference.distance(running.outputs(batch))
            for batch, reference in zip(running.batches, references, strict=True)
        )
    return total / sum(reference.count for reference in references)
