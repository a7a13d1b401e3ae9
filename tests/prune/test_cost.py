"""What a run is predicted to take, against one that was measured."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from pruning_models import EXAMPLE, load
from pruning_models import make as make_model

from edgepack.errors import StepError
from edgepack.events import Event, silent
from edgepack.prune import command
from edgepack.prune.probe import window_seconds
from edgepack.prune.request import make
from edgepack.source import resolve
from edgepack.text import default_evaluation_text
from edgepack.worker import run_measured


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory counts otherwise elsewhere")
def test_memory_is_predicted_within_a_fifth(tmp_path: Path) -> None:
    arguments = command._arguments(resolve(str(EXAMPLE)), make(depth=1), None, default_evaluation_text(), 16, 1)
    said: list[Event] = []
    command.expect(arguments, said.append)
    predicted = command.predicted(arguments).memory_bytes
    folder = tmp_path / "out"
    folder.mkdir()
    _, usage = run_measured("edgepack.prune.steps:prune", arguments | {"folder": str(folder)}, what="pruning")
    assert predicted == pytest.approx(usage.peak_rss_bytes, rel=0.2)
    assert f"{predicted / 1e9:.1f} GB of memory" in said[0].detail


def test_too_little_memory_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command._arguments(resolve(str(EXAMPLE)), make(depth=1), None, default_evaluation_text(), 16, 1)
    monkeypatch.setattr("edgepack.workshop.available_memory_bytes", lambda: 100 << 20)
    with pytest.raises(StepError, match=r"needs about 0\.\d GB of memory, 0\.1 GB are free"):
        command.expect(arguments, silent)


def test_the_time_of_long_runs_is_measured_on_a_few_windows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command._arguments(resolve(str(EXAMPLE)), make(depth=1), None, default_evaluation_text(), 16, 1)
    monkeypatch.setattr(command, "_WORTH_A_LOOK_SECONDS", 0)
    expected = command.predicted(arguments)
    timed = command._timed(expected, arguments)
    assert (timed.passes, timed.memory_bytes) == (expected.passes, expected.memory_bytes)
    model, ids = load(EXAMPLE), torch.ones((1, 512), dtype=torch.long)
    taken = []
    with torch.no_grad():
        for _ in range(5):
            started = time.monotonic()
            model(input_ids=ids)
            taken.append(time.monotonic() - started)
    assert 0.2 < timed.seconds / (expected.passes * sorted(taken)[2]) < 5  # on a machine with other users


def test_encoders_with_short_positions_can_be_timed(tmp_path: Path) -> None:
    assert window_seconds(model=str(make_model("roberta", tmp_path / "source")), tokens=512, threads=1) > 0
