"""What healing brought on text that nothing was tuned on: teacher, student before, student after, in transformers.

Rows are those of `edgepack/prune/evidence.py`: mean KL divergence from the teacher, perplexity, top-1 agreement on the
second half of each window. How much came back is a share of what pruning had cost:

    KLD             1 - KLD(after) / KLD(before)
    log-likelihood  (NLL(before) - NLL(after)) / (NLL(before) - NLL(teacher))

The second can exceed 1: a student that was trained on text like this one may know it better than its teacher did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from edgepack.figures import significant
from edgepack.prune.evidence import Stage, measure
from edgepack.prune.running import Batch, Running

WINDOWS = 16  # as pruning measures its steps


class Evaluation:
    """The evaluation windows, and the teacher to hold students against.

    Args:
        teacher: A causal language model of transformers.
        windows: Token ids, all of one length.
    """

    def __init__(self, teacher: Any, windows: Sequence[Sequence[int]]) -> None:
        device = next(teacher.parameters()).device
        self._batches: list[Batch] = [{"input_ids": torch.tensor([ids], device=device)} for ids in windows]
        length = len(windows[0])
        self._first, self._stop = length // 2, length - 1
        self._teacher = self._running(teacher)

    def rows(self, student: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rows of the teacher and of a student as it is now."""
        student.eval()
        stage = Stage("student", self._running(student), nullcontext)
        teacher, found = measure(self._teacher, [stage], self._batches, first=self._first, stop=self._stop)
        return teacher, found[0]

    def _running(self, model: Any) -> Running:
        layers = int(model.config.get_text_config().num_hidden_layers)
        return Running(model, layers, (), first=self._first, stop=self._stop, pooling=None)


def recovered(teacher: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the lost KL divergence and log-likelihood that came back; None where nothing was lost.

    Args:
        teacher: Row of `Evaluation.rows`.
        before: The same of the student as it was.
        after: The same of the student as it is.
    """
    nll = [math.log(row["perplexity"]) for row in (teacher, before, after)]
    lost = nll[1] - nll[0]
    return {
        "kld": _share(before["mean_kld"] - after["mean_kld"], before["mean_kld"]),
        "log_likelihood": _share(nll[1] - nll[2], lost) if lost > 0 else None,
    }


def _share(back: float, lost: float) -> float | None:
    return significant(back / lost, 4) if lost else None
