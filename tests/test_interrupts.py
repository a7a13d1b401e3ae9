"""A signal ends the work even where a library swallows the exception that it raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from edgepack import interrupts
from edgepack.events import silent, step
from edgepack.interrupts import Terminated, termination_raises
from edgepack.worker import run

LOSING = """
import os, signal, sys
import edgepack.source

class Doomed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # raised in a destructor, Terminated is printed and forgotten

resolve = edgepack.source.resolve
def resolving(*arguments):
    Doomed()
    return resolve(*arguments)
edgepack.source.resolve = resolving
sys.unraisablehook = lambda lost: None
from edgepack import cli
cli.main(sys.argv[1:])
"""


def test_a_signal_lost_in_a_destructor_ends_a_build_with_its_status(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples/models/tiny-llama-5m"
    arguments = ["build", str(example), "-t", "laptop", "-o", str(tmp_path / "p"), "--quantize", "Q4_0"]
    found = subprocess.run(
        [sys.executable, "-c", LOSING, *arguments], capture_output=True, text=True, timeout=60,
        env=os.environ | {"EDGEPACK_CACHE": str(tmp_path / "store")},
    )  # fmt: skip
    assert found.returncode == 128 + signal.SIGTERM, found.stderr
    assert "terminated" in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_swallowed_is_raised_where_work_goes_on(number: signal.Signals) -> None:
    with termination_raises():
        with suppress(BaseException):
            signal.raise_signal(number)
        with pytest.raises(Terminated) as stop, step(silent, "convert"):
            pass
        assert stop.value.number == number
        with pytest.raises(Terminated):
            run("json:dumps", {"obj": 1}, what="the test")
    interrupts.check()  # afterwards it is forgotten


def test_handlers_are_what_they_were_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_raises():
            signal.raise_signal(signal.SIGHUP)
            interrupts.check()
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
