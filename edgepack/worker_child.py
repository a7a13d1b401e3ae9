"""The child's side of `edgepack/worker.py`: `python -P -m edgepack.worker_child FD`.

Reads one request from stdin, calls the function it names, and writes progress, then one result or error, as lines of
JSON to the pipe FD. What the function or a native library prints on stdout or stderr goes to the parent's log.

Imports little: its start-up is paid for every step.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from edgepack.errors import EdgepackError

_INTERVAL_SECONDS = 0.05  # 20 progress messages a second: more than an eye can follow
_RESULT_BYTES = 16 << 20  # as worker.MESSAGE_BYTES, which is not imported: subprocess and selectors cost 10 ms
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CLONE_NEWUSER = 0x10000000  # linux/sched.h
_CLONE_NEWNET = 0x40000000


class Reporter:
    """The `progress` that a worker function gets: thread-safe, throttled, always delivers the last call."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = open(descriptor, "wb")  # noqa: SIM115 (open for as long as the process lives)
        self._lock = threading.Lock()
        self._sent_at = 0.0
        self._sent = self._latest = (-1, -1)

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` is done, in the function's own units."""
        now = time.monotonic()
        self._latest = (int(done), int(total))
        if self._latest != self._sent and (now - self._sent_at >= _INTERVAL_SECONDS or done == total):
            self._sent_at = now
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            if self._latest != self._sent:
                self._sent = self._latest
                self._write(json.dumps({"progress": self._sent}).encode())

    def _write(self, line: bytes) -> None:
        self._pipe.write(line + b"\n")
        self._pipe.flush()

    def finish(self, kind: str, value: Any) -> None:
        """Send the last message."""
        line = json.dumps({kind: value, "peak_rss": _peak_rss()}).encode()
        if len(line) > _RESULT_BYTES:
            failure = f"its result takes {len(line)} bytes of JSON; at most {_RESULT_BYTES} were expected"
            line = json.dumps({"failure": failure, "peak_rss": _peak_rss()}).encode()
        self._flush()
        with self._lock:
            self._write(line)


def main() -> NoReturn:
    """Serve one request and leave without interpreter teardown, where native libraries like to crash."""
    faulthandler.enable(all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        os._exit(1)  # the parent died first
    request = json.loads(line)
    _confine(request["limits"])
    _die_with_parent(request["parent"])
    report = Reporter(descriptor)
    _serve(request["function"], request["arguments"], report)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _serve(function: str, arguments: dict[str, Any], report: Reporter) -> None:
    module, _, name = function.partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(progress=report, **arguments)
        report.finish("result", result)
    except EdgepackError as error:
        report.finish("error", error.as_json())
    except MemoryError:
        traceback.print_exc()
        report.finish("failure", f"out of memory, peak RSS {_peak_rss() / 1e6:.0f} MB")
    except OSError as error:
        from edgepack.files import is_storage_error, storage_error

        traceback.print_exc()
        if is_storage_error(error):
            report.finish("error", storage_error(error).as_json())
        else:
            report.finish("failure", _describe(error))
    except Exception as error:  # the edge of the process: whatever it is, the parent must hear of it
        traceback.print_exc()
        report.finish("failure", _describe(error))


def _describe(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno} in {place.name})"


def _confine(limits: dict[str, float | int | None]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump holds the user's weights and texts
    for name, kind in (("cpu_seconds", resource.RLIMIT_CPU), ("memory_bytes", resource.RLIMIT_AS)):
        value = limits[name]
        if value is not None:
            hard = resource.getrlimit(kind)[1]
            ceiling = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
            resource.setrlimit(kind, (ceiling, hard))


def _die_with_parent(parent: int) -> None:
    # The parent holds the other end of stdin as long as it lives, and never writes to it again.
    lifeline = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if sys.platform == "linux":
        import ctypes

        # The kernel itself kills the whole group when the pipe closes (F_SETSIG in fcntl(2)), even in the middle of
        # native code; and, should the pipe have leaked into a fork of the parent, at least this process.
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _leave_network(libc)
    else:
        threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(lifeline: int) -> None:
    os.read(lifeline, 1)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _leave_network(libc: Any) -> None:
    """Move into an empty network namespace where the kernel allows it; elsewhere go on with it (defence in depth)."""
    if libc.unshare(_CLONE_NEWNET) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    # Not for root: in a user namespace of its own it would lose its right to read other users' files.
    if uid != 0 and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:  # all or nothing
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with contextlib.suppress(OSError):
                Path(f"/proc/self/{name}").write_text(text)


def _peak_rss() -> int:
    """High-water mark of this process's resident set in bytes, without what its parent had before exec."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_bytes().split(b"VmHWM:")[1].split()[0]) << 10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


if __name__ == "__main__":
    main()
