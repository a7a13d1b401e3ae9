"""The hub over real HTTP, against a local server that speaks its protocol and misbehaves on request."""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
from fake_hub import COMMIT, FakeHub

from edgepack import hub
from edgepack.errors import EdgepackError, FetchError, InputRefused, UsageError
from edgepack.hub_child import explain, redact
from edgepack.hub_process import child_environment
from edgepack.source import hash_source, resolve

MARKER = "hf_marker0123456789abcdef"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", MARKER)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with FakeHub(pico.sharded()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def _refusal(kind: type[EdgepackError], model: str = "acme/pico") -> EdgepackError:
    with pytest.raises(kind) as caught:
        resolve(model)
    assert "\n" not in caught.value.message
    assert MARKER not in caught.value.message + str(caught.value.hint)
    return caught.value


def test_a_model_is_fetched_at_one_commit_and_every_file_is_recorded(served: FakeHub) -> None:
    steps: list[tuple[int, int]] = []
    source = resolve("acme/pico", lambda done, total: steps.append((done, total)))
    assert (source.kind, source.name, source.id) == ("hub", "pico", "acme/pico")
    assert (source.revision, source.commit, source.licence, source.gated) == ("main", COMMIT, "Apache-2.0", False)
    assert source.files == {name: hashlib.sha256(data).hexdigest() for name, data in served.files.items()}
    for name, data in served.files.items():
        assert (source.path / name).read_bytes() == data
    assert hash_source(source) is source
    total = sum(map(len, served.files.values()))
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_every_request_after_the_first_names_the_commit(served: FakeHub) -> None:
    served.revisions["v1"] = COMMIT
    assert resolve("acme/pico@v1").commit == COMMIT
    first, *others = [r.path for r in served.requests]
    assert first == "/api/models/acme/pico/revision/v1"
    assert all(COMMIT in path or path.startswith("/cdn/") for path in others)


def test_a_branch_that_moves_while_it_is_downloaded_makes_no_mixture(served: FakeHub) -> None:
    moved = "f" * 40
    served.commits[moved] = {name: data + b" " for name, data in served.files.items()}

    def move(done: int, total: int) -> None:
        served.revisions["main"] = moved

    source = resolve("acme/pico", move)
    assert source.commit == COMMIT
    assert source.files == {name: hashlib.sha256(data).hexdigest() for name, data in served.files.items()}


def test_only_files_of_the_model_are_downloaded(served: FakeHub) -> None:
    served.files |= {
        "pytorch_model.bin": b"\x80\x04pickle",
        "modeling_pico.py": b"raise SystemExit",
        "onnx/model.onnx": b"onnx",
        "consolidated.safetensors": pico.weights(),
        ".gitattributes": b"*.bin filter=lfs",
    }
    source = resolve("acme/pico")
    assert set(source.files) == set(pico.sharded())
    asked = {r.path.rsplit("/", 1)[1] for r in served.requests[1:]}
    assert asked == set(pico.sharded())


def test_wrong_bytes_of_the_right_size_are_fetched_once_more(served: FakeHub, tmp_path: Path) -> None:
    served.faults.wrong_bytes = {SHARD: 1}
    source = resolve("acme/pico")
    assert (source.path / SHARD).read_bytes() == served.files[SHARD]
    assert len(served.downloads(SHARD)) == 2
    aside = list((tmp_path / "hf").rglob("*.wrong"))
    assert len(aside) == 1
    assert aside[0].read_bytes() != served.files[SHARD]


@pytest.mark.parametrize("name", [SHARD, "tokenizer_config.json"])
def test_wrong_bytes_twice_are_refused_and_leave_no_file_in_the_snapshot(
    served: FakeHub, tmp_path: Path, name: str
) -> None:
    served.faults.wrong_bytes = {name: 2}
    error = _refusal(InputRefused)
    assert name in error.message
    assert "twice" in error.message
    assert not list((tmp_path / "hf").rglob(f"snapshots/*/{name}"))


def test_a_damaged_copy_in_the_cache_is_noticed_and_replaced(served: FakeHub) -> None:
    source = resolve("acme/pico")
    blob = (source.path / SHARD).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    again = resolve("acme/pico")
    assert again.files == source.files
    assert (again.path / SHARD).read_bytes() == served.files[SHARD]


def test_a_second_run_downloads_nothing(served: FakeHub) -> None:
    resolve("acme/pico")
    served.requests.clear()
    resolve("acme/pico")
    assert [r.path for r in served.requests] == ["/api/models/acme/pico/revision/main"]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_connection_that_breaks_off_is_resumed_and_ignored_ranges_do_no_harm(served: FakeHub, ignored: bool) -> None:
    served.files[SHARD] = data = random.Random(0).randbytes(3 << 20)
    served.faults.cut_off_at = {SHARD: [(2 << 20) + 1000]}
    served.faults.ignore_range = ignored
    source = resolve("acme/pico")
    assert (source.path / SHARD).read_bytes() == data
    assert [r.headers.get("range") for r in served.downloads(SHARD)] == [None, f"bytes={2 << 20}-"]


