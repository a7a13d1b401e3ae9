"""Durable writes, hashes, copies and removal, and what the file system's refusals become."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from edgepack.errors import StorageError
from edgepack.files import (
    clone,
    copy,
    remove,
    sha256_of,
    storage_error,
    storage_errors,
    sync_tree,
    write_atomic,
)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "check the disk"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_refusals_name_the_path_the_reason_and_what_to_do(number, words, tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(StorageError) as caught, storage_errors(path):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{path}: {os.strerror(number)[:1].lower()}")
    assert words in caught.value.hint
    assert caught.value.exit_code == 1


def test_the_path_that_the_error_names_wins_over_the_general_one(tmp_path):
    assert (
        str(storage_error(OSError(28, "No space left on device", "/a/b"), tmp_path)) == "/a/b: no space left on device"
    )


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, b"one")
    write_atomic(path, b"two, which is longer")
    assert path.read_bytes() == b"two, which is longer"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_atomic_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def fail(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", fail) if call == "fsync" else ("pathlib.Path.replace", fail)))
        with pytest.raises(StorageError, match="no space left"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_hash_is_sha256_and_progress_counts_bytes(tmp_path):
    data = os.urandom((5 << 20) + 17)
    (tmp_path / "f").write_bytes(data)
    seen = []
    assert sha256_of(tmp_path / "f", lambda done, total: seen.append((done, total))) == hashlib.sha256(data).hexdigest()
    assert seen[-1] == (len(data), len(data))
    assert len(seen) == 6
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_of(tmp_path / "empty") == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "missing", "device"])
def test_only_regular_files_are_hashed(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "link":
        (tmp_path / "target").write_bytes(b"secret")
        path.symlink_to(tmp_path / "target")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = "/dev/zero"
    with pytest.raises(StorageError, match=r"(x|/dev/zero): "):
        sha256_of(path)


def test_a_copy_has_the_same_bytes_and_is_independent(tmp_path):
    data = os.urandom((3 << 20) + 5)
    (tmp_path / "a").write_bytes(data)
    seen = []
    copy(tmp_path / "a", tmp_path / "b", lambda done, total: seen.append(done))
    (tmp_path / "a").write_bytes(b"changed")
    assert (tmp_path / "b").read_bytes() == data
    assert (tmp_path / "b").stat().st_nlink == 1
    assert seen in ([], [1 << 20, 2 << 20, 3 << 20, (3 << 20) + 5])  # none where blocks could be shared


def test_a_copy_never_overwrites_and_never_follows_a_link(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for destination in ("b", "link"):
        with pytest.raises(StorageError, match="file exists"):
            copy(tmp_path / "a", tmp_path / destination)
    with pytest.raises(StorageError, match="link"):
        copy(tmp_path / "link", tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == b"b"
    assert not (tmp_path / "c").exists()


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a" * 100)

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"/b: no space left on device") as caught:
        copy(tmp_path / "a", tmp_path / "b")
    assert "Free some space" in caught.value.hint
    assert not (tmp_path / "b").exists()


def test_an_error_while_reading_names_the_file_that_is_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a")

    def broken(descriptor, buffers):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "readv", broken)
    with pytest.raises(StorageError, match="/a: input/output error") as caught:
        copy(tmp_path / "a", tmp_path / "b")
    assert "dmesg" in caught.value.hint
    assert not (tmp_path / "b").exists()
    with pytest.raises(StorageError, match="/a: input/output error"):
        sha256_of(tmp_path / "a")


def test_a_clone_shares_or_leaves_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 5000)
    if clone(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b").read_bytes() == b"a" * 5000
    else:
        assert not (tmp_path / "b").exists()


def test_removal_takes_folders_links_and_what_is_read_only_but_no_target(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "deep/er").mkdir(parents=True)
    (tree / "deep/er/file").write_bytes(b"y")
    (tree / "deep/out").symlink_to(tmp_path / "kept")
    (tree / "deep/er").chmod(0o500)
    remove(tree)
    assert not tree.exists()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "link")
    remove(tmp_path / "never was")
    assert (tmp_path / "kept/file").read_bytes() == b"x"
    assert stat.S_ISDIR((tmp_path / "kept").lstat().st_mode)


def test_a_tree_is_flushed_file_by_file_and_folder_by_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("x", "a/y"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "a/link").symlink_to("/dev/null")
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    sync_tree(tmp_path)
    assert sorted(flushed) == [str(tmp_path / name) for name in ("", "a", "a/y", "x")]
    assert flushed.index(str(tmp_path / "a/y")) < flushed.index(str(tmp_path / "a")) < flushed.index(str(tmp_path))
