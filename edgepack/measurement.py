"""A measured value, the budget it is held against, and the verdicts of rows and packages.

Knows nothing of how a value was measured. The JSON form is the contract of `evidence/validation.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Verdict = Literal["pass", "fail", "not_measured", "inconclusive"]
PackageVerdict = Literal["pass", "fail", "incomplete"]


@dataclass(frozen=True)
class Measurement:
    """One row of evidence.

    Args:
        name: A name of the contract, units included where it has one: `mean_kld`, `ttft_ms_p90`, `artifact_bytes`.
        value: The number, or None when it was not measured.
        unit: `nats/token`, `ms`, `tokens/s`, `MB`, `bytes`, `1`.
        n: How many samples (scored tokens, repetitions) the value rests on.
        ci95: 95 % confidence interval (low, high), where one was computed.
        measured_on: `local`, `ssh://host`, or None when not measured.
        budget: `{"max": x}` or `{"min": x}`; None when the profile does not gate this value.
        verdict: Set by `judge`; None on rows without a budget.
        note: Why a value is missing or inconclusive, or what stands behind it.
    """

    name: str
    value: float | int | None
    unit: str
    n: int | None = None
    ci95: tuple[float, float] | None = None
    measured_on: str | None = "local"
    budget: Mapping[str, float] | None = None
    verdict: Verdict | None = None
    note: str | None = None
    predicted: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in `validation.json`; absent optional fields are left out."""
        row: dict[str, Any] = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "measured_on": self.measured_on,
        }
        optional: dict[str, Any] = {
            "n": self.n,
            "ci95": list(self.ci95) if self.ci95 else None,
            "budget": dict(self.budget) if self.budget else None,
            "verdict": self.verdict,
            "note": self.note,
            "predicted": self.predicted,
        }
        return row | {key: value for key, value in optional.items() if value is not None} | dict(self.extra)


def from_json(row: Mapping[str, Any]) -> Measurement:
    """Read a row written by `Measurement.as_json`."""
    known = {"name", "value", "unit", "measured_on", "n", "ci95", "budget", "verdict", "note", "predicted"}
    ci95 = row.get("ci95")
    return Measurement(
        name=row["name"],
        value=row["value"],
        unit=row["unit"],
        n=row.get("n"),
        ci95=(ci95[0], ci95[1]) if ci95 else None,
        measured_on=row.get("measured_on"),
        budget=row.get("budget"),
        verdict=row.get("verdict"),
        note=row.get("note"),
        predicted=row.get("predicted"),
        extra={key: value for key, value in row.items() if key not in known},
    )


def judge(row: Measurement, limit: Mapping[str, float] | None) -> Measurement:
    """Hold a row against its budget.

    A value whose 95 % interval straddles the limit is `inconclusive`: it may be on either side. A value that was not
    measured is `not_measured`, never a pass.

    Args:
        row: The measured row.
        limit: `{"max": x}` or `{"min": x}`; None leaves the row without a verdict.

    Returns:
        The row with `budget` and `verdict` set.
    """
    if limit is None:
        return row
    if row.value is None:
        return replace(row, budget=limit, verdict="not_measured")
    if not math.isfinite(row.value):
        return replace(row, budget=limit, verdict="fail")
    low, high = row.ci95 or (row.value, row.value)
    ceiling, floor = limit.get("max", math.inf), limit.get("min", -math.inf)
    if high <= ceiling and low >= floor:
        return replace(row, budget=limit, verdict="pass")
    if low > ceiling or high < floor:
        return replace(row, budget=limit, verdict="fail")
    reason = "the 95 % interval straddles the budget"
    return replace(row, budget=limit, verdict="inconclusive", note=f"{reason}; {row.note}" if row.note else reason)


def overall(rows: Iterable[Measurement]) -> PackageVerdict:
    """The verdict of a package: `fail` when a budget is missed, `incomplete` when one was not decided, else `pass`."""
    verdicts = {row.verdict for row in rows} - {None}
    if "fail" in verdicts:
        return "fail"
    return "incomplete" if verdicts & {"not_measured", "inconclusive"} else "pass"