def test_a_connection_that_always_breaks_off_at_the_same_place_ends(served: FakeHub) -> None:
    served.faults.cut_off_at = {SHARD: [100] * 20}
    assert "broke off the connection" in _refusal(FetchError).message


def test_an_interrupted_download_leaves_no_process_and_no_partial_file(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.files[SHARD] = random.Random(0).randbytes(3 << 20)
    served.faults.trickle_after = {SHARD: 2 << 20}
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(done: int, total: int) -> None:
        if done > 1 << 20:
            assert list((tmp_path / "hf").rglob("*.incomplete"))
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(KeyboardInterrupt):
        resolve("acme/pico", interrupt)
    assert [process.poll() is not None for process in started] == [True]
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    served.faults.trickle_after = {}
    assert resolve("acme/pico").commit == COMMIT


def test_the_token_goes_to_the_hub_and_to_no_other_host(served: FakeHub) -> None:
    with FakeHub(served.files) as cdn:
        served.faults.cdn = cdn.url.replace("127.0.0.1", "localhost")
        resolve("acme/pico")
        assert len(cdn.downloads(SHARD)) == 1
        assert all("authorization" not in r.headers for r in cdn.requests)
    assert served.requests
    assert all(r.headers["authorization"] == f"Bearer {MARKER}" for r in served.requests)


def test_a_redirect_to_plain_http_elsewhere_is_refused(served: FakeHub) -> None:
    served.faults.cdn = "http://cdn.example.org"
    assert "not encrypted" in _refusal(FetchError).message


def test_the_token_is_stored_nowhere(served: FakeHub, tmp_path: Path) -> None:
    resolve("acme/pico")
    for path in (tmp_path / "hf").rglob("*"):
        if path.is_file():
            assert MARKER.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("status", "headers", "words", "advice"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "gated", "Accept them on"),
        (403, {"X-Error-Code": "GatedRepo"}, "gated", "HF_TOKEN"),
        (401, {"X-Error-Code": "RepoNotFound"}, "has no model acme/pico", "spelling"),
        (404, {"X-Error-Code": "RepoNotFound"}, "has no model acme/pico", "spelling"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'main'", "commits"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "disabled", "another"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "token", "HF_TOKEN"),
        (403, {}, "denies access", "token"),
        (418, {}, "HTTP 418", "network"),
        (429, {"Retry-After": "3600"}, "asks to wait 3600 s", "HF_TOKEN"),
    ],
)
def test_an_answer_that_is_no_answer_is_explained_in_one_line(
    served: FakeHub, status: int, headers: dict[str, str], words: str, advice: str
) -> None:
    served.faults.status = {"/api/": [(status, headers)]}
    error = _refusal(FetchError)
    assert words in error.message
    assert advice in str(error.hint)


def test_a_gated_file_is_explained_as_gated(served: FakeHub) -> None:
    served.faults.status = {"/acme/pico/resolve": [(403, {"X-Error-Code": "GatedRepo"})]}
    assert "is gated" in _refusal(FetchError).message


def test_a_model_that_does_not_exist_is_a_fetch_error(served: FakeHub) -> None:
    assert "has no model acme/nano" in _refusal(FetchError, "acme/nano").message
    assert "no revision 'v9'" in _refusal(FetchError, "acme/pico@v9").message


@pytest.mark.parametrize("prefix", ["/api/", "/acme/pico/resolve", "/cdn/"])
def test_a_rate_limit_with_a_short_wait_is_waited_out(served: FakeHub, prefix: str) -> None:
    served.faults.status = {prefix: [(429, {"Retry-After": "0"})]}
    assert resolve("acme/pico").commit == COMMIT


def test_a_rate_limit_in_the_middle_of_a_download_that_asks_for_an_hour_is_reported_at_once(served: FakeHub) -> None:
    served.faults.status = {"/cdn/": [(429, {"Retry-After": "3600"})]}
    started = time.monotonic()
    assert "asks to wait 3600 s" in _refusal(FetchError).message
    assert time.monotonic() - started < 10


def test_a_server_error_that_passes_is_retried(served: FakeHub) -> None:
    served.faults.status = {"/api/": [(503, {})]}
    assert resolve("acme/pico").commit == COMMIT


def test_a_body_that_trickles_is_given_up(served: FakeHub) -> None:
    served.faults.trickle_after = {SHARD: 10}
    started = time.monotonic()
    assert "stalled" in _refusal(FetchError).message
    assert time.monotonic() - started < 15


def test_a_body_that_never_comes_is_given_up(served: FakeHub) -> None:
    served.faults.silent = {SHARD}
    started = time.monotonic()
    assert "stopped sending" in _refusal(FetchError).message
    assert time.monotonic() - started < 30


