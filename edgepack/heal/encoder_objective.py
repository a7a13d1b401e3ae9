"""What an encoder is trained towards: the answers of a frozen teacher, and its hidden states on the way there.

    loss = distance of answers + weight x (1 - cosine of hidden states), mean over tokens and pairs of layers

    vectors                    1 - cosine
    labels, masked words       KL(teacher || student), T = 1, mean over tokens
    several labels at once     the same of each label's yes and no
    start and end of answers   the same over the tokens of the text, mean of both
    one score                  squared error

Soft targets: Hinton et al., arXiv:1503.02531; with the cosine of hidden states: DistilBERT (Sanh et al.,
arXiv:1910.01108). Held-out rows are judged by the distance of answers alone. Knows nothing of how rows are made or
which parameters change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from edgepack.heal.encoder_model import Batch, Encoder
from edgepack.heal.encoder_teacher import Teacher
from edgepack.heal.objective import forward_kl, mixed_precision

Answers = Sequence[torch.Tensor]
_NOWHERE = -1e4  # logit of a padding token as start of an answer; finite, so that its gradient is 0 and not NaN


class TowardsEncoder:
    """An objective of `distill` for encoders; windows are packed rows (`encoder_rows.pack`).

    Args:
        teacher: What it says of the training rows.
        student: The student as it was loaded; `loss` is given its model.
        layers: Student's layer -> the teacher's it should be like, from 1; 0 would be the embeddings.
        hidden_weight: Weight of the second term.
    """

    def __init__(self, teacher: Teacher, student: Encoder, layers: Mapping[int, int], hidden_weight: float) -> None:
        self._teacher, self._student = teacher, student
        self._layers, self._weight = dict(layers), hidden_weight
        self._judged: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}

    def loss(self, student: Any, windows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """See `Objective`: mean over rows, each counting alike."""
        batch = self._teacher.batch(windows)
        with mixed_precision(windows.device):
            ours, states = replace(self._student, model=student).read(batch, hidden=True)
        theirs, wanted = self._teacher(windows, places)
        found = answer_distance(self._teacher.encoder, ours, theirs, batch["attention_mask"])
        for (own, _), aim in zip(self._layers.items(), wanted, strict=True):
            found = found + self._weight / len(self._layers) * hidden_distance(states[own], aim, batch)
        return found.mean()

    def score(self, student: Any, windows: torch.Tensor) -> torch.Tensor:
        """Distance of answers for each row, float64, from float32: what the best of a run is chosen by."""
        found = []
        for row in windows[:, None]:  # one by one: the same value whatever it is scored with
            batch = self._teacher.batch(row)
            with torch.no_grad():
                ours, _ = replace(self._student, model=student).read(batch)
                theirs = self._of_teacher(row, batch)
                distance = answer_distance(self._teacher.encoder, ours, theirs, batch["attention_mask"])
            found.append(distance[0].double())
        return torch.stack(found).cpu()

    def _of_teacher(self, row: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The teacher's answer to a held-out row; kept, but for words, which are a whole vocabulary for each token."""
        if self._teacher.encoder.task.name == "fill-mask":
            return self._teacher.encoder.read(batch)[0]
        key = tuple(row[0].tolist())
        if key not in self._judged:
            self._judged[key] = self._teacher.encoder.read(batch)[0]
        return self._judged[key]


def hidden_distance(ours: torch.Tensor, theirs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """1 - cosine of hidden states `[rows, tokens, width]`, mean over the tokens of each row: `[rows]`."""
    return _row_mean(1 - torch.cosine_similarity(ours.float(), theirs.float(), dim=-1), batch["attention_mask"])


def answer_distance(encoder: Encoder, ours: Answers, theirs: Answers, mask: torch.Tensor) -> torch.Tensor:
    """How far answers are from the teacher's, `[rows]`; differentiable in `ours`.

    Args:
        encoder: Says what the answers are.
        ours: From `Encoder.read`.
        theirs: The teacher's.
        mask: `[rows, tokens]`, 0 for padding.
    """
    if encoder.vectors:
        return 1 - torch.cosine_similarity(ours[0], theirs[0], dim=-1)
    if encoder.single:
        return (ours[0] - theirs[0]).square().mean(dim=-1)
    if encoder.task.name == "question-answering":
        pairs = [(a.masked_fill(mask == 0, _NOWHERE), b.masked_fill(mask == 0, _NOWHERE))
                 for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
        return torch.stack([forward_kl(a, b) for a, b in pairs]).mean(dim=0)
    if encoder.task.name == "text-classification":
        if getattr(encoder.model.config, "problem_type", None) == "multi_label_classification":
            each = forward_kl(*(torch.stack([a, torch.zeros_like(a)], -1).flatten(0, 1) for a in (ours[0], theirs[0])))
            return each.view(ours[0].shape).mean(dim=-1)
        return forward_kl(ours[0], theirs[0])
    real = mask.bool()
    found = torch.zeros(mask.shape, device=mask.device)
    return _row_mean(found.masked_scatter(real, forward_kl(ours[0][real], theirs[0][real])), mask)


def _row_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(values.dtype)
    return (values * weights).sum(dim=1) / weights.sum(dim=1)
