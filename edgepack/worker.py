"""Run a function in a process of its own, so that nothing it does can harm the caller.

Native libraries abort on a failed assertion, leak, print on stdout and allocate what a hostile file tells them to.
Every step that loads torch, transformers or llama.cpp therefore runs behind `run`: arguments and result travel as JSON,
progress comes back while it works, and a child that dies becomes one `StepError` that says what died and of what.

The child (`edgepack/worker_child.py`) gets an environment built from an allowlist (no tokens, no agent sockets),
Hugging Face in offline mode, no network where the kernel allows that, no core dumps, a session of its own, and a
private TMPDIR that is removed with it. It can't outlive this process: it is killed with its whole group when `run` ends
for any reason, and watches a pipe for the case that this process is killed with SIGKILL. POSIX only.

Does not know what the functions do, nor which of them belong together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from edgepack import interrupts
from edgepack.errors import StepError, from_json

Progress = Callable[[int, int], None]

MESSAGE_BYTES = 16 << 20  # a result is a report, never a payload: payloads are files (security.md 8 has the same cap)

First = TypeVar("First")
Second = TypeVar("Second")

_log = logging.getLogger(__name__)
_threads = threading.local()

_TAIL_BYTES = 64 << 10  # of the child's stderr; an assertion with its backtrace is a few KiB
_LAST = {"result", "error", "failure"}  # what a child ends with
_TICK_SECONDS = 0.2  # how often resident memory is looked at
_LEAVE_SECONDS = 1.0  # an orderly child is gone microseconds after its result
_GONE_SECONDS = 5.0  # a killed process is reaped at once unless it waits for a disk

# What a child may see of the environment: paths, locale, threads and GPU selection, nothing that authenticates.
_ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|EDGEPACK_\w+|SOURCE_DATE_EPOCH|XDG_CACHE_HOME"
    r"|HF_HOME|HF_HUB_CACHE|OMP_\w+|MKL_NUM_THREADS|OPENBLAS_NUM_THREADS|GGML_\w+|CUDA_\w+|NVIDIA_\w+|VK_\w+"
    r"|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|PYTHONDONTWRITEBYTECODE|PYTHONPYCACHEPREFIX|PYTHONHASHSEED"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)

# The line of a dying library's output that says why; others only lead up to it. Wording of ggml_abort and GGML_ASSERT
# (llama.cpp ggml/src/ggml.c: "FILE:LINE: TEXT"), and of libstdc++'s terminate handler; failing those, any line that
# complains. CPython's faulthandler writes its stack after all of them.
_ABORTED = re.compile(rb"GGML_ASSERT|^\S+\.(c|cc|cpp|cu|h|m):\d+: |what\(\):")
_COMPLAINT = re.compile(rb"error|failed|cannot|can't|unable|corrupt|exception|terminate called", re.IGNORECASE)
_STACK = b"Fatal Python error"
_OUT_OF_MEMORY = re.compile(rb"bad_alloc|MemoryError|[Cc]annot allocate memory|out of memory")
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def no_progress(done: int, total: int) -> None:
    """Default of every `progress` argument: report nothing."""


@dataclass(frozen=True)
class Limits:
    """What a child may use; None means no limit.

    Args:
        wall_seconds: Elapsed time, after which the child is killed.
        cpu_seconds: Processor time of all its threads (RLIMIT_CPU).
        memory_bytes: Address space (RLIMIT_AS). torch and CUDA reserve far more than they use: leave None for them.
    """

    wall_seconds: float | None = None
    cpu_seconds: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Usage:
    """What a child took.

    Args:
        wall_seconds: From before the process was started until it was gone.
        cpu_seconds: User plus system time of all its threads, start-up included.
        peak_rss_bytes: High-water mark of its resident set. Mapped file pages count, as everywhere on Linux.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run(
    function: str, arguments: dict[str, Any], *, what: str, progress: Progress = no_progress, limits: Limits = Limits()
) -> Any:
    """Run `function` in a child process and return its result.

    Args:
        function: `"edgepack.module:function"`, called as `function(progress=..., **arguments)`.
        arguments: Keyword arguments, JSON-able. Paths are strings, relative ones against the caller's working folder.
        what: What is being done, in words that complete "... failed": it opens the message of a `StepError`.
        progress: Called with the function's own (done, total), at most 20 times a second, and for the last one.
        limits: Time and memory the child may take.

    Returns:
        What the function returned, after a trip through JSON: tuples are lists, keys are strings.

    Raises:
        EdgepackError: Whatever subclass the function raised, message and hint unchanged.
        StepError: Any other exception of the function; the child was killed, aborted, hit a limit or sent no result.
        KeyboardInterrupt, SystemExit: As raised in this process (Ctrl-C, SIGTERM), after the child is gone.
    """
    return run_measured(function, arguments, what=what, progress=progress, limits=limits)[0]