def test_a_hub_that_is_not_there_is_named(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = _refusal(FetchError)
    assert "http://127.0.0.1:9 can't be reached" in error.message
    assert "HF_HUB_OFFLINE" in str(error.hint)


def test_something_that_is_no_hub_is_recognised(served: FakeHub) -> None:
    served.faults.status = {"/api/": [(200, {"Content-Type": "text/html"})] * 4}
    assert "does not answer like" in _refusal(FetchError).message


@pytest.mark.parametrize("endpoint", ["http://mirror.example.org", "ftp://localhost", "localhost", "https://u:p@x.org"])
def test_an_endpoint_that_is_not_https_is_refused(
    endpoint: str, served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT" in _refusal(UsageError).message


@pytest.mark.parametrize("name", ["../../config.json", "/etc/passwd", "a\\..\\b.safetensors", "x\u202e.json", "a\nb"])
def test_a_repository_that_lists_a_path_out_of_its_folder_is_refused(served: FakeHub, name: str) -> None:
    served.faults.extra_siblings = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    assert "lists a file named" in _refusal(InputRefused).message
    assert len(served.requests) == 1


def test_a_mirror_without_checksums_is_refused(served: FakeHub) -> None:
    served.faults.no_checksums = True
    assert "can't be checked" in _refusal(FetchError).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config.json": pico.config(auto_map={"AutoConfig": "evil.Config"})}, "auto_map"),
        ({"config.json": pico.config(architectures=["NoSuchModel"])}, "NoSuchModel"),
        ({"config.json": pico.config(quantization_config={"quant_method": "gptq", "bits": 4})}, "4-bit GPTQ"),
    ],
)
def test_a_model_that_will_be_refused_costs_no_weights(served: FakeHub, changes: dict[str, bytes], words: str) -> None:
    served.files |= changes
    assert words in _refusal(InputRefused).message
    assert not served.downloads(SHARD)


def test_a_repository_with_pickles_only_is_refused_before_anything_is_downloaded(served: FakeHub) -> None:
    for name in [name for name in served.files if "safetensors" in name]:
        del served.files[name]
    served.files["pytorch_model.bin"] = b"\x80\x04."
    error = _refusal(InputRefused)
    assert "pytorch_model.bin" in error.message
    assert "save_pretrained" in str(error.hint)
    assert len(served.requests) == 1


def test_an_index_that_names_a_file_the_repository_lacks_is_an_error(served: FakeHub) -> None:
    del served.files[SHARD]
    assert SHARD in _refusal(FetchError).message


def test_offline_with_a_full_cache_needs_no_network(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve("acme/pico@main")
    served.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in ("acme/pico", f"acme/pico@{COMMIT}"):
        offline = resolve(model)
        assert (offline.path, offline.commit, offline.files) == (online.path, COMMIT, dict(online.files))
    assert not served.requests


def test_offline_without_the_model_says_what_is_missing(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("acme/pico")
    (source.path / SHARD).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = _refusal(FetchError)
    assert SHARD in error.message
    assert COMMIT[:12] in error.message
    assert "revision 'v9' is not in" in _refusal(FetchError, "acme/pico@v9").message
    assert "is not in" in _refusal(FetchError, "acme/nano").message


def test_offline_with_a_damaged_copy_is_refused(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("acme/pico")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (SHARD, "tokenizer_config.json"):
        blob = (source.path / name).resolve()
        good = blob.read_bytes()
        blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert name in _refusal(InputRefused).message
        blob.write_bytes(good)


def test_a_gated_model_with_access_is_fetched_and_recorded_as_gated(served: FakeHub) -> None:
    served.gated = "manual"
    assert resolve("acme/pico").gated == "manual"


def test_the_child_sees_the_hubs_settings_and_no_other_credential() -> None:
    given = {"HF_TOKEN": "t", "https_proxy": "p", "AWS_SECRET_ACCESS_KEY": "s", "SSH_AUTH_SOCK": "a", "HF_DEBUG": "1"}
    seen = child_environment(given)
    assert seen["HF_TOKEN"] == "t"
    assert seen["https_proxy"] == "p"
    assert not {"AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "HF_DEBUG"} & seen.keys()


def test_a_token_in_an_error_text_is_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", MARKER)
    error = explain(RuntimeError(f"refused: https://u:{MARKER}@x.org"), {"id": "acme/pico"})
    assert MARKER in error.message
    assert MARKER not in redact(str(error.as_json()))


def test_a_child_that_dies_is_an_error_not_a_hang(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "no number")  # huggingface_hub stops at import
    assert "died with status" in _refusal(FetchError).message


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("org/name", ("org/name", "main")),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", "main")),
        ("name", None),
        ("a/b/c", None),
        ("../name", None),
        ("org/na--me", None),
        ("org/na..me", None),
        ("org/name@../../x", None),
        ("org/name@", None),
        ("-o/name", None),
        ("org/name.gguf", None),
        ("org/na me", None),
        ("org/name\n", None),
    ],
)
def test_hub_ids_are_what_the_hub_allows(text: str, parsed: tuple[str, str] | None) -> None:
    assert hub.parse_id(text) == parsed


def test_the_cache_folder_is_where_huggingface_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.cache_folder({"HF_HOME": "/x"}) == Path("/x/hub")
    assert hub.cache_folder({"HF_HUB_CACHE": "/y", "HF_HOME": "/x"}) == Path("/y")
    assert hub.cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub.cache_folder({}) == Path("~/.cache/huggingface/hub").expanduser()
