"""Calibration text from a data set on a hub, over real HTTP, against the local server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from edgepack.calibrate import texts
from edgepack.calibrate.texts import calibration_text, resolve
from edgepack.errors import EdgepackError, FetchError, InputRefused

FILES = {
    "README.md": b"# The card",
    "LICENSE.txt": b"MIT",
    ".gitattributes": b"*.jsonl filter=lfs",
    "data/train.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "data/more.txt": b"three",
    "table.parquet": b"PAR1....",
    "loader.py": b"raise SystemExit",
}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with FakeHub(FILES, id="acme/words", dataset=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def refusal(kind: type[EdgepackError], spec: str) -> EdgepackError:
    with pytest.raises(kind) as caught:
        resolve(spec)
    assert "\n" not in caught.value.message
    return caught.value


def test_the_text_files_of_a_data_set_are_fetched_at_one_commit(served: FakeHub, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = calibration_text("hub:acme/words", tmp_path, lambda done, total: steps.append((done, total)))
    assert found.text == "three\n\n\none\n\n\ntwo"
    assert found.origin == f"acme/words@{COMMIT[:12]}"
    assert found.datasets == ("data/more.txt", "data/train.jsonl")
    assert steps[-1] == (37, 37)
    first, *others = [r.path for r in served.requests]
    assert first == "/api/datasets/acme/words/revision/main"
    assert all(path.startswith(f"/datasets/acme/words/resolve/{COMMIT}/data/") or "/cdn/" in path for path in others)


def test_a_worker_reads_what_its_parent_found(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located = resolve("hub:acme/words")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as edgepack.worker sets it
    count = len(served.requests)
    found = calibration_text(json.loads(json.dumps(located.as_json())), tmp_path)
    assert (found.text, found.origin) == ("three\n\n\none\n\n\ntwo", located.origin)
    assert len(served.requests) == count


def test_a_revision_and_one_file_can_be_named(served: FakeHub, tmp_path: Path) -> None:
    served.revisions["v1"] = COMMIT
    found = calibration_text("hub:acme/words@v1:data/more.txt", tmp_path)
    assert (found.text, found.origin) == ("three", f"acme/words@{COMMIT[:12]}:data/more.txt")
    assert not served.downloads("train.jsonl")


def test_wrong_bytes_are_refused(served: FakeHub) -> None:
    served.faults.wrong_bytes = {"data/more.txt": 2}
    assert "wrong git blob id, twice" in refusal(InputRefused, "hub:acme/words").message


def test_what_is_not_there_says_what_to_do(served: FakeHub) -> None:
    error = refusal(InputRefused, "hub:acme/words:data/test.txt")
    assert "no data/test.txt that can be read; it has" in error.message and ".parquet" in error.message
    error = refusal(FetchError, "hub:acme/other")
    assert "has no data set acme/other" in error.message
    error = refusal(FetchError, "hub:acme/words@v2")
    assert "no revision 'v2'" in error.message
    assert "/datasets/acme/words/commits" in str(error.hint)


def test_a_data_set_of_tables_says_how_to_turn_them_into_text(served: FakeHub) -> None:
    for name in ("data/train.jsonl", "data/more.txt"):
        del served.files[name]
    error = refusal(InputRefused, "hub:acme/words")
    assert "no text file that can be read" in error.message
    assert "to_json" in str(error.hint)


def test_a_data_set_that_is_too_large_is_refused_before_it_is_downloaded(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MAX_BYTES", 20)
    error = refusal(InputRefused, "hub:acme/words")
    assert "2 files with 37 bytes of text, expected at most 20" in error.message
    assert error.hint == "Name one file: hub:acme/words:data/more.txt"
    assert len(served.requests) == 1
    assert resolve("hub:acme/words:data/more.txt").files


def test_unsafe_names_and_gated_data_sets_are_refused(served: FakeHub) -> None:
    served.faults.status = {"/api/datasets/": [(403, {"X-Error-Code": "GatedRepo"})]}
    error = refusal(FetchError, "hub:acme/words")
    assert "gated" in error.message
    assert f"{served.url}/datasets/acme/words" in str(error.hint)
    served.faults.extra_siblings = [{"rfilename": "../evil.txt", "size": 1, "blobId": "0" * 40}]
    assert "'../evil.txt'" in refusal(InputRefused, "hub:acme/words").message


def test_offline_one_file_comes_from_the_cache(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve("hub:acme/words").files[0][1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(served.requests)
    assert resolve("hub:acme/words:data/train.jsonl").origin == f"acme/words@{COMMIT[:12]}:data/train.jsonl"
    assert "hub:acme/words:FILE" in str(refusal(FetchError, "hub:acme/words").hint)
    assert "not in the cache" in refusal(FetchError, "hub:acme/words:data/test.txt").message
    assert "'v2' is not in" in refusal(FetchError, "hub:acme/words@v2:data/more.txt").message
    path.resolve().write_bytes(b"eerht")
    assert "other bytes" in refusal(InputRefused, "hub:acme/words:data/more.txt").message
    assert len(served.requests) == count
