"""How long one window takes a model on this machine, now: what a guess from headers can't know."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from edgepack.checkpoint import open_checkpoint
from edgepack.prune.anatomy import generates
from edgepack.prune.running import load
from edgepack.worker import Progress, no_progress

_TIMED = 3  # passes; the median is taken


def window_seconds(*, model: str, tokens: int, threads: int, progress: Progress = no_progress) -> float:
    """Time of a pass of one window through a model in float32 (worker function).

    Args:
        model: Its folder.
        tokens: Of a window.
        threads: For torch.
        progress: Not called.

    Raises:
        StepError: transformers can't load it.
    """
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(Path(model))
    loaded = load(checkpoint.path, generates=generates(checkpoint))
    config = checkpoint.config
    longest = int(config.get("max_position_embeddings") or config.get("n_positions") or tokens) - 2  # RoBERTa's offset
    shape = 1, min(tokens, longest)
    ids = torch.randint(int(config["vocab_size"]), shape, generator=torch.Generator().manual_seed(0))
    taken = []
    with torch.no_grad():
        for _ in range(1 + _TIMED):  # the first one allocates
            started = time.monotonic()
            loaded(input_ids=ids)
            taken.append(time.monotonic() - started)
    return sorted(taken[1:])[_TIMED // 2]
