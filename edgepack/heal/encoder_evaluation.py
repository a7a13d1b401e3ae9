"""What healing an encoder brought on text that nothing was tuned on, sentence by sentence, in transformers.

Samples and rows are those of `edgepack/measure/encoder_fidelity.py`, so that a package made of the healed model is
measured by the same names: cosines and neighbours of vectors, labels of classifiers, order of scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgepack.checkpoint import Checkpoint
from edgepack.figures import significant
from edgepack.heal.encoder_model import Encoder
from edgepack.measure.encoder_fidelity import Outputs, estimates, reduced
from edgepack.measure.encoder_samples import Sample, text_samples

SENTENCES = 500
LONGEST = 256  # tokens of a sample


class Evaluation:
    """Evaluation text as a task wants it, and what the teacher makes of it.

    Args:
        teacher: The teacher.
        checkpoint: Whose tokenizer.
        content: The text.
        longest: Most tokens of a sample.

    Raises:
        InputRefused: Fewer than two sentences.
    """

    def __init__(self, teacher: Encoder, checkpoint: Checkpoint, content: str, longest: int) -> None:
        self._teacher = teacher
        self._samples = text_samples(
            teacher.task.name,
            content,
            SENTENCES,
            checkpoint.path / "tokenizer.json",
            longest=min(longest, LONGEST),
            pairs=teacher.single,
        )
        self._expected = [_outputs(teacher, sample) for sample in self._samples]

    def row(self, student: Encoder) -> dict[str, Any]:
        """How near a student is as it is now: a value for each name, and the 95 % interval of the first."""
        task, single = self._teacher.task.name, self._teacher.single
        results = [
            reduced(task, single, sample, theirs, _outputs(student, sample))
            for sample, theirs in zip(self._samples, self._expected, strict=True)
        ]
        found = estimates(task, single, results)
        row: dict[str, Any] = {name: significant(estimate.value) for name, (estimate, _) in found.items()}
        first, _ = next(iter(found.values()))
        return row | {"ci95": first.ci95 and [significant(end) for end in first.ci95], "samples": len(results)}


def _outputs(encoder: Encoder, sample: Sample) -> Outputs:
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if encoder.types else ()))
    device = next(encoder.model.parameters()).device
    with torch.no_grad():
        answers, _ = encoder.read({name: torch.from_numpy(sample.inputs[name]).to(device) for name in names})
    return [np.asarray(answer.cpu().numpy()) for answer in answers]
