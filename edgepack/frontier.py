"""The curve a model can be bought at: size against divergence, from one calibration, beside the presets.

Every point is a file that is written and measured in the target's runtime, as a build would; the files themselves are
not kept. The result is a folder with the numbers (frontier.json) and a picture to look at (report.html).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import UsageError
from edgepack.events import Listener
from edgepack.gguf.size import parse_size
from edgepack.planning import load_backend, make_plan
from edgepack.store import Store
from edgepack.targets import with_overrides
from edgepack.workshop import Workshop, physical_cores

if TYPE_CHECKING:
    from edgepack.gguf.model import ModelSpec
    from edgepack.source import Source
    from edgepack.targets import Target

# Sizes by default, in bits per weight, as far as the model can have them: about a quarter between neighbours, where
# divergence doubles or halves; above 6 there is little left to win.
DEFAULT_BITS = (2.75, 3.25, 3.75, 4.25, 4.75, 5.5, 6.5)
# Presets beside them, all with the importance matrix of the same calibration.
PRESETS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")


@dataclass(frozen=True)
class Point:
    """One file.

    Args:
        label: Size or preset.
        kind: `allocated` or `preset`.
        nbytes: Of the file.
        bits_per_weight: Of tensor data.
        predicted_kld: What allocation expected; None for a preset.
        rows: Measurements against the source.
        types: Tensor -> type.
    """

    label: str
    kind: str
    nbytes: int
    bits_per_weight: float
    predicted_kld: float | None
    rows: Sequence[Mapping[str, Any]]
    types: Mapping[str, str]

    def row(self, name: str) -> Mapping[str, Any]:
        """A measurement by name; empty if it was not made."""
        return next((row for row in self.rows if row["name"] == name), {})

    def as_json(self) -> dict[str, Any]:
        """The point as it stands in frontier.json, and as the report takes it."""
        kld = self.row("mean_kld")
        return {
            "label": self.label,
            "kind": self.kind,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "mean_kld": kld.get("value"),
            "ci95": kld.get("ci95"),
            "predicted_kld": self.predicted_kld,
            "perplexity": self.row("perplexity").get("value"),
            "top1_agreement": self.row("top1_agreement").get("value"),
            "chosen": False,
        }


def measure(
    source: Source,
    target: Target,
    text: Path,
    *,
    sizes: Sequence[str],
    presets: Sequence[str],
    listener: Listener,
) -> dict[str, Any]:
    """Write and measure one file for each size and preset.

    Args:
        source: A hashed checkpoint.
        target: Its types, windows and threads.
        text: Evaluation text.
        sizes: As `edgepack/gguf/size.py` reads them; empty takes `DEFAULT_BITS` as far as they can be had.
        presets: Names, measured with the calibration's importance matrix.
        listener: Told about steps.

    Returns:
        The document of frontier.json.

    Raises:
        UsageError: The model can't be calibrated; no size, or no preset.
        BudgetError: A size is too small.
        StepError: A step failed.
    """
    threads = target.runtime.threads if target.device.is_this_machine else 0
    shop = Workshop(Store(), listener, threads or physical_cores(), evaluation=text)
    sizes = [parse_size(size).name for size in sizes] or default_sizes(source, target)
    for quantize in (*sizes, *presets):  # what can't be is refused before any work
        make_plan(source, target, format="gguf", quantize=quantize)
    points = [_point(shop, source, target, text, size, "allocated") for size in sizes]
    with_imatrix = _with_imatrix(shop, source, target) if presets else target
    points += [_point(shop, source, with_imatrix, text, preset, "preset") for preset in presets]
    first = points[0]
    return {
        "schema_version": 1,
        "model": source.id or source.name,
        "target": target.name,
        "reference_perplexity": first.row("source_perplexity").get("value"),
        "windows": target.measure.windows,
        "points": [point.as_json() for point in sorted(points, key=lambda point: (point.kind, point.nbytes))],
    }


def default_sizes(source: Source, target: Target) -> list[str]:
    """`DEFAULT_BITS` that files of this model can have with the target's types; at least the smallest and largest."""
    from edgepack.gguf import calibrated
    from edgepack.gguf.model import describe

    model = describe(source.path)
    if reason := calibrated.obstacle(model, source, target):
        raise UsageError(f"{source.name} has no frontier: {reason}", hint="Compare presets with: edgepack compare A B")
    least, most = _span(model, source, target)
    inside = [bits for bits in DEFAULT_BITS if least <= bits <= most]
    found = inside if len(inside) >= 3 else [least + (most - least) * part / 4 for part in range(5)]
    return [f"{bits:.2f}bpw" for bits in found]


def _span(model: ModelSpec, source: Source, target: Target) -> tuple[float, float]:
    from edgepack.gguf import calibrated

    imatrix = calibrated.promised_imatrix(model, source, target)
    where = calibrated.room(model, target, {}, imatrix)
    return where.bits_per_weight(where.least) + 0.01, where.bits_per_weight(where.most) - 0.01


def _with_imatrix(shop: Workshop, source: Source, target: Target) -> Target:
    from edgepack.gguf import calibrated

    statistics = calibrated.calibrate(shop, source, target)
    return with_overrides(target, [f"quantize.imatrix={statistics.path / 'imatrix.gguf'}"])


def _point(shop: Workshop, source: Source, target: Target, text: Path, quantize: str, kind: str) -> Point:
    backend = load_backend("gguf")
    plan = make_plan(source, target, format="gguf", quantize=quantize)
    exported = backend.export(shop, source, plan, f"{source.name}-{plan.quantize}")
    found = backend.fidelity(shop, source, target, exported.path, exported.digest, text, parameters=plan.parameters)
    report = exported.report
    allocation = report.get("allocation") or {}
    return Point(
        label=plan.quantize,
        kind=kind,
        nbytes=exported.size,
        bits_per_weight=report["bits_per_weight"],
        predicted_kld=allocation.get("predicted_kld"),
        rows=found["rows"],
        types=report["types"],
    )


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Fill a folder with frontier.json and report.html."""
    from edgepack.report import render

    (folder / "frontier.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page = {
        "title": f"{document['model']} on {document['target']}: size against divergence",
        "facts": {
            "model": document["model"],
            "target": document["target"],
            "perplexity of the source": document["reference_perplexity"],
            "evaluation windows": document["windows"],
        },
        "points": document["points"],
        "notes": [
            "Every point was written and measured in llama.cpp against the source. KL divergence (KLD) in nats per "
            "token, with its 95 % confidence interval. Presets have the importance matrix of the same calibration.",
        ],
    }
    (folder / "report.html").write_text(render(page), encoding="utf-8")
