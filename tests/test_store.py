"""The store: found again, hashed on every read, rebuilt when damaged; large files handed over without a second copy."""

import gc
import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from edgepack import store as store_module
from edgepack.canonical import canonical_json
from edgepack.errors import StepError, StorageError
from edgepack.publish import publish
from edgepack.store import Store, default_root

INPUTS = {"model": {"a.safetensors": "00" * 32}, "preset": "Q4_K_M", "threads": 2, "scale": 1e20}


class Maker:
    """Makes two files and counts how often it was asked to."""

    def __init__(self, data=b"weights" * 100):
        self.calls = 0
        self.data = data

    def __call__(self, folder):
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "model").mkdir()
        (folder / "model/m.gguf").write_bytes(self.data)
        (folder / "report.json").write_text("{}")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch):
    """Files of 100 bytes count as large, and blocks can't be shared."""
    monkeypatch.setattr(store_module, "_COPIED_BELOW", 100)
    monkeypatch.setattr(store_module, "clone", lambda source, destination: False)


def step(root, make, inputs=INPUTS):
    return Store(root).step("export", inputs, make)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_step_is_made_once_and_found_again(root):
    make = Maker()
    first, second = step(root, make), step(root, make)
    assert make.calls == 1
    assert (first.cached, second.cached) == (False, True)
    assert first.files == second.files
    record = second.files["model/m.gguf"]
    assert record.path == second.path / "model/m.gguf"
    assert record.path.read_bytes() == make.data
    assert (record.size, record.sha256) == (700, hashlib.sha256(make.data).hexdigest())
    assert set(second.files) == {"model/m.gguf", "report.json"}


def test_the_key_is_the_digest_of_name_and_inputs(root):
    entry = step(root, Maker())
    assert entry.key == hashlib.sha256(canonical_json({"name": "export", "inputs": INPUTS})).hexdigest()
    assert entry.path == root / "done" / entry.key


def test_any_other_input_or_name_is_another_entry(root):
    make = Maker()
    store = Store(root)
    store.step("export", INPUTS, make)
    store.step("export", INPUTS | {"threads": 3}, make)
    store.step("export", INPUTS | {"toolchain": {"llama_cpp": "0.3.37"}}, make)
    store.step("measure", INPUTS, make)
    assert make.calls == 4


def test_the_order_of_inputs_does_not_matter(root):
    make = Maker()
    step(root, make, {"a": 1, "b": 2})
    assert step(root, make, {"b": 2, "a": 1}).cached


