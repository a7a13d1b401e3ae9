"""What people see of plans, packages, validations, comparisons and profiles: rows of text for `console.py` to print.

Turns values into words and numbers with units. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepack import console
from edgepack.measurement import Measurement

if TYPE_CHECKING:
    from pathlib import Path

    from edgepack.doctor import Report
    from edgepack.package import Package
    from edgepack.pipeline import Validation
    from edgepack.targets import Target

MB_PER_GIB = 1073.74  # memory is sold in powers of two and measured in 10^6 bytes

MEASUREMENT_COLUMNS = ("measurement", "value", "predicted", "budget", "verdict", "n", "measured on")


def show_plan(document: Mapping[str, Any]) -> None:
    """Print a plan: what was chosen and why, what it costs, and the alternatives."""
    model = f"{document['model']} ({document['architecture']}, {document['parameters'] / 1e6:,.1f}M parameters)"
    console.emit_text(f"{model} for {document['target']}, context {document['context']:,}")
    verdict = "meets every budget that can be predicted" if document["feasible"] else "MISSES A BUDGET"
    console.emit_text(f"quantize {document['quantize']} (chosen by: {document['chosen_by']}): {verdict}\n")
    rows = [_candidate_row(candidate, document["quantize"]) for candidate in document["candidates"]]
    console.emit_table(("quantize", "file MB", "bits/weight", "memory MB", "of it cache", "tokens/s", "misses"), rows)
    chosen = next(candidate for candidate in document["candidates"] if candidate["quantize"] == document["quantize"])
    if chosen.get("build_mb") is not None:
        console.emit_text(f"\nMaking {document['quantize']} takes about {chosen['build_mb']:,.0f} MB of memory here.")
    exact = (
        "File size is exact; memory and speed" if chosen.get("artifact_bytes_exact", True) else "File size and memory"
    )
    console.emit_text(f"\n{exact} are estimates. Steps: " + " -> ".join(document["steps"]))
    for note in document.get("notes", ()):
        console.emit_text(f"{note[:1].upper()}{note[1:]}.")


def show_pruning(document: Mapping[str, Any], folder: Path) -> None:
    """Print what every step of pruning took away and what it cost, and what to do next."""
    rows = []
    for row in (document["before"], *document["steps"]):
        vectors = "cosine_mean" in row
        near = row["cosine_mean"] if vectors else row.get("mean_kld")
        rows.append(
            (
                row["step"].replace("_", " "),
                f"{row['bytes'] / 1e6:,.1f}",
                f"{row['parameters'] / 1e6:,.2f}",
                f"{row['flops_per_token'] / 1e6:,.1f}",
                "-" if near is None else f"{near:.4g}",
                f"{row['ci95'][0]:.4g} to {row['ci95'][1]:.4g}" if row.get("ci95") else "-",
                f"{row['perplexity']:.4g}" if "perplexity" in row else "-",
                f"{row['top1_agreement']:.4f}" if "top1_agreement" in row else "-",
            )
        )
    near_name = "cosine" if "cosine_mean" in document["steps"][-1] else "mean KLD"
    columns = ("after", "weights MB", "parameters M", "MFLOP/token", near_name, "95 %", "perplexity", "agreement")
    console.emit_table(columns, rows)
    thin = document.get("sparsity")
    if thin:
        console.emit_text(
            f"\n{thin['zero_share']:.1%} of {thin['weights'] / 1e6:,.1f}M weights are zero; the file has "
            f"{thin['file_bytes'] / 1e6:,.1f} MB ({thin['gzip_bytes'] / 1e6:,.1f} MB through gzip, the source "
            f"{thin['source_gzip_bytes'] / 1e6:,.1f} MB): {thin['note']}."
        )
    console.emit_text(f"\nmodel: {folder}\nnext:  edgepack build {folder} -t TARGET")


def show_frontier(document: Mapping[str, Any], folder: Path) -> None:
    """Print the points by size, and where the picture is."""
    rows = [
        (
            point["label"],
            "calibrated" if point["kind"] == "allocated" else "preset",
            f"{point['bytes'] / 1e6:,.2f}",
            f"{point['bits_per_weight']:.2f}",
            f"{point['mean_kld']:.4g}" if point["mean_kld"] is not None else "-",
            f"{point['ci95'][0]:.4g} to {point['ci95'][1]:.4g}" if point["ci95"] else "-",
            f"{point['predicted_kld']:.4g}" if point["predicted_kld"] is not None else "-",
            f"{point['perplexity']:.3f}" if point["perplexity"] is not None else "-",
        )
        for point in sorted(document["points"], key=lambda point: point["bytes"])
    ]
    console.emit_text(
        f"{document['model']} on {document['target']}, {document['windows']} windows of evaluation text\n"
    )
    console.emit_table(("file", "types", "MB", "bits/weight", "KLD", "95 %", "predicted", "perplexity"), rows)
    console.emit_text(f"\nA picture of it: {folder / 'report.html'}")


def _candidate_row(candidate: Mapping[str, Any], chosen: str) -> tuple[str, ...]:
    speed = candidate["decode_tokens_per_s_range"]
    misses = ", ".join(miss["budget"] for miss in candidate["misses"])
    return (
        candidate["quantize"] + ("  <-" if candidate["quantize"] == chosen else ""),
        ("" if candidate.get("artifact_bytes_exact", True) else "about ") + f"{candidate['artifact_bytes'] / 1e6:,.1f}",
        f"{candidate['bits_per_weight']:.2f}",
        f"{candidate['ram_mb']:,.0f}",
        f"{candidate['kv_mb']:,.0f}",
        f"{_rate(speed[0])} to {_rate(speed[1])}" if speed else "-",
        misses,
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def package_json(package: Package) -> dict[str, Any]:
    """The document of `edgepack build --json`."""
    manifest = package.manifest
    return {
        "package": str(package.path),
        "verdict": package.verdict,
        "artifact": str(package.artifact),
        "artifact_digest": manifest["artifact_digest"],
        "package_digest": manifest["package_digest"],
        "quantize": manifest["recipe"]["quantize"],
        "measurements": [row.as_json() for row in package.measurements],
    }


def show_package(package: Package) -> None:
    """Print the result table of a build, the verdict, where the package is, and the next command."""
    show_measurements(package.measurements)
    console.emit_text(f"\nverdict: {verdict_in_words(package.verdict, package.measurements)}")
    console.emit_text(f"package: {package.path}")
    console.emit_text(f"model:   {package.artifact}")
    console.emit_text(f"next:    edgepack verify {package.path}")


def show_validation(result: Validation) -> None:
    """Print what a fresh validation found."""
    show_measurements(result.measurements)
    console.emit_text(f"\nverdict: {verdict_in_words(result.verdict, result.measurements)}")


def show_measurements(rows: Iterable[Measurement]) -> None:
    """Print measurements as a table, what is gated first."""
    ordered = sorted(rows, key=lambda row: row.verdict is None)
    console.emit_table(MEASUREMENT_COLUMNS, [_measurement_row(row) for row in ordered])


def _measurement_row(row: Measurement) -> tuple[str, ...]:
    value = "not measured" if row.value is None else number(row.value, row.unit)
    if row.value is not None and row.ci95:
        value += f" ± {(row.ci95[1] - row.ci95[0]) / 2:.2g}"
    budget = ""
    if row.budget:
        budget = ", ".join(
            f"{ {'max': '≤', 'min': '≥'}[side] } {number(x, row.unit)}" for side, x in row.budget.items()
        )
    verdict = (row.verdict or "").replace("_", " ")
    predicted = "" if row.predicted is None else number(row.predicted, row.unit)
    return (row.name, value, predicted, budget, verdict, "" if row.n is None else f"{row.n:,}", row.measured_on or "")


def number(value: float, unit: str) -> str:
    """A value with its unit, in the digits a person reads: `23.57 MB` for bytes, `0.0191 nats/token`."""
    if unit == "bytes":
        return f"{value / 1e6:,.2f} MB"
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return digits if unit in ("", "1") else f"{digits} {unit}"


def verdict_in_words(verdict: str, rows: Iterable[Measurement]) -> str:
    """The package verdict with what stands behind it."""
    by_verdict: dict[str, list[str]] = {}
    for row in rows:
        by_verdict.setdefault(row.verdict or "", []).append(row.name)
    if verdict == "fail":
        return "fail: missed " + ", ".join(by_verdict.get("fail", []))
    if verdict == "incomplete":
        open_rows = by_verdict.get("not_measured", []) + by_verdict.get("inconclusive", [])
        return "incomplete: no budget missed, not decided: " + ", ".join(open_rows)
    return "pass: every budget measured and met" if by_verdict.get("pass") else "pass: the profile gates nothing"


def show_inspection(found: Mapping[str, Any]) -> None:
    """Print what `inspect` found: facts as lines, then tables of types and tensors."""
    tables = ("bytes_by_type", "tensors")
    width = max(len(key) for key in found if key not in tables)
    for key, value in found.items():
        if key not in tables and value is not None:
            console.emit_text(f"{key.replace('_', ' '):<{width}}  {_plain(value)}")
    by_type = found.get("bytes_by_type")
    if by_type:
        rows = [_type_row(name, entry) for name, entry in by_type.items()]
        console.emit_text("")
        console.emit_table(("type", "tensors", "MB"), rows)
    tensors = found.get("tensors")
    if isinstance(tensors, list):
        console.emit_text("")
        keys = list(tensors[0]) if tensors else []
        console.emit_table(keys, [[_plain(tensor[key]) for key in keys] for tensor in tensors])


def _type_row(name: str, entry: Any) -> tuple[str, str, str]:
    if isinstance(entry, Mapping):
        return name, f"{entry.get('tensors', '')}", f"{entry.get('bytes', 0) / 1e6:,.2f}"
    return name, "", f"{entry / 1e6:,.2f}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (
            " x ".join(_plain(item) for item in value)
            if all(isinstance(i, int) for i in value)
            else ", ".join(map(_plain, value))
        )
    return console.one_line(str(value))


def show_comparison(result: Mapping[str, Any]) -> None:
    """Print two artifacts side by side."""
    names = [result["a"]["name"], result["b"]["name"]]
    rows = [
        (
            row["name"],
            *(_cell(row.get(side), row.get("unit", "")) for side in ("a", "b")),
            _cell(row.get("ratio"), "1"),
            _difference(row.get("difference")),
        )
        for row in result["rows"]
    ]
    console.emit_table(("measurement", f"A: {names[0]}", f"B: {names[1]}", "B / A", "B - A (95 %, paired)"), rows)
    for note in result.get("notes", []):
        console.emit_text(note)


def _difference(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    interval = found.get("ci95")
    return f"{found['value']:.3g}" + (f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else "")


def _cell(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    return number(value, unit) if isinstance(value, int | float) else str(value)


def show_targets(targets: Sequence[Target], *, as_json: bool) -> None:
    """Print the built-in profiles."""
    if as_json:
        entries = [{"name": t.name, "description": t.description, "aliases": list(t.aliases)} for t in targets]
        console.emit_json({"targets": entries})
        return
    rows = [
        (
            t.name,
            t.description,
            f"{t.device.ram_mb / MB_PER_GIB:,.0f}",
            f"{t.device.memory_bandwidth_gbs:g}",
            t.format.decoder,
        )
        for t in targets
    ]
    console.emit_table(("name", "device", "RAM GB", "GB/s", "decoder"), rows)


def show_doctor(report: Report) -> None:
    """Print what `doctor` looked at."""
    console.emit_table(("", "state", "found"), [(c.name, c.state, c.found) for c in report.checks])
    for check in report.checks:
        if check.advice:
            console.emit_text(f"{check.name}: {check.advice}")
