"""Find the smallest and fastest quantization of an encoder that keeps its fidelity budgets.

Every recipe asked for is carried out, run in onnxruntime on sentences that nothing was calibrated on, and compared with
the float32 graph. A recipe that misses is repaired: its parts (products that share an activation, embeddings,
convolutions) are improved one at a time to see how much of the error each accounts for, and then the smallest set, by
error removed per unit of work, with which the budgets hold is found by bisection. First by more precision within the
recipe (`finer` in `quantize.py`), then by leaving parts in float32. Of what meets the budgets, the least product of
bytes and time wins.

Nothing here knows a model: all-MiniLM-L6-v2 gets what it gets because of what was measured. Runs in a worker only.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import ConformanceError, EdgepackError, StepError, UsageError
from edgepack.measure.encoder_samples import Sample
from edgepack.onnx.calibrate import feed, read_samples
from edgepack.onnx.export import DATA, MODEL
from edgepack.onnx.judge import Judge, Score, misses
from edgepack.onnx.parts import Part, parts
from edgepack.onnx.quantize import CALIBRATION_SAMPLES, Workshop, check_shapes
from edgepack.onnx.recipes import DEFAULT_BUDGETS, Recipe, recipe_named
from edgepack.onnx.rewrite import read_graph
from edgepack.runtimes.onnxruntime import CPU, NO_SPINNING, Session
from edgepack.worker import Progress

JUDGED = 300  # samples a candidate is compared on: three beyond a 1 % quantile
_PROBED = 32  # of them, for the error of one part: a mean over values, which needs fewer
_RESERVE = 0.1  # a candidate has to be this much nearer to 1 than asked: other text will be a little harder
TOKENS = 64  # of the timed input where nothing else is asked for; images are as large as they are
_ROUNDS, _RUNS, _WARMUPS = 3, 15, 3


@dataclass(frozen=True)
class Candidate:
    """A quantized model.

    Args:
        row: The recipe.
        finer: Nodes with more precision.
        keep: Nodes in float32.
        folder: Where it lies.
        made: What `Workshop.make` says of it.
        score: What was measured.
        latency_ms: Median time of one input; 0: not timed.
    """

    row: Recipe
    finer: frozenset[str]
    keep: frozenset[str]
    folder: Path
    made: Mapping[str, Any]
    score: Score
    latency_ms: float = 0.0

    @property
    def bytes(self) -> int:
        """Of all files."""
        return int(self.made["bytes"])

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        return {
            "recipe": self.row.name,
            "kept": sorted(self.keep),
            "finer": sorted(self.finer),
            "bytes": self.bytes,
            "error": self.score.error,
            **self.score.values,
            "latency_ms_p50": self.latency_ms or None,
        }


def choose(
    *,
    model: str,
    folder: str,
    source: str,
    task: str,
    recipes: Sequence[str],
    budgets: Mapping[str, Mapping[str, float]],
    text: str | None,
    arch: str = "x86_64",
    threads: int = 1,
    provider: str = CPU,
    pairs: bool = False,
    tokens: int = TOKENS,
    progress: Progress,
) -> dict[str, Any]:
    """Choose a recipe, repair it where it misses, and write the winner.

    Args:
        model: Folder with the float32 export.
        folder: An existing folder for the result.
        source: Folder with tokenizer.json.
        task: What the graph does (`tasks.py`); it decides what is measured.
        recipes: Names of rows of `recipes.RECIPES`, the preferred ones first.
        budgets: Measurement name -> {"min" or "max": limit}: `cosine_mean`, `cosine_p01`, `neighbour_agreement`,
            `label_agreement`, `rank_agreement`, `artifact_bytes`, `latency_ms_p50`. Other names are other steps'
            business. Fidelity that is not mentioned gets `DEFAULT_BUDGETS`.
        text: Calibration text, or `.npy` of images; some of it calibrates, the rest judges. None for a graph
            that reads images: recipes that need calibration are left out, and synthetic images judge the others.
        arch: `x86_64` or `arm64`.
        threads: Of onnxruntime.
        provider: Execution provider the model is for. Candidates are judged on the CPU.
        pairs: The graph classifies two texts.
        tokens: Of the timed input.
        progress: In steps; the total grows when a recipe has to be repaired.

    Returns:
        What `quantize` returns of the winner, and `search`: `met` (whether all budgets hold), `missed` (those that
        don't, with what was reached), `candidates` (chosen first, then the runner-up), `left_out` (recipe -> why),
        `budgets`, `samples`, `judged_on`, `threads`, `tokens`.

    Raises:
        UsageError: Unknown recipe; data missing; a recipe that needs fixed shapes for a graph with free axes.
        InputRefused: The graph or the data is unsound.
        StepError: No recipe could be carried out.
    """
    rows = [recipe_named(name) for name in recipes]
    if not rows:
        raise UsageError("recipes: none given, expected at least one")
    graph = read_graph(Path(model))
    for row in rows:
        check_shapes(row, graph)
    images = any(port.name == "pixel_values" for port in graph.inputs)
    left_out = {}
    if text is None:  # of images there are synthetic ones to judge on; ranges are not taken from those
        left_out = {row.name: "needs calibration data, and none was given" for row in rows if row.needs_calibration}
        rows = [row for row in rows if not row.needs_calibration]
        if left_out and (not images or not rows):
            raise UsageError(
                f"{', '.join(left_out)}: needs calibration data, and none was given",
                hint="Name a text, or an .npy of preprocessed images, with --calibration.",
            )
    count = CALIBRATION_SAMPLES + JUDGED
    samples = read_samples(text, Path(source), graph.inputs, count, task=task, pairs=pairs)
    calibrating, judging = _divided(samples)
    feeds = [feed(sample, graph.inputs) for sample in calibrating]
    limits = {name: {"min": least} for name, least in DEFAULT_BUDGETS.items()}
    limits |= {name: dict(limit) for name, limit in budgets.items()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        workshop = Workshop(Path(model), graph, feeds, arch, provider, threads)
        judge = Judge(Path(model) / MODEL, judging, task, threads, single=pairs)
        search = _Search(workshop, judge, limits, Path(scratch), tokens, progress, left_out)
        return search.run(rows, Path(folder), "images" if images and text else "synthetic images" if images else "text")


def _divided(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate on, spread over the whole text (its beginning may be about one thing), and the others to
    judge on. Of a short text an eighth calibrates.
    """
    count = min(CALIBRATION_SAMPLES, max(1, len(samples) // 8))
    chosen = set(range(0, len(samples), max(1, len(samples) // count))[:count])
    rest = [sample for place, sample in enumerate(samples) if place not in chosen]
    return [samples[place] for place in sorted(chosen)], rest or list(samples)


@dataclass
class _Search:
    """The state of one search."""

    workshop: Workshop
    judge: Judge
    limits: Mapping[str, Mapping[str, float]]
    scratch: Path
    tokens: int
    progress: Progress
    left_out: dict[str, str] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    def run(self, rows: Sequence[Recipe], folder: Path, judged_on: str) -> dict[str, Any]:
        """Try all recipes, repair what misses, pick the winner and move it to `folder`."""
        self.total = 2 * len(rows) + 1
        found: list[Candidate] = []
        failures: list[EdgepackError] = []
        for row in rows:
            try:
                found.append(self._make(row))
            except (StepError, ConformanceError) as error:  # that one recipe fails is no reason to take none
                failures.append(error)
                self.left_out[row.name] = error.message
        if not found:
            raise failures[0]
        timed = self._time(found)
        repaired = []
        for candidate in sorted(timed, key=_cost):
            self._step()
            if self._worth_repairing(candidate, timed):
                repaired.append(self._repair(candidate))
        if repaired:
            timed = self._time([*found, *repaired])
        ranking = self._ranking(timed)
        winner = ranking[0]
        for path in folder.iterdir():
            if path.name in (MODEL, DATA):
                path.unlink()
        for name in winner.made["files"]:
            shutil.move(winner.folder / name, folder / name)
        self._step()
        missed = misses(self._values(winner), self.limits)
        return {
            **winner.made,
            "search": {
                "met": not missed,
                "missed": missed,
                "candidates": [candidate.as_json() for candidate in ranking],
                "left_out": self.left_out,
                "budgets": {name: dict(limit) for name, limit in self.limits.items() if name in self._values(winner)},
                "samples": len(self.judge.samples),
                "judged_on": judged_on,
                "threads": self.workshop.threads,
                "tokens": self.tokens,
            },
        }

    def _step(self, more: int = 0) -> None:
        self.total += more
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def _make(self, row: Recipe, finer: frozenset[str] = frozenset(), keep: frozenset[str] = frozenset()) -> Candidate:
        """Carry a recipe out and measure it on all samples."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        made = self.workshop.make(folder, row, keep, finer, lambda done, total: None)
        self._step()
        return Candidate(row, finer, keep, folder, made, self.judge.score(folder / MODEL))

    def _values(self, candidate: Candidate) -> dict[str, float]:
        values = {**candidate.score.values, "artifact_bytes": float(candidate.bytes)}
        return values | ({"latency_ms_p50": candidate.latency_ms} if candidate.latency_ms else {})

    def _holds(self, candidate: Candidate) -> bool:
        """Whether it meets the budgets, with something to spare."""
        return not misses(self._values(candidate), self.limits, reserve=_RESERVE)

    def _keeps(self, candidate: Candidate) -> bool:
        """Whether its fidelity is enough, with something to spare."""
        return not misses(candidate.score.values, self.limits, reserve=_RESERVE)

    def _worth_repairing(self, candidate: Candidate, found: Sequence[Candidate]) -> bool:
        """It misses, could win, and there is something to improve. Repairs cost: what is no cheaper than one that
        holds, or no better than one of its own kind, stays as it is.
        """
        if self._keeps(candidate) or candidate.row.method in ("float", "half"):
            return False
        kind = candidate.row.method, candidate.row.weight_bits
        alike = [other for other in found if (other.row.method, other.row.weight_bits) == kind]
        cheapest = min((_cost(other) for other in found if self._holds(other)), default=float("inf"))
        return candidate is min(alike, key=lambda other: other.score.error) and _cost(candidate) < cheapest

    def _repair(self, candidate: Candidate) -> Candidate:
        """Improve parts until fidelity is enough; the best that was reached if it never is."""
        row, best = candidate.row, candidate
        pieces = parts(self.workshop.graph, row)
        for what in ("finer", "keep") if row.has_finer else ("keep",):
            order = self._by_gain(best, pieces, what)
            reached = self._fewest(best, order, what)
            if self._keeps(reached):
                return reached
            best = min((best, reached), key=lambda one: one.score.error)
        return best

    def _by_gain(self, base: Candidate, pieces: Sequence[Part], what: str) -> list[Part]:
        """Parts by the error each removes per unit of work. Those that remove none come last when the end is float32,
        which is exact once all are there, and are left out otherwise.
        """
        start = self.judge.error(base.folder / MODEL, _PROBED)
        gains: dict[Part, float] = {}
        self.total += len(pieces)
        for piece in pieces:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                finer, keep = self._improved(base, [piece], what)
                self.workshop.make(Path(folder), base.row, keep, finer, lambda done, total: None)
                gains[piece] = start - self.judge.error(Path(folder) / MODEL, _PROBED)
            self._step()
        helping = [piece for piece, gain in gains.items() if gain > 0 or what == "keep"]
        return sorted(helping, key=lambda piece: gains[piece] / piece.cost(what), reverse=True)

    def _fewest(self, base: Candidate, order: Sequence[Part], what: str) -> Candidate:
        """The shortest beginning of `order` with which fidelity is enough; all of it if none is."""
        if not order:
            return base
        low, high = 0, len(order)
        best = self._make(base.row, *self._improved(base, order, what))
        if not self._keeps(best):
            return best
        while high - low > 1:
            middle = (low + high) // 2
            self.total += 1
            candidate = self._make(base.row, *self._improved(base, order[:middle], what))
            if self._keeps(candidate):
                high, best = middle, self._drop(best, candidate)
            else:
                low = middle
                shutil.rmtree(candidate.folder)
        return best

    @staticmethod
    def _drop(old: Candidate, new: Candidate) -> Candidate:
        shutil.rmtree(old.folder)
        return new

    @staticmethod
    def _improved(base: Candidate, pieces: Sequence[Part], what: str) -> tuple[frozenset[str], frozenset[str]]:
        """`finer` and `keep` of a candidate with these parts improved; a part in float32 is not finer as well."""
        nodes = frozenset(node for piece in pieces for node in piece.nodes)
        if what == "finer":
            return base.finer | nodes, base.keep
        return base.finer - nodes, base.keep | nodes

    def _time(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Median latency of each, in turns, so that a slow minute hits all. One model is open at a time."""
        sample = self.judge.long_feed(self.tokens)
        times: list[list[float]] = [[] for _ in found]
        for _ in range(_ROUNDS):
            for candidate, spent in zip(found, times, strict=True):
                session = Session(candidate.folder / MODEL, threads=self.workshop.threads, config=NO_SPINNING)
                for run in range(_WARMUPS + _RUNS):
                    started = time.perf_counter()
                    session.run(sample)
                    if run >= _WARMUPS:
                        spent.append(time.perf_counter() - started)
        return [
            replace(candidate, latency_ms=1000 * float(np.median(spent)))
            for candidate, spent in zip(found, times, strict=True)
        ]

    def _ranking(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Those that hold by least bytes times milliseconds, then those that just hold, then the others: by least error
        those that fit the device, and then those that don't.
        """
        sizes = {name: limit for name, limit in self.limits.items() if name == "artifact_bytes"}

        def place(one: Candidate) -> tuple[int, float]:
            values = self._values(one)
            if not misses(values, self.limits):
                return (1 if misses(values, self.limits, reserve=_RESERVE) else 0), _cost(one)
            return (3 if misses(values, sizes) else 2), one.score.error

        return sorted(found, key=place)


def _cost(candidate: Candidate) -> float:
    """Bytes times milliseconds: half the size is worth twice the time."""
    return candidate.bytes * candidate.latency_ms
