"""Disks that are full, read-only, elsewhere or out of descriptors: real ones, in a mount namespace of our own.

Where the kernel does not let an ordinary user have one, `test_every_call.py` still injects each of these errors.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack.errors import StorageError
from edgepack.store import Store

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

allowed = shutil.which("unshare") and not subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "x", "/mnt"]).returncode
mounts = pytest.mark.skipif(not allowed, reason="this kernel gives ordinary users no mount namespaces")

PRELUDE = """
import os, sys
from pathlib import Path
from edgepack import store, files
from edgepack.errors import StorageError
from edgepack.publish import publish
from edgepack.store import Store
base = Path(sys.argv[1])
def make(size):
    def write(folder):
        with open(folder / "m.gguf", "wb", buffering=0) as file:
            for _ in range(size >> 16):
                file.write(bytes(1 << 16))
    return write
def refused(action):
    try:
        action()
    except StorageError as error:
        print(error, "|", error.hint)
        return
    raise SystemExit("not refused")
def temporary():
    return [str(p) for p in base.rglob("*") if ".partial-" in p.name or p.parent.name == "tmp"]
"""


def in_namespace(folder, mount_commands, code):
    """Run Python code on file systems mounted for it alone; returns what it printed."""
    script = f"{mount_commands} && exec {shlex.join([sys.executable, '-c', PRELUDE + code, str(folder)])}"
    done = subprocess.run([*NAMESPACE, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@mounts
def test_a_full_cache_is_told_cleaned_and_leaves_earlier_steps(tmp_path):
    printed = in_namespace(
        tmp_path,
        f"mount -t tmpfs -o size=8m tmpfs {tmp_path}",
        """
Store(base).step("first", {}, make(2 << 20))
refused(lambda: Store(base).step("second", {}, make(16 << 20)))
assert temporary() == [], temporary()
assert Store(base).step("first", {}, make(2 << 20)).cached
assert not Store(base).step("second", {}, make(4 << 20)).cached
""",
    )
    assert f"{tmp_path}: no space left on device | Set EDGEPACK_CACHE to a folder" in printed


@mounts
def test_a_full_output_is_told_and_left_as_it_was(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "small").mkdir()
    printed = in_namespace(
        tmp_path,
        f"mount -t tmpfs -o size=32m tmpfs {tmp_path}/cache && mount -t tmpfs -o size=3m tmpfs {tmp_path}/small",
        """
entry = Store(base / "cache").step("export", {}, make(4 << 20))
refused(lambda: publish(lambda f: Store(base / "cache").release(entry, "m.gguf", f / "m.gguf"), base / "small/new/out"))
assert list((base / "small").iterdir()) == []
assert Store(base / "cache").step("export", {}, make(1)).cached
""",
    )
    assert "/m.gguf: no space left on device | Free some space" in printed


@mounts
def test_a_package_on_another_file_system_gets_a_copy_and_the_cache_lets_go_of_a_large_one(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "usb").mkdir()
    in_namespace(
        tmp_path,
        f"mount -t tmpfs tmpfs {tmp_path}/cache && mount -t tmpfs tmpfs {tmp_path}/usb",
        """
shop = Store(base / "cache")
small, large = shop.step("small", {}, make(1 << 20)), shop.step("large", {}, make(4 << 20))
store._COPIED_BELOW = 2 << 20
def package(folder):
    shop.release(small, "m.gguf", folder / "small.gguf")
    shop.release(large, "m.gguf", folder / "large.gguf")
publish(package, base / "usb/out")
shop.settle(small)
shop.settle(large)
assert (base / "usb/out/large.gguf").stat().st_size == 4 << 20
assert (small.path / "m.gguf").exists() and not (large.path / "m.gguf").exists()
again = Store(base / "cache").step("large", {}, make(4 << 20))
assert again.cached and again.files["m.gguf"].path == base / "usb/out/large.gguf"
""",
    )


@mounts
def test_a_read_only_cache_serves_what_it_has_and_names_the_way_out_for_the_rest(tmp_path):
    Store(tmp_path).step("first", {}, lambda folder: (folder / "m.gguf").write_bytes(b"x"))
    printed = in_namespace(
        tmp_path,
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}",
        """
assert Store(base).step("first", {}, make(1)).cached
refused(lambda: Store(base).step("second", {}, make(1)))
""",
    )
    assert "read-only file system | Set EDGEPACK_CACHE to a folder that can be written" in printed


@pytest.mark.skipif(os.getuid() == 0 and not allowed, reason="root may write anywhere")
def test_a_cache_without_permission_names_the_way_out(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    code = PRELUDE + 'refused(lambda: Store(base / "cache").step("first", {}, make(1)))'
    command = [sys.executable, "-c", code, str(tmp_path / "locked")]
    if os.getuid() == 0:
        command = ["unshare", "--user", *command]  # still the owner, but without root's right to write anywhere
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "/locked/cache: permission denied | Set EDGEPACK_CACHE to a folder that can be written" in done.stdout


def test_running_out_of_descriptors_is_told_and_harms_no_entry(tmp_path):
    Store(tmp_path).step("first", {}, lambda folder: (folder / "m.gguf").write_bytes(b"x"))
    code = (
        PRELUDE
        + """
import resource
shop = Store(base)
shop.step("first", {}, make(1)); shop.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
held = []
while True:
    try:
        held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
os.close(held.pop())
refused(lambda: shop.step("first", {}, make(1)))
refused(lambda: shop.step("second", {}, make(1)))
for descriptor in held: os.close(descriptor)
assert shop.step("first", {}, make(1)).cached
assert list((base / "bad").iterdir()) == []
"""
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("too many open files | Too many files are open: raise the limit (ulimit -n)") == 2


def test_a_disk_that_fails_while_an_entry_is_read_costs_the_entry_not_the_build(tmp_path, monkeypatch):
    store = Store(tmp_path)
    entry = store.step("first", {}, lambda folder: (folder / "m.gguf").write_bytes(b"x"))
    bad, real = (entry.path / "m.gguf").stat().st_ino, os.readv

    def broken(descriptor, buffers):
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "readv", broken)
    assert not store.step("first", {}, lambda folder: (folder / "m.gguf").write_bytes(b"x")).cached
    with pytest.raises(StorageError, match=r"/input: input/output error"):
        store.step("second", {}, fails_to_read)


def fails_to_read(folder):
    raise OSError(5, "Input/output error", "/input")
