"""Processes that share a store: they do not harm each other, wait for the dead, or do work twice."""

import errno
import fcntl
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepack.store import Store

HERE = Path(__file__).parent


@pytest.fixture
def start(tmp_path):
    """Start `store_process.py COMMAND` on one store; what still runs at the end is killed."""
    started = []

    def start_one(command):
        process = subprocess.Popen(
            [sys.executable, HERE / "store_process.py", tmp_path / "cache", command, tmp_path / "log"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def finish(process, seconds=30):
    output, errors = process.communicate(timeout=seconds)
    assert (process.returncode, output) == (0, "ok\n"), errors


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def entries_are_whole(root):
    """By json and hashlib alone."""
    for entry in (root / "done").glob("*"):
        for row in json.loads((entry / "MANIFEST.json").read_bytes())["files"]:
            assert hashlib.sha256((entry / row["path"]).read_bytes()).hexdigest() == row["sha256"]


def test_twelve_builders_of_one_entry_make_it_once(tmp_path, start):
    for process in [start("step") for _ in range(12)]:
        finish(process)
    assert len(lines(tmp_path / "log")) == 1
    assert len(list((tmp_path / "cache/done").iterdir())) == 1
    assert list((tmp_path / "cache/tmp").iterdir()) == list((tmp_path / "cache/bad").iterdir()) == []


def test_a_killed_builder_does_not_keep_the_next_one_waiting(tmp_path, start):
    holder = start("hang")
    wait_for(lambda: lines(tmp_path / "log"))
    waiting = start("step")
    time.sleep(0.3)
    assert waiting.poll() is None
    holder.kill()
    holder.wait()
    killed = time.monotonic()
    wait_for(lambda: len(lines(tmp_path / "log")) == 2)
    assert time.monotonic() - killed < 1
    finish(waiting)
    assert list((tmp_path / "cache/tmp").iterdir()) == []


def test_work_of_the_dead_is_cleared_and_that_of_the_living_is_not(tmp_path, start):
    alive, dead = start("hang"), None
    wait_for(lambda: lines(tmp_path / "log"))
    with Store(tmp_path / "cache").scratch():
        pass
    (living,) = (tmp_path / "cache/tmp").iterdir()
    code = "import os, sys; from pathlib import Path; from edgepack.store import Store\n"
    code += "with Store(Path(sys.argv[1])).scratch() as f: (f / 'x').write_bytes(b'x'); os._exit(9)"
    dead = subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], cwd=HERE.parents[1])
    assert dead.returncode == 9
    assert len(list((tmp_path / "cache/tmp").iterdir())) == 2
    with Store(tmp_path / "cache").scratch() as mine:
        assert sorted((tmp_path / "cache/tmp").iterdir()) == sorted([living, mine])
    assert alive.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_builder_that_is_told_to_stop_leaves_no_temporary_folder(tmp_path, start, number):
    # SIGTERM alone ends Python without clean-up: what it leaves goes with the next run.
    process = start("hang")
    wait_for(lambda: lines(tmp_path / "log"))
    process.send_signal(number)
    process.communicate(timeout=5)
    assert process.returncode == -number
    assert number == signal.SIGTERM or list((tmp_path / "cache/tmp").iterdir()) == []
    finish(start("step"))
    assert list((tmp_path / "cache/tmp").iterdir()) == []


def test_killed_at_random_times_and_run_again(tmp_path, start):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    times = random.Random(seed)
    for _ in range(15):
        process = start("step")
        time.sleep(times.uniform(0.02, 0.25))
        process.kill()
        process.wait()
        if (tmp_path / "cache/done").exists():
            entries_are_whole(tmp_path / "cache")
    finish(start("step"))
    entries_are_whole(tmp_path / "cache")
    assert list((tmp_path / "cache/tmp").iterdir()) == []


def test_cleaning_all_the_time_harms_no_build(tmp_path, start):
    cleaner = start("clean")
    for process in [start("many") for _ in range(2)] + [start("step") for _ in range(4)]:
        finish(process)
    assert cleaner.poll() is None
    cleaner.kill()
    entries_are_whole(tmp_path / "cache")


def test_cleaning_spares_what_another_process_uses_until_it_dies(tmp_path, start):
    holder = start("hold")
    assert holder.stdout.readline() == "holding\n"
    Store(tmp_path / "cache").gc()
    assert len(list((tmp_path / "cache/done").iterdir())) == 1
    holder.kill()
    holder.wait()
    Store(tmp_path / "cache").gc()
    assert list((tmp_path / "cache/done").iterdir()) == []


def test_without_locks_the_store_works_and_says_so_once_per_wait(tmp_path, monkeypatch, caplog):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    root = tmp_path / "cache"
    made = []

    def make(folder):
        made.append(folder)
        (folder / "x").write_text("x")
        if len(made) == 1:  # another process is faster
            assert not Store(root).step("export", {}, make).cached

    entry = Store(root).step("export", {}, make)
    assert (entry.cached, len(made)) == (True, 2)
    assert "has no locks" in caplog.text
    old, new = root / "tmp/x.1.000000000000", root / "tmp/x.1.111111111111"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    with Store(root).scratch():
        assert (old.exists(), new.exists()) == (False, True)  # only age can tell
    gc.collect()
    Store(root).gc()
    assert len(list((root / "done").iterdir())) == 1  # nobody can tell whether it is in use
