"""What the pipeline asks of a format, and the values that go between them.

A backend is a module with the functions of `Backend`; `plugins.py` knows which module serves which format. The pipeline
orders the steps, judges and packages; a backend knows how its format is made, loaded and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgepack.planning import Plan
    from edgepack.predict import Prediction
    from edgepack.source import Source
    from edgepack.targets import Target
    from edgepack.workshop import Exported, Workshop


@dataclass(frozen=True)
class Described:
    """A model as a backend sees it before any work.

    Args:
        architecture: The runtime's name for it.
        parameters: Weights.
        context: Tokens it will be run with.
        embedding: True for a model that gives vectors or labels, not a next token.
        model: The backend's own description, handed back to `candidate`.
        defaults: Budgets, as `table.key=value`, for what the profile says nothing of.
        notes: What a user should know before anything is built, whatever is chosen.
    """

    architecture: str
    parameters: int
    context: int
    embedding: bool
    model: Any = field(default=None, repr=False, compare=False)
    defaults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One quantization with its prediction and the budgets it would miss (filled in by the plan).

    Args:
        quantize: Its name.
        prediction: What it is expected to cost on the target.
        misses: Budgets the prediction misses.
        note: What a user should know before it is built: work that takes long.
    """

    quantize: str
    prediction: Prediction
    misses: tuple[Any, ...] = ()
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The candidate as it stands in `plan.json`."""
        return {
            "quantize": self.quantize,
            **self.prediction.as_json(),
            "misses": [{"budget": m.budget, "predicted": round(m.predicted, 1), "limit": m.limit} for m in self.misses],
            **({"note": self.note} if self.note else {}),
        }


class Backend(Protocol):
    """The functions of a format's module."""

    def describe(self, source: Source, target: Target) -> Described:
        """Describe the model from headers alone; InputRefused when the format can't hold it."""

    def names(self, described: Described, target: Target) -> Sequence[str]:
        """Quantizations to choose from, best first."""

    def candidate(self, described: Described, source: Source, target: Target, quantize: str) -> Candidate:
        """One quantization and its predicted cost; UsageError for an unknown name."""

    def filling(
        self, described: Described, source: Source, target: Target, fits: Callable[[Candidate], bool]
    ) -> tuple[Candidate | None, str | None]:
        """A candidate that fills the budgets better than any of `names`, and a word on why there is none."""

    def export(self, shop: Workshop, source: Source, plan: Plan, stem: str) -> Exported:
        """Write the artifact."""

    def conform(self, shop: Workshop, source: Source, plan: Plan, exported: Exported) -> dict[str, Any]:
        """Compare tokens and templates with the source; ConformanceError on the first difference."""

    def samples(self, shop: Workshop, plan: Plan, exported: Exported) -> list[dict[str, Any]]:
        """Load the artifact in its runtime and keep what it says to fixed inputs."""

    def fidelity(
        self,
        shop: Workshop,
        source: Source,
        target: Target,
        artifact: Path,
        digest: str,
        text: Path,
        *,
        parameters: int,
    ) -> dict[str, Any]:
        """Rows that hold the artifact against its source."""

    def conversion(self, shop: Workshop, source: Source, target: Target, *, parameters: int) -> dict[str, Any]:
        """Whether the format reads the source as transformers does, where `fidelity` is held against another model.

        Empty where the export itself has compared them.
        """

    def latency(self, shop: Workshop, target: Target, artifact: Path, digest: str, context: int) -> dict[str, Any]:
        """Rows of speed and memory on this machine."""

    def runtime(self, plan: Plan, exported: Exported) -> dict[str, Any]:
        """Load options for `runtime.json`."""

    def tokenizer(self, source: Source, exported: Exported) -> Mapping[str, bytes]:
        """Files for the package's `tokenizer/`, where the artifact does not embed them: name -> content."""

    def recipe(self, exported: Exported) -> dict[str, Any]:
        """What came of the options, for the manifest."""

    def toolchain(self, exported: Exported) -> dict[str, Any]:
        """What wrote the bytes, beyond Python packages."""
