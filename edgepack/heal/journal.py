"""What a training run notes down, so that it can be killed at any time and go on to the same result.

    state.pt            masters, optimizer, random numbers, step: all that the next step depends on
    best.safetensors    the masters that did best on held-out text
    progress.json       time it will take, losses and held-out divergence so far, for people to look at

Every file is written beside and renamed. A state of another run (other data, settings or shapes: another fingerprint)
is not taken up.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from edgepack.figures import significant
from edgepack.files import storage_errors, write_atomic
from edgepack.heal.watch import PROGRESS

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
STATE, BEST = "state.pt", "best.safetensors"


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
            _write(beside, masters)
            beside.replace(self.best_file)

    def best(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The masters that did best, one after the other."""
        with safe_open(self.best_file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)

    def note(self, history: list[dict[str, float]], steps: int, predicted_seconds: float | None, score: str) -> None:
        """Write what is known so far, for people (`watch.py`): scores as the report will state them."""
        rows = [row | {"held_out": significant(row["held_out"])} if "held_out" in row else row for row in history]
        document = {"steps": steps, "predicted_seconds": predicted_seconds, "score": score, "history": rows}
        write_atomic(self._folder / PROGRESS, json.dumps(document, indent=1).encode())


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file tensor by tensor: `save_file` has a copy of all of them in memory first."""
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": _DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in tensors.values():
            file.write(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
