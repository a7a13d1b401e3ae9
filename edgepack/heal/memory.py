"""What training has room for: windows in a backward pass, and what the teacher said of each."""

from __future__ import annotations

from typing import Any

import torch

from edgepack.heal.cost import LEAST_K, TEACHER_SHARE, kept_bytes
from edgepack.heal.lora import adapted
from edgepack.heal.objective import forward, mixed_precision
from edgepack.workshop import available_memory_bytes

CPU_WINDOWS = 4  # more at once make a CPU no faster (docs/refining.md)
_SHARE = 0.5  # of the free memory: the rest of the machine lives from it too
# Activations kept per output value of a layer, in float32 values: the output itself, and what element-wise functions
# and attention between layers keep.
_VALUES = 2.5
_LOGIT_COPIES = 4  # logits, the teacher's, their gradient, and what it is handed on as


def micro_batch(student: Any, window: torch.Tensor, device: Any) -> int:
    """Windows that fit in memory for one pass forward and backward, at least 1."""
    each = activation_bytes(student, window.to(device))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, int(_SHARE * free) // each)
    return max(1, min(CPU_WINDOWS, int(_SHARE * available_memory_bytes()) // each))


def activation_bytes(student: Any, window: torch.Tensor) -> int:
    """Memory one window takes between forward and backward, roughly.

    Args:
        student: The model.
        window: `[1, tokens]`.
    """
    values = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal values
        if isinstance(output, torch.Tensor):
            values += output.numel()

    leaves = [module for module in student.modules() if not list(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        with torch.no_grad(), mixed_precision(window.device):
            logits, _ = forward(student, window)
    finally:
        for handle in handles:
            handle.remove()
    return int(4 * (_VALUES * values + _LOGIT_COPIES * logits.numel()))


def halve(model: Any) -> None:
    """Hold the matrices of a frozen model's layers in bfloat16; it is then run in mixed precision only."""
    for _, module in adapted(model):
        module.weight.data = module.weight.data.bfloat16()


def widen(model: Any) -> None:
    """Take `halve` back; exact where the file has bfloat16."""
    for _, module in adapted(model):
        module.weight.data = module.weight.data.float()


def worth_keeping(tokens: int, training: torch.Tensor, teacher: Any) -> int | None:
    """How many log-probabilities of the teacher to keep for each position; None runs it every time.

    Kept where windows are passed again and there is room: the next pass asks for them again, or draws new windows from
    them (`renewal.py`).

    Args:
        tokens: To train on, with repetitions.
        training: Windows `[windows, tokens]`.
        teacher: A model of transformers.
    """
    if tokens <= training.numel():
        return None
    nbytes = kept_bytes(len(training), training.shape[1], teacher.config.get_text_config().vocab_size)
    return LEAST_K if nbytes < TEACHER_SHARE * available_memory_bytes() else None
