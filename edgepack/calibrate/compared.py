"""Holds calibration text against the evaluation text, in a worker process: both are tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepack.calibrate.texts import CalibrationText, calibration_text, calibration_windows, refuse_overlap, unlike
from edgepack.text import WINDOW_TOKENS, read_text, text_sha256
from edgepack.worker import Progress, no_progress

_WINDOWS = 200  # of either text: more change nothing that is seen


def compared(
    *, calibration: Mapping[str, Any] | str | None, evaluation: str, source: str, progress: Progress = no_progress
) -> dict[str, Any]:
    """Refuse overlapping texts; say whether they are of one kind.

    Args:
        calibration: As `texts.calibration_text` takes it.
        evaluation: Path of the evaluation text.
        source: Model folder: its tokenizer counts.
        progress: Not called.

    Returns:
        `{"unlike": sentence or None}`.

    Raises:
        InputRefused: They overlap, or one is no text.
    """
    ours = calibration_text(calibration, Path(source))
    theirs = read_text(evaluation)
    refuse_overlap(ours.text, theirs)
    other = CalibrationText(theirs, text_sha256(theirs), Path(evaluation).name)
    tokens = [
        [token for window in calibration_windows(Path(source), text, WINDOW_TOKENS, _WINDOWS) for token in window]
        for text in (ours, other)
    ]
    return {"unlike": unlike(*tokens)}
