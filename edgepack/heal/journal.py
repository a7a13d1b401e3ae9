"""What a training run notes down, so that it can be killed at any time and go on to the same result.

    state.pt            masters, optimizer, random numbers, step: all that the next step depends on
    best.safetensors    the masters that did best on held-out text
    progress.json       losses and held-out divergence so far, for people to look at

Every file is written beside and renamed. A state of another run (other data, settings or shapes: another fingerprint)
is not taken up.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgepack.files import storage_errors, write_atomic

STATE, BEST, PROGRESS = "state.pt", "best.safetensors", "progress.json"


class Journal:
    """The folder of one run.

    Args:
        folder: Exists; outlives the process.
        fingerprint: Stands for everything that shapes the run.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint

    @property
    def best_file(self) -> Path:
        """Where the best masters are."""
        return self._folder / BEST

    def load(self) -> dict[str, Any] | None:
        """The last state of this run, or None."""
        path = self._folder / STATE
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError):  # a damaged disk: start over
            return None
        return state if state.get("fingerprint") == self._fingerprint else None

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state: JSON-like values and tensors."""
        with storage_errors(self._folder):
            beside = self._folder / f"{STATE}.tmp"
            torch.save(dict(state) | {"fingerprint": self._fingerprint}, beside)
            beside.replace(self._folder / STATE)

    def save_best(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Write the masters that did best so far."""
        with storage_errors(self._folder):
            beside = self._folder / f"{BEST}.tmp"
            save_file({name: values.detach().cpu().contiguous() for name, values in masters.items()}, beside)
            beside.replace(self.best_file)

    def best(self) -> dict[str, torch.Tensor]:
        """The masters that did best."""
        found: dict[str, torch.Tensor] = load_file(self.best_file)
        return found

    def note(self, history: list[dict[str, float]]) -> None:
        """Write the history for people."""
        write_atomic(self._folder / PROGRESS, json.dumps(history, indent=1).encode())
