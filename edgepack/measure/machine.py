"""Facts of the machine a number was measured on, for `measured_on` of the evidence.

What decides speed and is needed to repeat a measurement (CPU, cores, memory, frequency governor, load, kernel, the
runtime and its commit); nothing that names a person, a host or a path. What the system does not tell is left out.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from edgepack.worker import Progress, no_progress

_CPU0 = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def facts() -> dict[str, Any]:
    """What the operating system says about this machine; cheap, loads nothing.

    Returns:
        `system`, `kernel`, `arch`, `cores` this process may use, and where known `cpu`, `ram_mb` (10^6 bytes),
        `governor`, `max_mhz`, `load_1min`, `temperature_c`.
    """
    found: dict[str, Any] = {
        "device": "local",
        "system": platform.system(),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "cores": _cores(),
        "cpu": _cpu(),
        "ram_mb": _ram_mb(),
        "governor": _line(_CPU0 / "scaling_governor"),
        "max_mhz": _scaled(_line(_CPU0 / "cpuinfo_max_freq"), 1000),
        "load_1min": _load(),
        "temperature_c": _scaled(_line(Path("/sys/class/thermal/thermal_zone0/temp")), 1000),
    }
    return {key: value for key, value in found.items() if value is not None}


def machine(*, progress: Progress = no_progress) -> dict[str, Any]:
    """`facts` and what llama.cpp says of itself: worker function.

    Returns:
        `facts()` with `runtime`: versions, commit and CPU features (see `runtimes.llama_cpp.toolchain`).
    """
    from edgepack.runtimes.llama_cpp import toolchain

    found = facts() | {"runtime": toolchain()}
    progress(1, 1)
    return found


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cpu() -> str | None:
    """The CPU's name: `model name` of /proc/cpuinfo on x86, the device tree's board on Arm, else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    return _line(Path("/proc/device-tree/model")) or platform.processor() or None


def _ram_mb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6)
    except (ValueError, OSError):
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _line(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _scaled(text: str | None, divisor: int) -> float | None:
    return int(text) / divisor if text is not None and text.lstrip("-").isdigit() else None
