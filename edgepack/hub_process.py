"""The parent's side of `edgepack/hub_child.py`: starts it, asks it, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from edgepack.errors import FetchError, from_json

# Longer than any wait the child obeys (a Retry-After of 60 s, six read timeouts of 10 s with pauses).
_SILENCE_SECONDS = 300.0
_LEAVE_SECONDS = 3.0
_ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|XDG_\w+|HF_\w+|HUGGING_?FACE_\w+|SSL_CERT_\w+"
    r"|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(HTTPS?|ALL|NO)_PROXY|LD_LIBRARY_PATH|PYTHONDONTWRITEBYTECODE",
    re.IGNORECASE,
)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the child sees: the hub's settings, the proxy and certificates, and no other credential."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in sys.path if Path(path).is_absolute()]
    allowed = {name: value for name, value in environment.items() if _ENVIRONMENT.fullmatch(name)}
    allowed.pop("HF_DEBUG", None)  # it logs every request as a curl command
    return allowed | {
        "PYTHONPATH": os.pathsep.join(paths if root in paths else [root, *paths]),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_VERBOSITY": "error",
    }


class HubProcess:
    """A running child; use as a context manager."""

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        self._received = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "edgepack.hub_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=child_environment(os.environ),
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise FetchError(f"the download process could not be started: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.terminate()  # lets huggingface_hub remove its partial file
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def call(self, op: str, *, counting: Callable[[int], None] = lambda received: None, **arguments: str) -> Any:
        """Ask the child for one thing.

        Args:
            op: `info` or `fetch`.
            counting: Called with the bytes of each piece that came in.
            arguments: As the operation takes them.

        Raises:
            EdgepackError: What the child raised.
            FetchError: The child died or fell silent.
        """
        requests = cast(IO[bytes], self._process.stdin)
        try:
            requests.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            requests.flush()
        except BrokenPipeError:
            raise self._death() from None
        while True:
            message = json.loads(self._line())
            if "bytes" in message:
                counting(message["bytes"])
            elif "error" in message:
                raise from_json(message["error"])
            else:
                return message["result"]

    def _line(self) -> bytes:
        answers = cast(IO[bytes], self._process.stdout)
        deadline = time.monotonic() + _SILENCE_SECONDS
        while b"\n" not in self._received:
            with selectors.DefaultSelector() as selector:
                selector.register(answers, selectors.EVENT_READ)
                if not selector.select(deadline - time.monotonic()):
                    raise FetchError(
                        f"the download stalled: nothing for {_SILENCE_SECONDS:.0f} s",
                        hint="Try again; what is complete is kept. HF_HUB_DISABLE_XET=1 downloads over plain HTTP.",
                    )
            data = os.read(answers.fileno(), 1 << 16)
            if not data:
                raise self._death()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self) -> FetchError:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read()[-4096:].decode(errors="replace").split("\n")
        words = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")
        return FetchError(f"the download process died with status {status}: {words}")
