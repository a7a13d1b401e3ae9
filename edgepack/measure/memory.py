"""Resident memory of this process, as the operating system counts it.

Linux counts mapped file pages too: weights that llama.cpp maps are in the number as far as they have been touched.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MB (10^6 bytes).

    Linux: VmHWM of /proc/self/status (proc_pid_status(5)), which starts anew at exec; ru_maxrss would carry over the
    parent's peak from fork. Elsewhere: getrusage(2), bytes on macOS, KiB on other systems.
    """
    kib = _status("VmHWM")
    if kib is not None:
        return kib * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def rss_mb() -> float:
    """Resident memory now, in MB; the peak so far where the system does not say."""
    kib = _status("VmRSS")
    return peak_rss_mb() if kib is None else kib * 1024 / 1e6


def _status(field: str) -> int | None:
    """A line of /proc/self/status in KiB; None where there is none."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None
