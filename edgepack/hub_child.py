"""The process that talks to the Hugging Face hub: `python -P -m edgepack.hub_child`.

The only part of edgepack with a network and a token, and it never parses a model: it resolves a revision, downloads
files, and answers in lines of JSON on stdout. A process of its own because huggingface_hub reads its settings at
import and shares one HTTP client per process, and because a hanging download must be killable. On top of
huggingface_hub it bounds every wait (`Retry-After`, a body that trickles), refuses plain http, and keeps the token on
the hub's own host.

    {"op": "info", "id": "org/name", "revision": "main"}             -> {"result": {"commit", "gated", "files": [...]}}
    {"op": "fetch", "id": ..., "commit": ..., "file": ...}           -> {"bytes": n}..., {"result": {"path": ...}}
    either with "kind": "dataset"                                    the same, of a data set
    any                                                              -> {"error": {...}}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from edgepack.errors import EdgepackError, FetchError, StorageError, UsageError

MAX_WAIT_SECONDS = 60  # longest Retry-After obeyed; the hub's windows are 5 minutes, a person should decide then
ATTEMPTS = 4
_INFO_SECONDS = 30.0  # model_info has no time limit of its own
_CHUNK_BYTES = 1 << 20  # what a broken connection can lose, and the step of the progress; the default is 10 MiB
_MIN_BYTES_PER_SECOND = 1024  # below that for three read timeouts, a download counts as stalled
_ACCESS_HINT = "Check the spelling; for a private or gated model set HF_TOKEN or run `hf auth login`."
_NETWORK_HINT = "Check the network and the proxy, or set HF_HUB_OFFLINE=1 to use what is already downloaded."


def main() -> None:
    """Answer requests from stdin until it ends."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    hub = Hub()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(hub, str(request.pop("op")))(**request)}
        except EdgepackError as error:
            answer = {"error": error.as_json()}
        except BrokenPipeError:  # the parent is gone
            return
        except Exception as error:  # the edge of the process: whatever it is, the parent must hear of it
            answer = {"error": explain(error, request).as_json()}
        _send(json.loads(redact(json.dumps(answer))))


def _send(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def redact(text: str) -> str:
    """The text without the token, wherever the token comes from."""
    from huggingface_hub import get_token

    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), get_token()):
        if secret and len(secret) >= 8:
            text = text.replace(secret, "***")
    return text


class Hub:
    """huggingface_hub with its waits bounded."""

    def __init__(self) -> None:
        import huggingface_hub
        from huggingface_hub import constants

        constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
        self._endpoint = _origin(constants.ENDPOINT)
        self._stall_seconds = 3.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT
        default = huggingface_hub.get_session()
        client, hooks = type(default), default.event_hooks["request"]
        huggingface_hub.set_client_factory(
            lambda: client(
                event_hooks={"request": [*hooks, self._check_request], "response": [self._check_response]},
                follow_redirects=True,
                timeout=_INFO_SECONDS,
            )
        )

    def info(self, id: str, revision: str, kind: str = "model") -> dict[str, Any]:
        """Resolve a revision to a commit and list the files with size, sha256 (LFS) and git blob id."""
        from huggingface_hub import HfApi

        try:
            info: Any = _retried(
                lambda: HfApi().repo_info(
                    id, revision=revision, repo_type=kind, files_metadata=True, timeout=_INFO_SECONDS
                )
            )
        except (KeyError, TypeError, AttributeError) as error:  # JSON, but not the hub's
            raise explain(json.JSONDecodeError(str(error), "", 0), {"id": id}) from error
        return {
            "commit": info.sha,
            "gated": info.gated,
            "files": [
                {
                    "name": file.rfilename,
                    "size": file.lfs.size if file.lfs else file.size,
                    "sha256": file.lfs.sha256 if file.lfs else None,
                    "blob_id": file.blob_id,
                }
                for file in info.siblings or ()
            ],
        }

    def fetch(self, id: str, commit: str, file: str, kind: str = "model") -> dict[str, Any]:
        """Download one file of a commit into the Hugging Face cache; a file that is there is not fetched again."""
        from huggingface_hub import hf_hub_download

        return {"path": hf_hub_download(id, file, revision=commit, repo_type=kind, tqdm_class=_bar())}

    def _check_request(self, request: Any) -> None:
        url = urlsplit(str(request.url))
        if url.scheme != "https" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise FetchError(f"the hub redirects to {url.scheme}://{url.hostname}, which is not encrypted")
        if _origin(str(request.url)) != self._endpoint:
            request.headers.pop("authorization", None)

    def _check_response(self, response: Any) -> None:
        if response.status_code in (408, 429, 503):
            wait = response.headers.get("Retry-After", "").strip()
            if wait.isdigit() and int(wait) > MAX_WAIT_SECONDS:
                raise FetchError(
                    f"the hub limits the rate (HTTP {response.status_code}) and asks to wait {int(wait)} s",
                    hint="Try again then; a request with HF_TOKEN set has a higher limit.",
                )
        response.stream = _watched(response.stream, self._stall_seconds)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _watched(stream: Any, seconds: float) -> Any:
    """The stream, ending in a FetchError when less than 1 KiB/s came in over `seconds`."""

    class Watched(type(stream)):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            start, received = time.monotonic(), 0
            for chunk in stream:
                yield chunk
                received += len(chunk)
                now = time.monotonic()
                if now - start >= seconds:
                    if received < _MIN_BYTES_PER_SECOND * (now - start):
                        raise FetchError(
                            f"the download stalled: {received} bytes in {now - start:.0f} s", hint=_NETWORK_HINT
                        )
                    start, received = now, 0

        def close(self) -> None:
            stream.close()

    return Watched()


