"""Compare a quantized graph with the float32 graph: the figures of `measure/encoder_fidelity.py`, and one error.

Both graphs run in onnxruntime on the same samples, batch 1. The figures decide whether budgets hold; the error, the
mean squared difference of all outputs relative to their size, tells candidates apart that the figures can't: a label
agreement of 1 says nothing about how near the next error is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack.errors import ConformanceError
from edgepack.measure import encoder_fidelity as fidelity
from edgepack.measure.encoder_samples import Sample
from edgepack.onnx.calibrate import Feed, feed
from edgepack.runtimes.onnxruntime import NO_SPINNING, Session

Outputs = list[npt.NDArray[Any]]

# Tasks whose outputs have a row for each token: an embedding may happen to be as wide as a fixed input is long.
_BY_TOKEN = ("feature-extraction", "token-classification", "question-answering", "fill-mask")


@dataclass(frozen=True)
class Score:
    """What was measured of a candidate.

    Args:
        values: Measurement name -> value.
        error: Mean over samples of |y - y'|^2 / |y|^2.
    """

    values: Mapping[str, float]
    error: float


class Judge:
    """Holds what the float32 graph answers.

    Args:
        reference: model.onnx in float32.
        samples: What both are run on.
        task: Decides what is compared.
        threads: Of onnxruntime.
        single: A classifier with one score.
    """

    def __init__(self, reference: Path, samples: Sequence[Sample], task: str, threads: int, *, single: bool) -> None:
        self.samples, self.task, self.threads, self.single = list(samples), task, threads, single
        session = Session(reference, threads=threads, config=NO_SPINNING)
        self.inputs = session.inputs
        self.names = [port.name for port in session.outputs]
        self._feeds = [feed(sample, self.inputs) for sample in self.samples]
        self._expected = self._run(session, len(self.samples))
        # A classifier with one score is one that answers with a single number, whatever the caller thinks.
        self.single = task == "text-classification" and self._expected[0][0].size == 1

    def score(self, path: Path) -> Score:
        """Measure a candidate on all samples.

        Raises:
            ConformanceError: Its outputs are not finite.
        """
        found = self._run(Session(path, threads=self.threads, config=NO_SPINNING), len(self.samples))
        results = [
            fidelity.reduced(self.task, self.single, sample, theirs, ours)
            for sample, theirs, ours in zip(self.samples, self._expected, found, strict=True)
        ]
        estimates = fidelity.estimates(self.task, self.single, results)
        values = {name: float(estimate.value) for name, (estimate, _) in estimates.items()}
        return Score(values, _error(self._expected, found))

    def error(self, path: Path, count: int) -> float:
        """The error of a candidate on the first samples."""
        found = self._run(Session(path, threads=self.threads, config=NO_SPINNING), count)
        return _error(self._expected[: len(found)], found)

    def long_feed(self, tokens: int) -> Feed:
        """An input to time: as many tokens as asked for where the graph takes any number; an image as it is."""
        longest = max(self.samples, key=lambda sample: max(array.size for array in sample.inputs.values()))
        if "input_ids" not in longest.inputs:
            return feed(longest, self.inputs)
        port = next(port for port in self.inputs if port.name == "input_ids")
        fixed = (port.shape or (None, None))[1]
        length = min(tokens, fixed) if isinstance(fixed, int) else tokens
        inputs = {name: np.resize(array, (1, length)) for name, array in longest.inputs.items()}
        return feed(Sample(inputs), self.inputs)

    def _run(self, session: Session, count: int) -> list[Outputs]:
        """Outputs of the first samples, without the rows and tokens that fixed shapes added."""
        answers = []
        for sample, fed in zip(self.samples[:count], self._feeds, strict=False):
            found = session.run(fed, self.names)
            own, given = (one["input_ids"].shape[1] if "input_ids" in one else 0 for one in (sample.inputs, fed))
            outputs = []
            for name in self.names:
                array = found[name][:1]
                if not np.isfinite(array).all():
                    raise ConformanceError(f"{session.path}: NaN or infinite {name}")
                tokens = given > own and self.task in _BY_TOKEN and array.shape[1] == given
                outputs.append(array[:, :own] if tokens else array)
            answers.append(outputs)
        return answers


def misses(
    values: Mapping[str, float], limits: Mapping[str, Mapping[str, float]], *, reserve: float = 0.0
) -> dict[str, float]:
    """Budgets that don't hold, with the values that miss them; names that were not measured are no miss.

    Args:
        values: What was measured.
        limits: Name -> {"min" or "max": limit}.
        reserve: Part of the way from a lower limit to 1 that is asked for on top.
    """
    found = {}
    for name, limit in limits.items():
        if name in values:
            low = limit.get("min", -np.inf)
            low = low + reserve * (1 - low) if low <= 1 else low
            if values[name] < low or values[name] > limit.get("max", np.inf):
                found[name] = values[name]
    return found


def _error(expected: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    ratios = []
    for theirs, ours in zip(expected, found, strict=True):
        power = sum(float((a.astype(np.float64) ** 2).sum()) for a in theirs)
        difference = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in zip(theirs, ours, strict=True))
        ratios.append(difference / max(power, np.finfo(np.float64).tiny))
    return float(np.mean(ratios))
