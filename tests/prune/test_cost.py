"""What a run is predicted to take, against one that was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pruning_models import EXAMPLE

from edgepack.errors import StepError
from edgepack.events import Event, silent
from edgepack.prune import command
from edgepack.prune.request import make
from edgepack.source import resolve
from edgepack.worker import run_measured


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory counts otherwise elsewhere")
def test_memory_is_predicted_within_a_fifth(tmp_path: Path) -> None:
    arguments = command._arguments(resolve(str(EXAMPLE)), make(depth=1), None, command._text(None), 16, 1)
    said: list[Event] = []
    command.expect(arguments, said.append)
    predicted = command.predicted(arguments).memory_bytes
    folder = tmp_path / "out"
    folder.mkdir()
    _, usage = run_measured("edgepack.prune.steps:prune", arguments | {"folder": str(folder)}, what="pruning")
    assert predicted == pytest.approx(usage.peak_rss_bytes, rel=0.2)
    assert f"{predicted / 1e9:.1f} GB of memory" in said[0].detail


def test_too_little_memory_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command._arguments(resolve(str(EXAMPLE)), make(depth=1), None, command._text(None), 16, 1)
    monkeypatch.setattr("edgepack.workshop.available_memory_bytes", lambda: 100 << 20)
    with pytest.raises(StepError, match=r"needs about 0\.\d GB of memory, 0\.1 GB are free"):
        command.expect(arguments, silent)
