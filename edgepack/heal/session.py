"""What a training process knows of its machine, and the state it puts both models in while it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from edgepack.files import write_atomic
from edgepack.heal.cost import BASE_BYTES, CUDA_BASE_BYTES, Means, peak_bytes
from edgepack.heal.lora import LoraWeights
from edgepack.heal.means import Machine
from edgepack.heal.memory import halve, widen
from edgepack.heal.processor import fast_bfloat16
from edgepack.heal.weights import FullWeights, Weights
from edgepack.workshop import available_memory_bytes


def here(device: torch.device) -> Machine:
    """The machine as this process finds it: what it holds already counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Machine(free + CUDA_BASE_BYTES, 1, mixed=True, gpu=True)
    return Machine(available_memory_bytes() + BASE_BYTES, torch.get_num_threads(), mixed=fast_bfloat16())


def decided(journal: Path, what: str, decide: Callable[[], Any]) -> Any:
    """What was decided when a run began, so that one that is resumed goes on alike whatever memory is free now.

    Args:
        journal: Folder of the run.
        what: Name of the decision.
        decide: Called where nothing was decided yet; gives a JSON value.
    """
    file = journal / f"{what}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    found = decide()
    write_atomic(file, json.dumps(found).encode())
    return found


@contextmanager
def trained(student: Any, teacher: Any, means: Means) -> Iterator[Weights]:
    """Both models made ready for a way of training; afterwards the student is an ordinary model again.

    Args:
        student: To be trained.
        teacher: To be frozen.
        means: The way.
    """
    lora = means.method == "lora"
    frozen = (teacher, student) if lora else (teacher,)
    if means.half:
        for model in frozen:
            halve(model)
    adapters = LoraWeights(student, rank=means.rank) if lora else None
    yield adapters or FullWeights(student.requires_grad_(True))
    if means.half:
        for model in frozen:
            widen(model)
    if adapters is not None:
        adapters.merge()
    student.requires_grad_(False)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that was in use, where training runs."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) + CUDA_BASE_BYTES
    return peak_bytes()
