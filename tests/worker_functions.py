"""Functions that the tests of the worker run in a child: well-behaved ones, and every way to die."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import edgepack
from edgepack import errors


def echo(*, progress, **arguments):
    return arguments


def counts(*, progress, total, seconds):
    for done in range(1, total + 1):
        progress(done, total)
        time.sleep(seconds / total)
    return total


def counts_in_threads(*, progress, total):
    threads = [threading.Thread(target=lambda: [progress(i, total) for i in range(total)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "done"


def surroundings(*, progress):
    return {
        "environment": dict(os.environ),
        "stdin": sys.stdin.read(),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "session": os.getsid(0) == os.getpid(),
        "cwd": str(Path.cwd()),
        "temporary": tempfile.gettempdir(),
        "edgepack": edgepack.__file__,
        "uid": os.getuid(),
        "torch": "torch" in sys.modules,
    }


def interfaces(*, progress):
    return [name for _, name in socket.if_nameindex()]


def allocates(*, progress, megabytes):
    data = bytearray(megabytes << 20)
    data[:: resource.getpagesize()] = b"x" * len(data[:: resource.getpagesize()])
    return len(data)


def allocates_and_is_killed(*, progress, megabytes):
    data = bytearray(b"x") * (megabytes << 20)
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGKILL)
    return len(data)


def raises(*, progress, kind, message, hint):
    raise getattr(errors, kind)(message, hint=hint)


def raises_index_error(*, progress):
    return [][3]


def fills_the_disk(*, progress, path):
    raise OSError(28, "No space left on device", path)


def exits(*, progress, status):
    os._exit(status)


def aborts_like_ggml(*, progress):
    print("llama_model_loader: error in nothing in particular", file=sys.stderr)
    sys.stderr.write("\x1b[31mggml/src/ggml.c:1234: GGML_ASSERT(ne00 % 32 == 0) failed\x1b[0m\n")
    sys.stderr.flush()
    os.abort()


def dies_of_bad_alloc(*, progress):
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


def segfaults(*, progress):
    ctypes.string_at(8)


def native_noise(*, progress):
    libc = ctypes.CDLL(None)
    libc.puts(b'{"result": "forged by stdout"}')
    libc.fflush(None)
    os.write(1, b'{"error": {}}\n')
    print('{"result": 1}')
    return "the real one"


def prints_forever(*, progress, megabytes):
    chunk = b"noise " * 170_000 + b"\n"
    for _ in range(megabytes):
        os.write(2, chunk)
    os.write(2, b"x.cpp:1: the end\n")
    os.abort()


def returns_much(*, progress, megabytes):
    return "x" * (megabytes << 20)


def returns_a_set(*, progress):
    return {1, 2}


def garbles_the_pipe(*, progress, data):
    progress._write(data.encode())
    time.sleep(30)


def computes_forever(*, progress):
    while True:
        sum(range(10_000))


def sleeps(*, progress, seconds, pids=None):
    """Sleep, with a grandchild that sleeps too; write both pids to the file `pids`, and leave a temporary file."""
    grandchild = subprocess.Popen(["sleep", str(seconds)])
    tempfile.NamedTemporaryFile(delete=False).close()
    if pids:
        Path(pids + ".tmp").write_text(f"{os.getpid()} {grandchild.pid}")
        Path(pids + ".tmp").rename(pids)
    time.sleep(seconds)


def leaves_a_grandchild(*, progress):
    """Return while a grandchild goes on, with both of its outputs open."""
    return subprocess.Popen(["sleep", "60"]).pid


def wait(*, seconds, progress):
    time.sleep(seconds)
    return seconds


def refuse_after(*, seconds, progress):
    time.sleep(seconds)
    raise errors.InputRefused("refused beside")
