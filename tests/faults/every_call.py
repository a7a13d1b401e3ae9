"""Run a scenario again and again, and strike at its 1st, 2nd, 3rd, ... call that changes the disk, until none is left.

    python every_call.py kill|full|fuller|broken SCENARIO FOLDER

`kill` ends the process with SIGKILL before the call. `full` makes the first call from there on that needs space fail
with ENOSPC, `fuller` that one and all later ones (SQLite tests its recovery from a full disk both ways). `broken` makes
the call fail with EIO, whatever it is. After each strike the disk is checked with nothing but json and hashlib, and the
scenario is run again, unharmed. Prints the number of strikes.

Every strike is a fork, so that hundreds take seconds. Calls are seen by an audit hook, which covers pathlib, shutil and
whatever else goes through CPython; fsync and write, which have no audit event, are wrapped.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgepack import files, store
from edgepack.errors import StorageError
from edgepack.publish import publish
from edgepack.store import Store

DATA = bytes(range(256)) * 8
EVENTS = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.utime",
    "os.chmod",
    "os.truncate",
}
NEEDS_SPACE = {"open", "os.mkdir", "os.link", "fsync", "write"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def make(folder):
    (folder / "model").mkdir()
    descriptor = os.open(folder / "model/m.gguf", os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, DATA[:1000])
    os.write(descriptor, DATA[1000:])
    os.close(descriptor)
    (folder / "report.json").write_text("{}")


def build(folder, **options):
    """A step, a second step that reads it, and a package that takes the large file over."""
    shop = Store(folder / "cache")
    try:
        entry = shop.step("export", {"preset": "Q4_K_M"}, make)
        read = entry.files["model/m.gguf"].path.read_bytes

        def measure(place):
            (place / "result.json").write_text(hashlib.sha256(read()).hexdigest())

        shop.step("measure", {"artifact": entry.files["model/m.gguf"].sha256}, measure)
        with shop.scratch() as work:
            (work / "reference").write_bytes(DATA)

        def package(place):
            (place / "model").mkdir()
            shop.release(entry, "model/m.gguf", place / "model/m.gguf")
            (place / "edgepack.json").write_text("{}")

        publish(package, folder / "out", **options)
        shop.settle(entry)
    finally:
        shop.close()


def rebuild(folder):
    build(folder, force=True)


def repair(folder):
    shop = Store(folder / "cache")
    entry = shop.step("export", {"preset": "Q4_K_M"}, make)
    shop.close()
    assert entry.files["model/m.gguf"].path.read_bytes() == DATA


def clean(folder):
    Store(folder / "cache").gc()


def nothing(folder):
    pass


def damaged(folder):
    repair(folder)
    (path,) = (folder / "cache/done").glob("*/model/m.gguf")
    path.write_bytes(DATA[:-1] + b"x")


# name: (what was there before, what is struck, whether a package must be there throughout)
SCENARIOS = {
    "build": (nothing, build, False),
    "rebuild": (build, rebuild, False),
    "repair": (damaged, repair, False),
    "clean": (build, clean, True),
}


class Strike:
    """Counts the calls that change the disk and strikes at number `at`."""

    def __init__(self, how, at):
        self.how, self.at, self.count, self.struck = how, at, 0, None

    def install(self):
        sys.addaudithook(self._audit)
        for name in ("fsync", "write"):
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, real):
        def call(*arguments):
            self._call(name)
            return real(*arguments)

        return call

    def _audit(self, event, arguments):
        if event in EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            self._call(event)

    def _call(self, name):
        self.count += 1
        if self.how == "kill":
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return
        if self.how == "broken":
            if self.count == self.at:
                self.struck = name
                raise OSError(errno.EIO, "Input/output error")
        elif name in NEEDS_SPACE and self.count >= self.at and (self.how == "fuller" or not self.struck):
            self.struck = name
            raise OSError(errno.ENOSPC, "No space left on device")


def check_disk(folder, package_throughout):
    """What anyone may see after a strike, by other means than the store's own."""
    entries_seen = 0
    for entry in (folder / "cache/done").glob("*"):
        manifest = json.loads((entry / "MANIFEST.json").read_bytes())
        for row in manifest["files"]:
            path = entry / row["path"]
            # A released file is in the package, or in the old one that was set aside a moment ago.
            places = (
                [path] if path.exists() else [*folder.glob(f"out/{row['path']}"), *folder.glob(f".out.*/{row['path']}")]
            )
            assert places, path
            for data in map(Path.read_bytes, places):
                assert (len(data), hashlib.sha256(data).hexdigest()) == (row["size"], row["sha256"]), path
        entries_seen += 1
    for output in folder.glob("out"):
        assert (output / "edgepack.json").read_text() == "{}"
        assert (output / "model/m.gguf").read_bytes() == DATA
    assert not package_throughout or (folder / "out").exists()
    return entries_seen


def check_end(folder, had_package):
    """After an unharmed run nothing of the strike is left."""
    left = sorted(path.name for path in folder.iterdir())
    assert left == (["cache", "out"] if had_package else ["cache"]), left
    assert list((folder / "cache/tmp").iterdir()) == []
    names = {path.name for path in (folder / "cache").iterdir()}
    assert names <= {"CACHEDIR.TAG", "tmp", "done", "bad", "released", "locks"}, names
    if had_package:
        assert (folder / "out/model/m.gguf").stat().st_nlink == 1


def in_fork(function):
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def struck(how, at, scenario, folder):
    """Run once in this process. Status 0: done before the strike; 3: failed as it should."""
    strike = Strike(how, at)
    strike.install()
    try:
        scenario(folder)
    except StorageError as error:
        assert strike.struck, error
        assert "no space left on device" in str(error) or "input/output error" in str(error), error
        assert error.hint
        return 3
    return 4 if strike.struck else 0


def check_after(how, status, folder, before, scenario, throughout):
    if scenario is not repair:  # which starts from a damaged entry
        check_disk(folder, throughout)
    if how in ("full", "fuller") and scenario is not clean:
        # A full disk does not stop removal: nothing half-made is left, even before the next run.
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert left == [], left
        temporary = list((folder / "cache/tmp").glob("*"))
        assert temporary == [], temporary
    again = rebuild if scenario is build and (folder / "out").exists() else scenario
    if scenario is build and not (folder / "out").exists() and any(folder.glob(".out.old-*")):
        again = rebuild
    again(folder)
    check_disk(folder, throughout)
    check_end(folder, scenario in (build, rebuild, clean))


def main():
    how, name, base = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    store._COPIED_BELOW = 100  # the model counts as large
    store.clone = files.clone = lambda source, destination: False
    before, scenario, throughout = SCENARIOS[name]
    strikes = 0
    while True:
        folder = base / f"{strikes + 1}"
        folder.mkdir(parents=True)
        assert in_fork(lambda folder=folder: before(folder)) == 0
        status = in_fork(lambda folder=folder: struck(how, strikes + 1, scenario, folder))
        if status == 0:
            break
        assert status == (-signal.SIGKILL if how == "kill" else status) and status in (-signal.SIGKILL, 3, 4), status
        strikes += 1
        checked = in_fork(lambda folder=folder, s=status: check_after(how, s, folder, before, scenario, throughout))
        assert checked == 0, f"{how} {name}: strike {strikes} left a store that does not recover (kept: {folder})"
        shutil.rmtree(folder)
    print(strikes)


if __name__ == "__main__":
    main()