def _bar() -> type[Any]:
    """A tqdm that draws nothing and reports every chunk to the parent."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            _send({"bytes": int(n or 0)})
            return None

    return Bar


def _retried(call: Callable[[], Any]) -> Any:
    """`model_info` does not retry; do it as the downloads do: rate limits, server errors, lost connections."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except OSError as error:  # HfHubHTTPError is one; connection errors of the HTTP client are not
            response = getattr(error, "response", None)
            if response is None or response.status_code not in (408, 429, 500, 502, 503, 504) or attempt == ATTEMPTS:
                raise
            wait = response.headers.get("Retry-After", "").strip()
            time.sleep(int(wait) if wait.isdigit() else 2 ** (attempt - 1))
    raise FetchError("the hub did not answer")


# By class name, most specific first, because the HTTP client huggingface_hub uses has changed its name before. Each
# row: class, message, hint; {id}, {revision}, {file}, {endpoint} and {detail} are filled in.
_ERRORS: Mapping[str, tuple[type[EdgepackError], str, str]] = MappingProxyType(
    {
        "GatedRepoError": (
            FetchError,
            "{id} is gated: its authors ask to accept their terms first",
            "Accept them on {page}, then set HF_TOKEN or run `hf auth login`.",
        ),
        "DisabledRepoError": (FetchError, "{id} has been disabled on the hub", "Choose another one."),
        "RevisionNotFoundError": (
            FetchError,
            "{id} has no revision {revision!r}",
            "Give a branch, a tag or a commit that {page}/commits lists.",
        ),
        "RepositoryNotFoundError": (FetchError, "{endpoint} has no {kind} {id}, or it is private", _ACCESS_HINT),
        "EntryNotFoundError": (FetchError, "{id} at {revision} has no file {file}", "Resolve the revision again."),
        "HFValidationError": (UsageError, "{id!r} is no valid hub id", "Give org/name or org/name@revision."),
        "OfflineModeIsEnabled": (
            FetchError,
            "{id}: offline mode is on and {file} is not in the cache",
            "Unset HF_HUB_OFFLINE to download it.",
        ),
        "TimeoutException": (FetchError, "{endpoint} stopped sending ({id} {file})", _NETWORK_HINT),
        "ProxyError": (FetchError, "the proxy refused: {detail}", "Check HTTPS_PROXY and NO_PROXY."),
        "ConnectError": (FetchError, "{endpoint} can't be reached: {detail}", _NETWORK_HINT),
        "RemoteProtocolError": (FetchError, "{endpoint} broke off the connection ({id} {file})", _NETWORK_HINT),
        "NetworkError": (FetchError, "the connection to {endpoint} was lost: {detail}", _NETWORK_HINT),
        "TooManyRedirects": (FetchError, "{endpoint} redirects without end ({id} {file})", _NETWORK_HINT),
        "FileMetadataError": (
            FetchError,
            "{endpoint} does not answer like a Hugging Face hub ({id} {file})",
            "Check HF_ENDPOINT and the proxy.",
        ),
        "JSONDecodeError": (
            FetchError,
            "{endpoint} does not answer like a Hugging Face hub ({id})",
            "Check HF_ENDPOINT and the proxy.",
        ),
    }
)
_STATUS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        401: ("{endpoint} does not accept the token, or {id} needs one", _ACCESS_HINT),
        403: ("{endpoint} denies access to {id}", "Check that the token may read it; " + _ACCESS_HINT),
        404: ("{endpoint} has no {id} {file}", _ACCESS_HINT),
        429: (
            "{endpoint} limits the rate of requests (HTTP 429)",
            "Wait some minutes; set HF_TOKEN for a higher limit.",
        ),
    }
)


def explain(error: BaseException, request: Mapping[str, Any]) -> EdgepackError:
    """One line for whatever huggingface_hub raised.

    Args:
        error: The exception; of a LocalEntryNotFoundError, the cause counts.
        request: What was being asked for: id, revision or commit, file, kind.

    Returns:
        A FetchError, a StorageError (disk) or a UsageError (the id).
    """
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        return explain(error.__cause__, request)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    dataset = request.get("kind") == "dataset"
    facts = {
        "id": request.get("id", ""),
        "revision": request.get("revision", str(request.get("commit", ""))[:12]),
        "file": request.get("file", "information"),
        "endpoint": endpoint,
        "kind": "data set" if dataset else "model",
        "page": f"{endpoint}/{'datasets/' if dataset else ''}{request.get('id', '')}",
        "detail": " ".join(str(error).split())[:200],
    }
    for name in (base.__name__ for base in type(error).__mro__):
        if name in _ERRORS:
            kind, message, hint = _ERRORS[name]
            return kind(message.format(**facts), hint=hint.format(**facts))
    response = getattr(error, "response", None)
    if response is not None:
        status = int(response.status_code)
        message, hint = _STATUS.get(status, (f"{{endpoint}} answered HTTP {status} for {{id}} {{file}}", _NETWORK_HINT))
        return FetchError(message.format(**facts), hint=hint)
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return FetchError("{id}: {file} arrived incomplete".format(**facts), hint=_NETWORK_HINT)
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"the Hugging Face cache can't be written: {error}", hint="Set HF_HOME to another place.")
    return FetchError(
        f"{facts['id']} {facts['file']}: {type(error).__name__}: {facts['detail']}",
        hint="HF_HUB_DISABLE_XET=1 downloads over plain HTTP.",
    )


if __name__ == "__main__":
    main()
