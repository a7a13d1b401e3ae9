"""How far outputs are from those of the full model: KL divergence of next tokens, or cosine distance of vectors."""

from __future__ import annotations

from typing import Any

import torch

_ROWS = 256  # positions compared at once: a few MB for a vocabulary of thousands


class Reference:
    """Outputs of the full model on one batch.

    Args:
        outputs: Logits `[positions, vocabulary]`, or vectors `[texts, width]`.
        vectors: They are vectors.
    """

    def __init__(self, outputs: torch.Tensor, *, vectors: bool) -> None:
        self.count = len(outputs)
        self._vectors = vectors
        self._kept = outputs if vectors else torch.log_softmax(outputs, dim=-1)

    def distance(self, outputs: torch.Tensor) -> float:
        """Sum over positions of KL(full || other) in nats, or over texts of 1 - cosine.

        Args:
            outputs: Of the same form.
        """
        if self._vectors:
            return float((1 - torch.cosine_similarity(self._kept, outputs, dim=-1)).sum(dtype=torch.float64))
        return float(divergence(self._kept, outputs).sum(dtype=torch.float64))


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of every position in nats.

    Args:
        reference: Log-probabilities `[positions, vocabulary]`.
        logits: Of the candidate, same shape.
    """
    found: list[Any] = []
    for kept, other in zip(reference.split(_ROWS), logits.split(_ROWS), strict=True):
        found.append((kept.exp() * (kept - torch.log_softmax(other, dim=-1))).sum(-1))
    return torch.cat(found)