def run_measured(
    function: str, arguments: dict[str, Any], *, what: str, progress: Progress = no_progress, limits: Limits = Limits()
) -> tuple[Any, Usage]:
    """As `run`, and say what the child took."""
    request = json.dumps(
        {"function": function, "arguments": arguments, "limits": asdict(limits), "parent": os.getpid()}
    )
    with terminate_as_exit(), tempfile.TemporaryDirectory(prefix="edgepack-", ignore_cleanup_errors=True) as scratch:
        child = _Child(scratch)
        try:
            child.send(request.encode() + b"\n")
            child.listen(progress, limits.wall_seconds)
        finally:
            child.end()
    return child.result(what, limits), child.usage


class Stopped(StepError):
    """A child was ended because what ran beside it failed; `side_by_side` reports that failure instead."""


def side_by_side(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """Run two functions at once, for work whose workers leave a core idle.

    Args:
        first: Runs in this thread.
        second: Runs in another.

    Returns:
        Both results.

    Raises:
        BaseException: Whatever one of them raised first; the workers of the other are ended, and it is waited for.
    """
    here, there, around = threading.Event(), threading.Event(), _stops()
    values: list[Second] = []
    errors: list[BaseException] = []

    def beside() -> None:
        _threads.stops = (there, *around)
        try:
            values.append(second())
        except BaseException as error:
            errors.append(error)
            here.set()

    thread = threading.Thread(target=beside, daemon=True)
    _threads.stops = (here, *around)
    thread.start()
    try:
        result = first()
        while thread.is_alive():
            thread.join(_TICK_SECONDS)  # in pieces: Ctrl-C gets through
    except BaseException as error:
        there.set()
        thread.join()
        if isinstance(error, Stopped) and errors:
            raise errors[0] from None
        raise
    finally:
        _threads.stops = around
    if errors:
        raise errors[0]
    return result, values[0]


def _stops() -> tuple[threading.Event, ...]:
    """Events that end the workers of this thread."""
    return getattr(_threads, "stops", ())


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise `SystemExit(128 + signal)`: clean-up code runs, status 143 or 129.

    Without it the default action ends the process at once and leaves temporary folders behind. Does nothing outside the
    main thread, or when the program has a handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        for number in ours:
            signal.signal(number, leave)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def child_environment(environment: Mapping[str, str], scratch: str) -> dict[str, str]:
    """The environment of a child: allow-listed names of `environment` without anything that smells of a secret."""
    allowed = {
        name: value for name, value in environment.items() if _ENVIRONMENT.fullmatch(name) and not _SECRET.search(name)
    }
    # The child finds modules exactly where this process does, from a checkout and from a wheel. The working folder is
    # left out on both sides (-P): a torch.py that lies beside a model must never be imported.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in sys.path if Path(path).is_absolute()]
    return allowed | {
        "PYTHONPATH": os.pathsep.join(paths if root in paths else [root, *paths]),
        "TMPDIR": scratch,
        "HF_HUB_OFFLINE": "1",
        "USE_HUB_KERNELS": "0",  # transformers: no code from a hub even where the `kernels` package is installed
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        # How long threads that wait for each other spin before they sleep (GNU OpenMP, in torch and llama.cpp). The
        # default is longer than a time slice: on shared cores the same products took seven times the wall clock.
        "GOMP_SPINCOUNT": "1000",
        "GGML_NO_BACKTRACE": "1",  # ggml_abort would start gdb, which takes seconds and writes pages (ggml/src/ggml.c)
    }


class _Child:
    """One child process, its pipes, and what is known of it."""

    def __init__(self, scratch: str) -> None:
        self.usage = Usage(0.0, 0.0, 0)
        self._started = time.monotonic()
        self._message: dict[str, Any] | None = None
        self._received = bytearray()
        self._tail = b""
        self._timed_out = False
        self._peak_rss = 0
        request_end, self._requests = os.pipe()
        self._messages, message_end = os.pipe()
        self._output, output_end = os.pipe()
        try:
            # stdout shares stderr's pipe: what native code prints can't get between the messages.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "edgepack.worker_child", str(message_end)],
                stdin=request_end,
                stdout=output_end,
                stderr=output_end,
                pass_fds=(message_end,),
                env=child_environment(os.environ, scratch),
                start_new_session=True,
            )
        except OSError as error:
            self._close()
            raise StepError(f"a worker process could not be started: {error}") from error
        finally:
            for end in (request_end, message_end, output_end):
                os.close(end)

    def send(self, request: bytes) -> None:
        """Write the request. The pipe stays open: its end tells the child that this process is gone."""
        with contextlib.suppress(BrokenPipeError):  # of a child that died at start; `result` reports it
            while request:
                request = request[os.write(self._requests, request) :]

    def listen(self, progress: Progress, wall_seconds: float | None) -> None:
        """Take in messages and output until the child has gone or the deadline has passed."""
        deadline = float("inf") if wall_seconds is None else self._started + wall_seconds
        looked = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._messages, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            while (now := time.monotonic()) < deadline:
                interrupts.check()
                if any(stop.is_set() for stop in _stops()):
                    raise Stopped("stopped, because work beside it ended")
                if now - looked >= _TICK_SECONDS:
                    self._watch_memory()
                    looked = now
                for key, _ in selector.select(min(_TICK_SECONDS, deadline - now)):
                    if key.fd == self._output:
                        if not self._read_output():
                            selector.unregister(self._output)
                    elif not self._read_messages(progress):
                        return
                if self._message is not None:
                    deadline = min(deadline, now + _LEAVE_SECONDS)
        self._timed_out = self._message is None

    def _read_messages(self, progress: Progress) -> bool:
        data = os.read(self._messages, 1 << 20)
        self._received += data
        if b"\n" in data:
            *lines, rest = bytes(self._received).split(b"\n")
            self._received = bytearray(rest)
            for message in map(_parse, lines):
                if "progress" in message:
                    progress(*message["progress"])
                else:
                    self._message = message
        garbled = self._message is not None and not _LAST & self._message.keys()
        return bool(data) and not garbled and len(self._received) <= 2 * MESSAGE_BYTES

    def _read_output(self) -> bool:
        data = os.read(self._output, 1 << 20)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        return bool(data)

    def _watch_memory(self) -> None:
        # ru_maxrss of a child starts at its parent's resident size (Linux keeps the mark over exec), so what a child
        # that dies had is the last figure seen here; one that ends well reports its own.
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{self._process.pid}/status").read_bytes()
            self._peak_rss = int(status.split(b"VmHWM:")[1].split()[0]) << 10

    def end(self) -> None:
        """Kill what is left of the group, reap the child, keep its last words. Leaves no orphan."""
        try:
            # The zombie still holds the id, so this can't hit a stranger; the status of a child that has ended stays.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._reap()
            os.set_blocking(self._output, False)
            with contextlib.suppress(BlockingIOError):
                while self._read_output():
                    pass
        finally:
            self._close()
        _log.debug("worker output:\n%s", self._tail.decode(errors="replace"))

    def _reap(self) -> None:
        deadline = time.monotonic() + _GONE_SECONDS
        while time.monotonic() < deadline:
            try:
                pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
            except ChildProcessError:  # the program ignores SIGCHLD: the kernel has reaped it
                return
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.usage = self._measure(used)
                return
            time.sleep(0.001)
        _log.warning("worker process %d could not be ended within %g s", self._process.pid, _GONE_SECONDS)

    def _measure(self, used: resource.struct_rusage) -> Usage:
        reported = (self._message or {}).get("peak_rss")
        peak = reported if isinstance(reported, int) else self._peak_rss
        return Usage(time.monotonic() - self._started, used.ru_utime + used.ru_stime, peak or max_rss_bytes(used))

    def _close(self) -> None:
        for end in (self._requests, self._messages, self._output):
            with contextlib.suppress(OSError):
                os.close(end)

    def result(self, what: str, limits: Limits) -> Any:
        """The function's result, or the error that describes what became of it."""
        message = self._message or {}
        if "result" in message:
            return message["result"]
        if isinstance(message.get("error"), dict):
            raise from_json(message["error"])
        peak = f"peak RSS {self.usage.peak_rss_bytes / 1e6:.0f} MB"
        raise _failure(what, message, self._process.returncode, self._tail, self._timed_out, limits, peak)


