"""Text to train on: packed windows, some held out, more drawn from the teacher where the text is short.

Windows are cut from one stream of tokens without padding. Held-out windows come from a few places spread over the
text; a training window that shares a run of `SHARED_TOKENS` tokens with one of them is left out. Text that is passed
too often is learned by heart, even if it is renewed (`renewal.py`), and text sampled from the teacher itself teaches as
well as real text (docs/refining.md): what `MOST_PASSES` over the text don't cover is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from edgepack.errors import InputRefused
from edgepack.files import storage_errors
from edgepack.heal.budget import MOST_PASSES
from edgepack.heal.sampling import sampled
from edgepack.worker import Progress, no_progress

WINDOW_TOKENS = 512
MOST_HELD_OUT, LEAST_HELD_OUT = 24, 2
SHARED_TOKENS = 64  # longer than licence headers' sentences, shorter than a paragraph
_RUNS = 4  # places that held-out windows come from
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class TrainingText:
    """Token windows, `[windows, tokens]` each.

    Args:
        training: To train on; the last `sampled` are the teacher's own.
        held_out: To judge by.
        sampled: How many the teacher wrote.
        left_out: Windows that shared text with held-out ones.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    sampled: int
    left_out: int


def windows_wanted(tokens: int, window_tokens: int = WINDOW_TOKENS) -> int:
    """Windows of text that a run of so many tokens has a use for, held-out ones included."""
    return -(-tokens // window_tokens) + MOST_HELD_OUT + 8


def training_text(
    teacher: Any,
    pieces: Sequence[Sequence[int]],
    tokens: int,
    *,
    journal: Path,
    passes: int = MOST_PASSES,
    progress: Progress = no_progress,
) -> TrainingText:
    """Split a text and fill it up.

    Args:
        teacher: The model that more text is drawn from, on the device to draw on.
        pieces: Windows of the text in order, all of one length (`calibrate.texts.calibration_windows`).
        tokens: To train on.
        journal: Sampled text is kept there for a run that is resumed.
        passes: Over text and samples; what they don't cover is drawn.
        progress: In tokens sampled.

    Raises:
        InputRefused: Too little text to hold any out.
    """
    training, held_out, left_out = split(pieces)
    wanted = -(-tokens // training.shape[1])
    missing = -(-wanted // passes) - len(training)
    if missing <= 0:
        return TrainingText(training, held_out, 0, left_out)
    path = journal / "sampled.safetensors"
    if path.is_file() and (kept := load_file(path)["windows"].long()).shape == (missing, training.shape[1]):
        drawn = kept
    else:
        drawn = sampled(teacher, training[:, 0], missing, training.shape[1], progress)
        with storage_errors(path):
            save_file({"windows": drawn.int()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    return TrainingText(torch.cat([training, drawn]), held_out, missing, left_out)


def split(pieces: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training windows, held-out windows, and how many belong to neither because they share text.

    Raises:
        InputRefused: Too few windows.
    """
    everything = torch.tensor(pieces, dtype=torch.long)
    count = max(LEAST_HELD_OUT, min(MOST_HELD_OUT, len(pieces) // 10))
    held = set(_spread(len(pieces), count))
    if len(pieces) < 2 * LEAST_HELD_OUT:
        raise InputRefused(
            f"the training text has {len(pieces)} windows of {everything.shape[-1]} tokens, expected at least "
            f"{2 * LEAST_HELD_OUT}",
            hint="Give a longer text with --calibration (--data for healing).",
        )
    known = np.unique(np.concatenate([_shingles(pieces[place]) for place in sorted(held)]))
    rest = [place for place in range(len(pieces)) if place not in held]
    training = [place for place in rest if not np.isin(_shingles(pieces[place]), known).any()]
    if not training:
        raise InputRefused(
            "the training text repeats itself: every window shares text with one that is held out",
            hint="Give another text with --calibration (--data for healing).",
        )
    return everything[training], everything[sorted(held)], len(rest) - len(training)


def _spread(windows: int, count: int) -> list[int]:
    """Numbers of `count` windows in `_RUNS` runs, each in the middle of its part of the text."""
    runs = max(1, min(_RUNS, count // 2))
    found: list[int] = []
    for run in range(runs):
        length = count * (run + 1) // runs - count * run // runs
        middle = windows * (2 * run + 1) // (2 * runs)
        start = min(max(0, middle - length // 2), windows - length)
        found += range(start, start + length)
    return found


def _shingles(tokens: Sequence[int]) -> npt.NDArray[np.uint64]:
    """One hash for every run of `SHARED_TOKENS` tokens (of the whole window if it is shorter)."""
    ids = np.array(tokens, dtype=np.uint64) + np.uint64(1)
    length = min(SHARED_TOKENS, len(ids))
    found = np.zeros(len(ids) - length + 1, np.uint64)
    for place in range(length):
        found = found * _MIX + ids[place : place + len(found)]
    return found
