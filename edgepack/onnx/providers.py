"""Which execution provider a measurement runs on: the target's, or the CPU in its place, and never silently.

A graph for a neural processor or a GPU can be built where there is none, and what a QDQ graph computes is defined: the
CPU computes the same integers, up to the rounding of sums. So fidelity may be measured on the CPU, and its rows say so.
Speed may not: a measurement of speed on a provider that is not there is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepack.errors import MissingError
from edgepack.worker import Progress, no_progress, run

if TYPE_CHECKING:
    from edgepack.targets import Target

CPU = "CPUExecutionProvider"
# What a session on these needs beyond its name, for `runtime.json`. QNN: onnxruntime docs/execution-providers/
# QNN-ExecutionProvider.md (backend_path names the HTP library; the graph is compiled when the session is made).
PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "QNNExecutionProvider": {"backend_path": "libQnnHtp.so", "htp_performance_mode": "burst"},
}


def listed(*, progress: Progress = no_progress) -> list[str]:
    """Providers of the installed onnxruntime (worker function)."""
    from edgepack.runtimes.onnxruntime import providers

    return providers()


@functools.cache
def available() -> tuple[str, ...]:
    """Providers of the installed onnxruntime; asked once, in a worker."""
    return tuple(run("edgepack.onnx.providers:listed", {}, what="a look at onnxruntime"))


def for_fidelity(target: Target) -> Target:
    """The target with a provider that is here: its own, else the CPU."""
    if target.onnx.provider == CPU or target.onnx.provider in available():
        return target
    return replace(target, onnx=replace(target.onnx, provider=CPU))


def with_note(rows: Sequence[Mapping[str, Any]], target: Target) -> list[dict[str, Any]]:
    """Rows that were measured by `for_fidelity(target)`: they say so where another provider ran than the target's."""
    if for_fidelity(target) is target:
        return [dict(row) for row in rows]
    words = f"computed by {CPU}; {target.onnx.provider} is not in this onnxruntime"
    return [dict(row) | {"note": f"{row['note']}; {words}" if row.get("note") else words} for row in rows]


def require_for_speed(target: Target) -> None:
    """See that speed can be measured here on the target's provider.

    Raises:
        MissingError: It can't; the providers that are here are named.
    """
    wanted = target.onnx.provider
    if wanted != CPU and wanted not in available():
        raise MissingError(
            f"execution provider {wanted} is not in the installed onnxruntime; it has {', '.join(available())}",
            hint="Measure on the device (--device ssh://HOST), or leave speed out with --set measure.latency=false.",
        )
