"""Measure a package again: fidelity against its source, speed and memory on a machine that stands for the target.

A speed measured on a machine that is not the target is shown and never judged: its row is `not_measured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import plugins
from edgepack.errors import InputRefused
from edgepack.events import Event, Listener
from edgepack.judgement import SPEED, judged
from edgepack.measurement import Measurement, overall
from edgepack.planning import load_backend
from edgepack.store import Store
from edgepack.workshop import Workshop, machine_facts, physical_cores

if TYPE_CHECKING:
    from edgepack.backend import Backend
    from edgepack.package import Package
    from edgepack.pipeline import Validation
    from edgepack.source import Source
    from edgepack.targets import Target


def validate_package(
    path: Path,
    *,
    device: str,
    on_target: bool,
    source: str | None,
    overrides: Sequence[str],
    text: Path,
    listener: Listener,
) -> Validation:
    """Verify, measure, judge; see `edgepack.pipeline.validate`."""
    from edgepack.package import packaged_target
    from edgepack.pipeline import Validation
    from edgepack.targets import with_overrides

    package = _whole(path)
    target = packaged_target(package.manifest)
    target = with_overrides(target, overrides) if overrides else target
    shop = Workshop(Store(), listener, target.runtime.threads or physical_cores(), fresh=True)
    rows = [row.as_json() for row in package.measurements if row.name in ("artifact_bytes", "bits_per_weight")]
    rows += _fidelity(shop, package, target, source, text)
    if device == "local":
        rows += _latency(shop, package, target, counts=on_target or target.device.is_this_machine)
        facts = machine_facts()
    else:
        measure = plugins.load("device", device.partition("://")[0])
        remote, facts = measure(path, device, overrides=overrides, listener=listener)
        rows += remote
    predicted = {row.name: row.predicted for row in package.measurements if row.predicted is not None}
    found = judged(rows, target, predicted, embedding=_is_embedding(package))
    return Validation(package.path.name, overall(found), tuple(found), facts, target.budget.require_on_device)


def _whole(path: Path) -> Package:
    from edgepack.package import read_package, verify

    problems = verify(path).problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputRefused(
            f"{path} is not the package that was built: {problems[0]}{more}",
            hint=f"edgepack verify {path} names every problem; fetch or build the package again.",
        )
    return read_package(path)


def _fidelity(shop: Workshop, package: Package, target: Target, source: str | None, text: Path) -> list[dict[str, Any]]:
    if not target.measure.fidelity:
        return []
    found = _source(shop, package, source)
    if found is None:
        shop.listener(
            Event("note", "fidelity", "the source model is not here: name it with --source to measure fidelity")
        )
        return []
    recipe = package.manifest["recipe"]
    if "vocabulary" in (recipe.get("prune") or {}).get("removed", {}):
        shop.listener(Event("note", "fidelity", "its vocabulary was pruned: it can't be held against the source"))
        return []
    parameters = int(recipe["parameters"])
    evidence = _backend(package).fidelity(shop, found, target, package.artifact, "", text, parameters=parameters)
    return list(evidence["rows"])


def _source(shop: Workshop, package: Package, asked: str | None) -> Source | None:
    """The source the package was built from, proved by sha256; None when it is not here and was not named."""
    from edgepack import source_index
    from edgepack.source import hash_source, resolve

    expected = package.manifest["source"]["files"]
    place = asked or source_index.find(shop.store, expected)
    if place is None:
        return None
    found = hash_source(resolve(str(place)))
    if found.files == expected:
        return found
    if asked is None:
        return None
    differing = sorted(name for name in {*found.files, *expected} if found.files.get(name) != expected.get(name))
    raise InputRefused(
        f"--source {asked} is not what {package.path.name} was built from: {differing[0]} differs",
        hint="Name the same files the package lists under source in edgepack.json.",
    )


def _latency(shop: Workshop, package: Package, target: Target, *, counts: bool) -> list[dict[str, Any]]:
    if not target.measure.latency:
        return []
    context = int(package.manifest["recipe"]["context"])
    rows = list(_backend(package).latency(shop, target, package.artifact, "", context)["rows"])
    return rows if counts else [_proxy(row) for row in rows]


def _proxy(row: dict[str, Any]) -> dict[str, Any]:
    """A speed of this machine in a row about another one: named in the note, absent as a value."""
    if row["name"] not in SPEED or row["value"] is None:
        return row
    note = f"{row['value']:.4g} {row['unit']} on this machine, which is not the target (--on-target if it is)"
    return Measurement(row["name"], None, row["unit"], measured_on=None, note=note).as_json()


def _backend(package: Package) -> Backend:
    return load_backend(str(package.manifest["recipe"]["format"]))


def _is_embedding(package: Package) -> bool:
    return bool(package.manifest["recipe"]["embedding"])
