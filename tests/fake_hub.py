"""A Hugging Face hub on localhost, as far as huggingface_hub 2 talks to one, with faults on request.

Speaks real HTTP: `GET /api/models/{id}/revision/{revision}` (siblings with sizes, LFS sha256 and git blob ids), `HEAD`
and `GET /{id}/resolve/{commit}/{file}` with ETag, X-Repo-Commit, X-Linked-Etag and a redirect to a "CDN" for LFS files,
Range, and the X-Error-Code words of the real one; `/api/datasets/...` and `/datasets/{id}/...` for a data set. Every
request is kept, headers included.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".model", ".bin", ".jsonl")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Faults:
    """What goes wrong. Names are file names in the repository; a count says for how many GETs."""

    status: dict[str, list[tuple[int, dict[str, str]]]] = field(
        default_factory=dict
    )  # path prefix -> answers, in order
    wrong_bytes: dict[str, int] = field(default_factory=dict)
    cut_off_at: dict[str, list[int]] = field(default_factory=dict)  # the connection ends after so many bytes
    ignore_range: bool = False
    silent: set[str] = field(default_factory=set)  # headers, then nothing
    trickle_after: dict[str, int] = field(default_factory=dict)  # from there on a byte at a time
    cdn: str | None = None  # LFS files redirect there; by default to this server under another host name
    extra_siblings: list[dict[str, object]] = field(default_factory=list)
    no_checksums: bool = False


class FakeHub:
    """One repository, `org/name`, a model or a data set. A context manager; `url` is the endpoint."""

    def __init__(
        self, files: Mapping[str, bytes], *, id: str = "acme/pico", gated: bool | str = False, dataset: bool = False
    ) -> None:
        self.api = f"/api/{'datasets' if dataset else 'models'}/{id}/revision/"
        self.resolve = f"{'/datasets' if dataset else ''}/{id}/resolve/"
        self.id, self.files, self.gated = id, dict(files), gated
        self.revisions = {"main": COMMIT, COMMIT: COMMIT}
        self.commits: dict[str, dict[str, bytes]] = {COMMIT: self.files}
        self.requests: list[Request] = []
        self.faults = Faults()
        self._ending = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self, name: str) -> list[Request]:
        """The GETs that asked for the content of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith("/" + name)]

    def pause(self, seconds: float) -> bool:
        return self._ending.wait(seconds)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        for prefix, answers in hub.faults.status.items():
            if path.startswith(prefix) and answers:
                status, headers = answers.pop(0)
                return self._answer(status, b'{"error": "as you wished"}', headers)
        if path.startswith("/cdn/"):
            return self._content(path.removeprefix("/cdn/"), lfs=False)
        if path.startswith(hub.api):
            return self._info(path.removeprefix(hub.api))
        if path.startswith(hub.resolve):
            commit, _, name = path.removeprefix(hub.resolve).partition("/")
            if commit not in hub.commits:
                return self._error(404, "RevisionNotFound")
            if name not in hub.commits[commit]:
                return self._error(404, "EntryNotFound")
            return self._content(name, lfs=name.endswith(LFS), commit=commit)
        return self._error(401, "RepoNotFound")

    def _info(self, revision: str) -> None:
        hub = self.hub
        if revision not in hub.revisions:
            return self._error(404, "RevisionNotFound")
        commit = hub.revisions[revision]
        siblings: list[dict[str, object]] = []
        for name, data in hub.commits[commit].items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if name.endswith(LFS):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append({"rfilename": name} if hub.faults.no_checksums else entry)
        document = {
            "id": hub.id,
            "modelId": hub.id,
            "sha": commit,
            "private": False,
            "gated": hub.gated,
            "disabled": False,
            "downloads": 1,
            "likes": 0,
            "tags": [],
            "siblings": siblings + hub.faults.extra_siblings,
        }
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _content(self, name: str, *, lfs: bool, commit: str = COMMIT) -> None:
        hub, faults = self.hub, self.hub.faults
        data = hub.commits[commit][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest() if name.endswith(LFS) else blob_id(data)}"'}
        headers["Accept-Ranges"] = "bytes"
        if not self.path.startswith("/cdn/"):
            headers["X-Repo-Commit"] = commit
        if lfs:
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(len(data))
            cdn = faults.cdn or hub.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{cdn}/cdn/{name}"
            return self._answer(302, b"", headers)
        if self.command == "GET" and faults.wrong_bytes.get(name, 0) > 0:
            faults.wrong_bytes[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, start = 200, 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and not faults.ignore_range:
            status, start = 206, int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(status, data[start:], headers, name)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], name: str = "") -> None:
        faults = self.hub.faults
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if name in faults.silent:
                self.hub.pause(60)
            elif name in faults.trickle_after:
                self.wfile.write(body[: faults.trickle_after[name]])
                for position in range(faults.trickle_after[name], len(body)):
                    self.wfile.write(body[position : position + 1])
                    self.wfile.flush()
                    if self.hub.pause(0.2):
                        break
            elif faults.cut_off_at.get(name):
                self.wfile.write(body[: faults.cut_off_at[name].pop(0)])
                self.close_connection = True
                self.wfile.flush()
                time.sleep(0.05)
            else:
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass
