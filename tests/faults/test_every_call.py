"""Whatever call is struck, by whatever fault: no half entry, no half package, and the next run finishes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Fewer calls than these would mean that the harness no longer sees them.
STRIKES = {"build": 50, "rebuild": 30, "repair": 20, "clean": 30}


@pytest.fixture
def fast_folder(tmp_path):
    """A folder in memory where there is one: thousands of fsyncs on a busy disk take minutes, and test nothing more."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="edgepack-test-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("scenario", STRIKES)
@pytest.mark.parametrize("how", ["kill", "full", "fuller", "broken"])
def test_a_run_struck_anywhere_leaves_what_the_next_run_can_finish(how, scenario, fast_folder):
    done = subprocess.run(
        [sys.executable, HERE / "every_call.py", how, scenario, fast_folder],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= STRIKES[scenario]