def _failure(
    what: str, message: dict[str, Any], status: int | None, tail: bytes, timed_out: bool, limits: Limits, peak: str
) -> StepError:
    words = last_words(tail)
    again = "What was finished before is kept: the same command goes on from there."
    memory_hint = f"Free memory, close other programs, or choose a smaller model or fewer threads. {again}"
    if timed_out:
        return StepError(
            f"{what} failed: not done after {limits.wall_seconds:g} s, stopped", hint=words and f"Last output: {words}"
        )
    if message:
        text = str(message.get("failure", "the worker sent something that is no message"))
        return StepError(f"{what} failed: {text}", hint=memory_hint if text.startswith("out of memory") else None)
    if status is None or status >= 0:
        return StepError(
            f"{what} failed: the worker ended with status {status} and no result: {words or 'it printed nothing'}"
        )
    number = -status
    if number == signal.SIGKILL:
        return StepError(f"{what} failed: killed (signal 9), likely out of memory, {peak}", hint=memory_hint)
    if number == signal.SIGXCPU:
        return StepError(f"{what} failed: used more than {limits.cpu_seconds} s of processor time, stopped")
    if _OUT_OF_MEMORY.search(tail):
        return StepError(f"{what} failed: out of memory (signal {number}), {peak}: {words}", hint=memory_hint)
    name = signal.strsignal(number) or "unknown"
    return StepError(f"{what} failed: the worker died of signal {number} ({name}): {words or 'it printed nothing'}")


def last_words(output: bytes, limit: int = 300) -> str:
    """The line of a dead process's output that most likely says why: printable characters, at most `limit` of them."""
    before = output.partition(_STACK)[0] or output
    lines = [line for line in (raw.strip() for raw in before.splitlines()) if line] or [b""]
    candidates = ([line for line in lines if kind.search(line)] for kind in (_ABORTED, _COMPLAINT))
    line = next((found[-1] for found in candidates if found), lines[-1])
    return _UNPRINTABLE.sub("", line.decode(errors="replace"))[:limit]


def max_rss_bytes(used: resource.struct_rusage) -> int:
    """`ru_maxrss` in bytes: the kernel counts KiB on Linux (getrusage(2)), bytes on macOS."""
    return used.ru_maxrss if sys.platform == "darwin" else used.ru_maxrss << 10


def _parse(line: bytes) -> dict[str, Any]:
    # A child taken over by a hostile model may write anything here; it must not get a traceback out of this process.
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {"garbled": True}
    if not isinstance(message, dict):
        return {"garbled": True}
    if "progress" in message:
        steps = message["progress"]
        whole = isinstance(steps, list) and len(steps) == 2 and all(type(step) is int for step in steps)
        return message if whole else {"garbled": True}
    return message
