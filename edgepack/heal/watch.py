"""What a training run says of itself while it runs: read from its journal by the process that waits for it.

The worker's progress is a number of tokens; losses and held-out divergence are in the journal's `progress.json`, which
is written after every evaluation. Knows neither torch nor who is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgepack.heal.cost import duration
from edgepack.worker import Progress

PROGRESS = "progress.json"
_CALLED = {"kld": "KLD", "cosine_distance": "1 - cosine"}


class Watcher:
    """A `Progress` that also says what is new in the journal.

    Args:
        journal: Folder of the run.
        say: Told one line at a time: the time that training will take, then every evaluation.
        progress: Told how many tokens are done.
    """

    def __init__(self, journal: Path, say: Callable[[str], None], progress: Progress) -> None:
        self._file, self._say, self._progress = journal / PROGRESS, say, progress
        self._seen: tuple[int, int] | None = None
        self._told = 0
        self._told_time = False

    def __call__(self, done: int, total: int) -> None:
        """See `Progress`."""
        self.look()
        self._progress(done, total)

    def look(self) -> None:
        """Say what is new."""
        try:
            status = self._file.stat()
            if self._seen == (status.st_mtime_ns, status.st_ino):
                return
            document = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or a damaged disk: it is only for people
            return
        self._seen = status.st_mtime_ns, status.st_ino
        if not self._told_time and document["predicted_seconds"] is not None:
            self._say(f"training takes about {duration(document['predicted_seconds'])}")
            self._told_time = True
        scored = [row for row in document["history"] if "held_out" in row]
        for row in scored[self._told :]:
            self._say(in_words(row, document["steps"], document.get("score", "kld")))
        self._told = len(scored)


def called(score: str) -> str:
    """What reports name a score, as people call it."""
    return _CALLED.get(score, score.replace("_", " "))


def in_words(row: Mapping[str, Any], steps: int, score: str) -> str:
    """One evaluation."""
    loss = f"loss {row['loss']:.4g}, " if "loss" in row else ""
    return f"step {row['step']:.0f} of {steps}: {loss}held-out {called(score)} {row['held_out']:.4g}"
