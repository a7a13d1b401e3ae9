"""What every step of pruning took away and what it cost: sizes from headers, fidelity in transformers, float32.

Decoders: windows of evaluation text, positions in their second half, as `edgepack/measure/fidelity.py` scores them.
Encoders: sentences, cosine to the full model's vectors. Where tokens were dropped, the windows are those of the smaller
tokenizer, the full model reads the same tokens, and its distribution is taken over the tokens that stay; how much of it
that is, is a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgepack.figures import significant
from edgepack.measure import bootstrap
from edgepack.prune.anatomy import Anatomy
from edgepack.prune.cut import Piece
from edgepack.prune.likeness import divergence
from edgepack.prune.running import Batch, Running
from edgepack.worker import Progress, no_progress

_FLOATS = ("F32", "F16", "BF16", "F64")


def size_of(pieces: Iterable[Piece], anatomy: Anatomy, *, output_rows: int) -> dict[str, int]:
    """Bytes of weights, parameters, and floating-point operations per token.

    Operations are two for each weight of a matrix that every token is multiplied by: those of the layers, and the
    output matrix of a decoder. Products of attention scores, which grow with the context, are not in it.

    Args:
        pieces: All tensors.
        anatomy: Of the model.
        output_rows: Rows of a decoder's output matrix, the vocabulary; 0 for encoders.
    """
    nbytes = parameters = multiplied = output = 0
    for piece in pieces:
        nbytes += piece.nbytes
        parameters += piece.parameters if piece.info.dtype in _FLOATS else 0
        if len(piece.shape) == 2 and anatomy.place(piece.info.name) is not None:
            multiplied += piece.parameters
        if len(piece.shape) == 2 and piece.shape[0] == output_rows:
            output = piece.parameters  # tied: the embedding; else the last of both, of one size
    return {
        "bytes": nbytes,
        "parameters": parameters,
        "flops_per_token": 2 * (multiplied + output),
    }


@dataclass
class Scores:
    """Values of all scored positions (or texts), batch after batch."""

    kld: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)
    same: list[torch.Tensor] = field(default_factory=list)
    cosine: list[torch.Tensor] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Means with 95 % confidence intervals over batches."""
        if self.cosine:
            values = torch.cat(self.cosine).double().numpy()[:, None]
            found = bootstrap.mean(values)
            low = float(np.quantile(values, 0.01))
            return {"cosine_mean": _short(found.value), "cosine_p01": _short(low), "ci95": _ends(found.ci95)}
        row: dict[str, Any] = {}
        if self.kld:
            found = bootstrap.mean(_table(self.kld))
            row = {"mean_kld": _short(found.value), "ci95": _ends(found.ci95)}
            row["top1_agreement"] = _short(bootstrap.mean(_table(self.same)).value)
        return row | {"perplexity": _short(math.exp(float(torch.cat(self.nll).mean(dtype=torch.float64))))}


def _table(parts: Sequence[torch.Tensor]) -> Any:
    return torch.stack(list(parts)).double().numpy()


def _short(value: float | None) -> float | None:
    return None if value is None else significant(value)


def _ends(ends: Sequence[float] | None) -> list[float | None] | None:
    return None if ends is None else [_short(end) for end in ends]


@dataclass(frozen=True)
class Stage:
    """A state of the model to be measured.

    Args:
        name: The step that led to it.
        running: The model that is run.
        state: Puts it into the state for a while.
        tokens: The tokens that stay, by the full model's ids; None for all.
        own_ids: It numbers them anew; else it is the full model, whose other tokens are left out of account.
    """

    name: str
    running: Running
    state: Callable[[], AbstractContextManager[None]]
    tokens: torch.Tensor | None = None
    own_ids: bool = False


def measure(
    full: Running,
    stages: Sequence[Stage],
    batches: Sequence[Batch],
    *,
    first: int,
    stop: int,
    tokens: torch.Tensor | None = None,
    progress: Progress = no_progress,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure stages against the full model, batch by batch, so that memory holds outputs of one.

    Args:
        full: The full model.
        stages: In their order.
        batches: Inputs in the full model's ids, one window each for decoders.
        first: First scored position of a window.
        stop: One past the last.
        tokens: Full model's ids of the tokens that stay in the end; None for all.
        progress: In batches.

    Returns:
        Rows of the full model, and of every stage.
    """
    own, found = Scores(), [Scores() for _ in stages]
    mass: list[torch.Tensor] = []
    number = None if tokens is None else {old: new for new, old in enumerate(tokens.tolist())}
    for done, batch in enumerate(batches, 1):
        reference = full.outputs(batch)
        targets = None if "attention_mask" in batch else batch["input_ids"][0, first + 1 : stop + 1]
        if targets is not None:
            log = torch.log_softmax(reference, dim=-1)
            own.nll.append(-log.gather(1, targets[:, None])[:, 0])
            if tokens is not None:
                mass.append(log[:, tokens].exp().sum(-1))
        for stage, scores in zip(stages, found, strict=True):
            fed, aim, against = batch, targets, reference
            if stage.tokens is not None and number is not None:
                fed = {**batch, "input_ids": _mapped(batch["input_ids"], number)} if stage.own_ids else batch
                aim = None if targets is None else _mapped(targets, number)
                against = reference if targets is None else reference[:, stage.tokens]
            with stage.state():
                outputs = stage.running.outputs(fed)
            if aim is not None and stage.tokens is not None and not stage.own_ids:
                outputs = outputs[:, stage.tokens]
            if aim is None:
                scores.cosine.append(torch.cosine_similarity(reference, outputs, dim=-1))
                continue
            scores.kld.append(divergence(torch.log_softmax(against, dim=-1), outputs))
            scores.same.append((outputs.argmax(-1) == against.argmax(-1)).float())
            scores.nll.append(-torch.log_softmax(outputs, dim=-1).gather(1, aim[:, None])[:, 0])
        progress(done, len(batches))
    before = own.as_json() if own.nll else {}
    if mass:
        before["probability_of_kept_tokens"] = _short(float(torch.cat(mass).mean()))
    return before, [scores.as_json() for scores in found]


def _mapped(ids: torch.Tensor, number: Mapping[int, int]) -> torch.Tensor:
    return torch.tensor([number[old] for old in ids.flatten().tolist()]).reshape(ids.shape)