def test_the_folders_of_the_store_are_tagged_for_backup_programs(root):
    step(root, Maker())
    assert (root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert root.stat().st_mode & 0o077 == 0


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit_manifest(**changes):
    def edit(entry):
        path = entry / "MANIFEST.json"
        path.write_bytes(canonical_json(json.loads(path.read_text()) | changes))

    return edit


def _replace(path, how):
    copy = path.with_name(path.name + ".real")
    path.rename(copy)
    how(copy, path)


DAMAGE = {
    "bit flip": lambda e: _flip(e / "model/m.gguf"),
    "truncated": lambda e: os.truncate(e / "model/m.gguf", 699),
    "empty": lambda e: os.truncate(e / "model/m.gguf", 0),
    "longer": lambda e: os.truncate(e / "model/m.gguf", 701),
    "deleted": lambda e: (e / "report.json").unlink(),
    "symlink to the same bytes": lambda e: _replace(e / "model/m.gguf", lambda a, b: b.symlink_to(a)),
    "hard link to the same bytes": lambda e: _replace(e / "model/m.gguf", os.link),
    "linked folder": lambda e: _replace(e / "model", lambda a, b: b.symlink_to(a)),
    "fifo": lambda e: _replace(e / "report.json", lambda a, b: os.mkfifo(b)),
    "folder": lambda e: _replace(e / "report.json", lambda a, b: b.mkdir()),
    "manifest missing": lambda e: (e / "MANIFEST.json").unlink(),
    "manifest empty": lambda e: os.truncate(e / "MANIFEST.json", 0),
    "manifest truncated": lambda e: os.truncate(e / "MANIFEST.json", 100),
    "manifest flipped": lambda e: _flip(e / "MANIFEST.json"),
    "manifest binary": lambda e: (e / "MANIFEST.json").write_bytes(bytes(range(256))),
    "manifest a list": lambda e: (e / "MANIFEST.json").write_text("[]"),
    "manifest nested": lambda e: (e / "MANIFEST.json").write_text("[" * 100_000),
    "manifest link": lambda e: _replace(e / "MANIFEST.json", lambda a, b: b.symlink_to(a)),
    "manifest of a newer schema": _edit_manifest(schema_version=2),
    "manifest of another key": _edit_manifest(key="0" * 64),
    "manifest of other inputs": _edit_manifest(inputs={}),
    "manifest without files": _edit_manifest(files="none"),
    "manifest with a file outside": _edit_manifest(files=[{"path": "../../x", "size": 0, "sha256": ""}]),
    "manifest with an absolute file": _edit_manifest(files=[{"path": "/etc/passwd", "size": 0, "sha256": ""}]),
    "not a folder": lambda e: (e.rename(e.with_name("was")), e.write_text("x")),
    "link to a folder": lambda e: _replace(e, lambda a, b: b.symlink_to(a)),
    "empty folder": lambda e: (e.rename(e.with_name("was")), e.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_noticed_set_aside_and_made_again(root, damage, caplog):
    make = Maker()
    entry = step(root, make)
    damage(entry.path)
    again = step(root, make)
    assert (again.cached, make.calls) == (False, 2)
    assert (again.path / "model/m.gguf").read_bytes() == make.data
    assert "damaged" in caplog.text
    assert [path.name.partition(".")[0] for path in (root / "bad").iterdir()] == [entry.key]
    assert step(root, make).cached


def test_only_the_last_damaged_copy_is_kept(root):
    for _ in range(3):
        _flip(step(root, Maker()).path / "report.json")
    step(root, Maker())
    assert len(list((root / "bad").iterdir())) == 1


@pytest.mark.parametrize("error", [StepError("no"), ValueError("bug"), KeyboardInterrupt(), SystemExit(143)])
def test_a_step_that_fails_after_writing_is_not_kept(root, error):
    def make(folder):
        Maker()(folder)
        raise error

    with pytest.raises(type(error)):
        step(root, make)
    assert list((root / "tmp").iterdir()) == list((root / "done").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: None, "made no file"),
        (lambda f: (f / "d").mkdir(), "made no file"),
        (lambda f: (f / "x").symlink_to("/etc/passwd"), "'x', which is a link"),
        (lambda f: os.mkfifo(f / "x"), "'x', which is a link or a special file"),
        (lambda f: ((f / "x").write_text(""), os.link(f / "x", f / "y")), "which is a link"),
        (lambda f: (f / "MANIFEST.json").write_text("{}"), "keeps for itself"),
        (lambda f: Path(os.fsdecode(bytes(f) + b"/\xff")).write_text(""), r"'\\\\xff', whose name is not UTF-8"),
    ],
)
def test_output_that_is_no_set_of_regular_files_is_refused(root, make, reason):
    with pytest.raises(StepError, match=reason):
        step(root, make)
    assert list((root / "tmp").iterdir()) == list((root / "done").iterdir()) == []


def test_an_os_error_of_the_step_names_the_file(root):
    with pytest.raises(StorageError, match="/nowhere/x: no such file"):
        step(root, lambda folder: Path("/nowhere/x").read_bytes())


def test_scratch_is_removed_whatever_happens(root):
    with Store(root).scratch() as folder:
        (folder / "f").write_text("x")
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), Store(root).scratch() as folder:
        (folder / "deep").mkdir()
        raise KeyboardInterrupt
    assert not folder.exists()
    assert list((root / "tmp").iterdir()) == []


def test_a_store_inside_a_file_is_a_storage_error_with_the_way_out(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file") as caught:
        step(tmp_path / "file/cache", Maker())
    assert "EDGEPACK_CACHE" in caught.value.hint


def test_the_default_place_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "here"))
    assert default_root() == tmp_path / "here"
    monkeypatch.setenv("EDGEPACK_CACHE", "")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "edgepack"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/h")
    assert default_root() == Path("/h/.cache/edgepack")


@pytest.mark.parametrize("name", ["with space", "ünï-模型-😀", "-dash", "x" * 240])
def test_unusual_places_work(tmp_path, name):
    place = tmp_path / (name if len(os.fsencode(name)) < 256 else name[:60])
    assert not step(place, Maker()).cached
    assert step(place, Maker()).cached


