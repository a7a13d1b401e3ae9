"""What can be added to edgepack without changing it: (kind, name) -> "module" or "module:function".

A plug-in is a module or a function, imported when it is asked for. Built-in names stand in the table below, others come
from entry points of the group `edgepack.<kind>`. A built-in name can't be taken by an entry point.

    format    by its name: a module with the functions of `edgepack.backend.Backend`
    device    by the scheme of a URL: measure(package, device, *, overrides, listener) -> (rows, facts)
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from edgepack.errors import UsageError

BUILT_IN = {
    ("device", "ssh"): "edgepack.devices.ssh:measure",
    ("format", "gguf"): "edgepack.gguf.backend",
    ("format", "onnx"): "edgepack.onnx.backend",
}


def names(kind: str) -> list[str]:
    """Every known name of a kind, built-in and installed, without importing any."""
    installed = {entry.name for entry in entry_points(group=f"edgepack.{kind}")}
    return sorted(installed | {name for known, name in BUILT_IN if known == kind})


def load(kind: str, name: str) -> Any:
    """Import one plug-in and give its module or function.

    Args:
        kind: `format` or `device`.
        name: As in the table or the entry point.

    Raises:
        UsageError: No such name; the nearest one is suggested.
    """
    place = BUILT_IN.get((kind, name))
    if place is None:
        for entry in entry_points(group=f"edgepack.{kind}", name=name):
            place = entry.value
    if place is None:
        near = get_close_matches(name, names(kind), 1)
        known = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names(kind))}."
        raise UsageError(f"there is no {kind} {name!r}", hint=known)
    module, _, function = place.partition(":")
    return getattr(import_module(module), function) if function else import_module(module)
