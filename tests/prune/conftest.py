"""A worker run of pruning on small texts, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepack.calibrate.texts import resolve
from edgepack.prune.request import make
from edgepack.prune.steps import prune
from edgepack.text import default_calibration_text, default_evaluation_text
from edgepack.worker import no_progress

Pruned = tuple[Path, dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small products are no faster on several threads, and tests share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The beginnings of the texts that ship: to choose on, to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    for path in (default_calibration_text(), default_evaluation_text()):
        (folder / path.name).write_text(path.read_text("utf-8")[:30_000], "utf-8")
    return folder / default_calibration_text().name, folder / default_evaluation_text().name


@pytest.fixture
def run_prune(small_texts: tuple[Path, Path], tmp_path: Path) -> Callable[..., Pruned]:
    """`run_prune(source, depth=1, ...)`: the folder and its report."""
    calibration, evaluation = small_texts

    def run(source: Path, windows: int = 2, tokens: int = 96, **asked: Any) -> Pruned:
        request = make(**asked)
        folder = tmp_path / f"pruned-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        report = prune(
            model=str(source),
            folder=str(folder),
            request=request.as_json(),
            source={"name": "source"},
            calibration=resolve(str(calibration)).as_json(),
            vocabulary=[resolve(text).as_json() for text in request.vocabulary],
            evaluation=str(evaluation),
            windows=windows,
            window_tokens=tokens,
            evaluation_windows=2,
            threads=1,
            progress=no_progress,
        )
        return folder, report

    return run