@pytest.mark.parametrize("umask", [0o077, 0o000, 0o022])
def test_the_umask_changes_nothing_that_counts(root, umask):
    previous = os.umask(umask)
    try:
        step(root, Maker())
    finally:
        os.umask(previous)
    assert step(root, Maker()).cached


def test_a_clock_that_was_set_back_changes_nothing(root, monkeypatch):
    step(root, Maker())
    monkeypatch.setattr("time.time", lambda: 0.0)
    store = Store(root)
    assert store.step("export", INPUTS, Maker()).cached
    assert not store.step("export", {"other": 1}, Maker()).cached


# Releasing files


def test_a_small_file_is_copied_and_stays(root, tmp_path):
    store, make = Store(root), Maker()
    entry = store.step("export", INPUTS, make)
    store.release(entry, "model/m.gguf", tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"edited")
    assert step(root, make).files["model/m.gguf"].path == entry.path / "model/m.gguf"
    assert make.calls == 1


def test_a_large_file_is_moved_and_found_where_it_went(root, tmp_path, large):
    store, make = Store(root), Maker()
    entry = store.step("export", INPUTS, make)
    inode = entry.files["model/m.gguf"].path.stat().st_ino
    store.release(entry, "model/m.gguf", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").stat().st_ino == inode
    assert (tmp_path / "m.gguf").stat().st_nlink == 1
    assert not (entry.path / "model/m.gguf").exists()
    again = step(root, make)
    assert again.cached
    assert again.files["model/m.gguf"].path == tmp_path / "m.gguf"


@pytest.mark.parametrize("damage", [_flip, Path.unlink, lambda p: _replace(p, lambda a, b: b.symlink_to(a))])
def test_a_released_file_that_changed_is_made_again(root, tmp_path, large, damage, caplog):
    caplog.set_level(logging.INFO)
    store, make = Store(root), Maker()
    store.release(store.step("export", INPUTS, make), "model/m.gguf", tmp_path / "m.gguf")
    damage(tmp_path / "m.gguf")
    again = step(root, make)
    assert (again.cached, make.calls) == (False, 2)
    assert again.files["model/m.gguf"].path == again.path / "model/m.gguf"
    assert "gone or changed" in caplog.text
    assert list((root / "bad").iterdir()) == list((root / "tmp").iterdir()) == []


def published(store, entry, output, **options):
    def build(folder):
        (folder / "model").mkdir()
        store.release(entry, "model/m.gguf", folder / "model/m.gguf")
        (folder / "edgepack.json").write_text("{}")

    publish(build, output, **options)
    store.settle(entry)


def test_a_package_takes_a_large_file_over(root, tmp_path, large):
    store, make = Store(root), Maker()
    entry = store.step("export", INPUTS, make)
    inode = entry.files["model/m.gguf"].path.stat().st_ino
    published(store, entry, tmp_path / "out")
    status = (tmp_path / "out/model/m.gguf").stat()
    assert (status.st_ino, status.st_nlink) == (inode, 1)
    again = step(root, make)
    assert again.cached
    assert again.files["model/m.gguf"].path == tmp_path / "out/model/m.gguf"


def test_a_package_that_is_built_again_at_the_same_place_takes_it_over_again(root, tmp_path, large):
    make = Maker()
    store = Store(root)
    published(store, store.step("export", INPUTS, make), tmp_path / "out")
    inode = (tmp_path / "out/model/m.gguf").stat().st_ino
    store = Store(root)
    published(store, store.step("export", INPUTS, make), tmp_path / "out", force=True)
    status = (tmp_path / "out/model/m.gguf").stat()
    assert (status.st_ino, status.st_nlink, make.calls) == (inode, 1, 1)
    assert step(root, make).cached


def test_a_second_package_of_one_entry_gets_bytes_of_its_own(root, tmp_path, large):
    make = Maker()
    for name in ("one", "two"):
        store = Store(root)
        published(store, store.step("export", INPUTS, make), tmp_path / name)
    assert [(tmp_path / name / "model/m.gguf").stat().st_nlink for name in ("one", "two")] == [1, 1]
    (tmp_path / "two/model/m.gguf").unlink()
    again = step(root, make)
    assert again.files["model/m.gguf"].path == tmp_path / "one/model/m.gguf"
    assert make.calls == 1


def test_a_failed_package_gives_the_file_back(root, tmp_path, large):
    store, make = Store(root), Maker()
    entry = store.step("export", INPUTS, make)

    def build(folder):
        store.release(entry, "model/m.gguf", folder / "m.gguf")
        raise StepError("no")

    with pytest.raises(StepError):
        publish(build, tmp_path / "out")
    assert store.step("export", INPUTS, make).cached  # and does not wait for itself
    again = step(root, make)
    assert again.cached
    assert again.files["model/m.gguf"].path == entry.path / "model/m.gguf"
    assert again.files["model/m.gguf"].path.stat().st_nlink == 1


def test_a_file_that_another_process_uses_is_copied_and_stays(root, tmp_path, large):
    other = Store(root)
    used = other.step("export", INPUTS, Maker())
    store = Store(root)
    published(store, store.step("export", INPUTS, Maker()), tmp_path / "out")
    assert used.files["model/m.gguf"].path.read_bytes() == Maker().data
    assert (tmp_path / "out/model/m.gguf").stat().st_nlink == 1
    other.close()


def test_a_package_published_but_not_settled_is_settled_by_the_next_step(root, tmp_path, large):
    store, make = Store(root), Maker()
    entry = store.step("export", INPUTS, make)
    publish(lambda folder: store.release(entry, "model/m.gguf", folder / "m.gguf"), tmp_path / "out")
    assert (tmp_path / "out/m.gguf").stat().st_nlink == 2
    store.close()  # as the kernel does for a process that was killed here
    again = step(root, make)
    assert again.cached
    assert again.files["model/m.gguf"].path == tmp_path / "out/m.gguf"
    assert (tmp_path / "out/m.gguf").stat().st_nlink == 1


def test_a_destination_that_exists_is_not_touched(root, tmp_path, large):
    store = Store(root)
    entry = store.step("export", INPUTS, Maker())
    (tmp_path / "m.gguf").write_text("mine")
    for name in ("model/m.gguf", "report.json"):
        with pytest.raises(StorageError, match=r"m\.gguf: file exists"):
            store.release(entry, name, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_record_of_places_that_is_rubbish_is_as_none(root, tmp_path, large):
    store, make = Store(root), Maker()
    entry = store.step("export", INPUTS, make)
    store.release(entry, "model/m.gguf", tmp_path / "m.gguf")
    (root / "released" / f"{entry.key}.json").write_text('{"files": 3}')
    assert not step(root, make).cached
    assert make.calls == 2


# Cleaning


def test_cleaning_takes_the_longest_unused_first(root):
    for number in range(4):
        entry = step(root, Maker(os.urandom(10_000)), {"number": number})
        os.utime(entry.path / "MANIFEST.json", (number, number))
    step(root, Maker(), {"number": 0})  # used again
    gc.collect()
    freed = Store(root).gc(keep_bytes=25_000)
    assert 20_000 < freed < 25_000
    found = {number: step(root, Maker(), {"number": number}).cached for number in range(4)}
    assert found == {0: True, 1: False, 2: False, 3: True}


def test_cleaning_leaves_what_is_in_use(root):
    store = Store(root)
    entry = store.step("export", INPUTS, Maker())
    step(root, Maker(), {"other": 1})
    with store.scratch() as folder:
        Store(root).gc()
        assert folder.exists()
    assert [path.name for path in (root / "done").iterdir()] == [entry.key]
    store.close()
    Store(root).gc()
    assert list((root / "done").iterdir()) == []


def test_cleaning_removes_damaged_copies_and_locks(root):
    _flip(step(root, Maker()).path / "report.json")
    step(root, Maker())
    gc.collect()
    Store(root).gc()
    assert files_in(root) == ["CACHEDIR.TAG", "locks/gc"]


def test_cleaning_touches_nothing_that_is_not_the_stores(root):
    step(root, Maker())
    gc.collect()
    for folder in ("done", "bad", "tmp", "locks"):
        (root / folder / "thesis").mkdir()
        (root / folder / "thesis/chapter.tex").write_text("x")
    Store(root).gc()
    assert [name for name in files_in(root) if "thesis" in name] == [
        f"{folder}/thesis/chapter.tex" for folder in ("bad", "done", "locks", "tmp")
    ]


def test_size_counts_every_file(root):
    step(root, Maker(b"x" * 1000))
    assert Store(root).size() == sum((root / name).stat().st_size for name in files_in(root))
