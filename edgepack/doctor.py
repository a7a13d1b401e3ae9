"""What is installed, which runtimes answer, and what would keep a build from working."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from edgepack.errors import EdgepackError
from edgepack.worker import Progress, no_progress

# A build writes the artifact twice at most (store and package) and a float32 reference while it measures.
LOW_DISK_GB = 10


@dataclass(frozen=True)
class Check:
    """One thing looked at: `ok`, `warn` (works, with a limit) or `missing` (a build will fail)."""

    name: str
    state: Literal["ok", "warn", "missing"]
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """Everything `doctor` looked at."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """True when nothing a build needs is missing."""
        return all(check.state != "missing" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The document of `edgepack doctor --json`."""
        return {"healthy": self.healthy, "checks": [vars(check) for check in self.checks]}


def examine() -> Report:
    """Look at versions, the quantizer library, the runtime, the store and the tools for remote devices."""
    checks = [_packages(), _guarded("ggml quantizers", _ggml), _guarded("llama.cpp runtime", _runtime), _kernels()]
    return Report((*checks, _guarded("store", _store), *_device_tools()))


def _packages() -> Check:
    from edgepack.toolchain import versions

    found = versions()
    missing = [name for name, version in found.items() if version is None]
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    if missing:
        return Check("packages", "missing", listed, f"Install {', '.join(missing)}: pip install edgepack")
    return Check("packages", "ok", listed)


def _ggml() -> str:
    from edgepack.gguf.ggml import build

    return ", ".join(f"{key} {value}" for key, value in build().items())


def _runtime() -> str:
    from edgepack.worker import run

    facts = run("edgepack.doctor:load_runtime", {}, what="llama.cpp")
    return ", ".join(f"{key} {value}" for key, value in facts.items() if key != "system_info")


def load_runtime(*, progress: Progress = no_progress) -> dict[str, str]:
    """Worker function: load llama.cpp and say which one it is."""
    from edgepack.runtimes.llama_cpp import toolchain

    return toolchain()


def _kernels() -> Check:
    if find_spec("kernels") is None:
        return Check("hub kernels", "ok", "package 'kernels' is not importable: no code is fetched from a hub")
    advice = "Uninstall it: transformers would fetch and run code that a config.json names (CVE-2026-4372 pattern)."
    return Check("hub kernels", "warn", "package 'kernels' is importable", advice)


def _store() -> str:
    from edgepack.store import Store

    root = Store().root
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    writable = os.access(existing, os.W_OK)
    state = f"{root}, {free_gb:.0f} GB free" + ("" if writable else ", not writable")
    if not writable or free_gb < LOW_DISK_GB:
        raise EdgepackError(state, hint="Point EDGEPACK_CACHE to a writable folder with more room.")
    return state


def _device_tools() -> list[Check]:
    found = {tool: shutil.which(tool) for tool in ("ssh",)}
    return [
        Check(f"{tool} (remote devices)", "ok" if path else "warn", Path(path).name if path else "not found")
        for tool, path in found.items()
    ]


def _guarded(name: str, look: Callable[[], str]) -> Check:
    """Run one check; what edgepack itself would refuse becomes a row instead of an end."""
    try:
        return Check(name, "ok", look())
    except EdgepackError as error:
        state: Literal["warn", "missing"] = "warn" if name == "store" else "missing"
        return Check(name, state, error.message, error.hint or "")
