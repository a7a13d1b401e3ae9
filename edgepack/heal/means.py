"""Which way of training a machine has the memory for: the best one that fits, or a refusal that says what each needs.

In order of preference: all weights, all weights with activations computed twice (a third more time), adapters, adapters
with activations computed twice. All weights learn more than adapters (docs/healing.md). Within a way, frozen
weights in bfloat16 come before fewer windows at once. Knows neither torch nor how training is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgepack.checkpoint import Checkpoint
from edgepack.errors import StepError, UsageError
from edgepack.figures import significant
from edgepack.heal.cost import (
    TEACHER_SHARE,
    Cost,
    Facts,
    Means,
    facts_of,
    kept_bytes,
    memory_bytes,
    sampling_seconds,
    training_seconds,
    windows_kept,
)
from edgepack.heal.processor import fast_bfloat16

Method = Literal["auto", "full", "lora"]
METHODS: tuple[Method, ...] = ("auto", "full", "lora")
DEFAULT_RANK, LEAST_RANK, MOST_RANK = 32, 16, 64
WINDOW_TOKENS = 512
_CPU_WINDOWS = (4, 2, 1)  # more at once make a CPU no faster (docs/refining.md)
_GPU_WINDOWS = (32, 16, 8, 4, 2, 1)
# Peak rate of all weights x width between layers (Adam's falls with the width: Yang et al., arXiv:2203.03466, table 3):
# the study's 2e-4 at 512 (docs/refining.md). Adapters take ten times as much.
_RATE_BY_WIDTH, _MOST_RATE = 0.1, 4e-4
_LORA_FACTOR = 10
_SHARE = 0.9  # of what is free: predictions are good to a tenth or two, and the machine lives on


@dataclass(frozen=True)
class Machine:
    """Where training will run.

    Args:
        free_bytes: Memory for the whole process (of the GPU, where it trains there); None: not known yet.
        cores: To compute with.
        mixed: Products in bfloat16 are fast.
        gpu: It trains on a GPU.
    """

    free_bytes: int | None
    cores: int
    mixed: bool
    gpu: bool = False


def this_machine(cores: int) -> Machine:
    """This one, told without torch: where an NVIDIA driver is loaded, the worker finds out what its GPU has free."""
    from edgepack.workshop import available_memory_bytes

    if Path("/dev/nvidiactl").exists():
        return Machine(None, cores, mixed=True, gpu=True)
    return Machine(available_memory_bytes(), cores, mixed=fast_bfloat16())


def predict(
    student: Checkpoint,
    teacher: Checkpoint,
    tokens: int,
    *,
    cores: int,
    text_bytes: int | None = None,
    method: Method = "auto",
    rank: int = DEFAULT_RANK,
    machine: Machine | None = None,
) -> Cost:
    """What healing will take, from headers; to be asked before anything is loaded.

    Args:
        student: What is trained.
        teacher: What it is trained towards.
        tokens: To train on.
        cores: To compute with.
        text_bytes: Of the text; None: enough for any number of tokens.
        method: `full`, `lora`, or `auto` for the best that fits.
        rank: Of adapters.
        machine: None asks this one.

    Raises:
        UsageError: A method or rank that is not offered.
        StepError: Not enough memory; says what each way needs and which fits.
    """
    made, original = facts_of(student), facts_of(teacher)
    where = machine or this_machine(cores)
    window = window_tokens(made, original)
    means = choose(made, original, where, window=window, method=method, rank=rank)
    memory = memory_bytes(made, original, means, window, mixed=where.mixed, gpu=where.gpu)
    seconds = training_seconds(
        made, original, means, tokens, window, mixed=where.mixed, cores=where.cores, gpu=where.gpu
    )
    writing, kept = 0.0, 0
    if text_bytes is not None:
        writing = sampling_seconds(original, tokens, text_bytes, cores=where.cores, gpu=where.gpu)
        kept = kept_bytes(windows_kept(tokens, text_bytes, window), window, made.vocabulary)
    free = where.free_bytes or 0
    return Cost(means, memory, seconds + writing, writing, kept if kept < TEACHER_SHARE * (free - memory) else 0)


def window_tokens(student: Facts, teacher: Facts) -> int:
    """Tokens of a window: `WINDOW_TOKENS`, or what both models have room for."""
    return min(WINDOW_TOKENS, student.context, teacher.context)


def choose(
    student: Facts,
    teacher: Facts,
    machine: Machine,
    *,
    window: int = WINDOW_TOKENS,
    method: Method = "auto",
    rank: int = DEFAULT_RANK,
) -> Means:
    """The first way, in order of preference, that fits.

    Args:
        student: What is trained.
        teacher: What it is trained towards.
        machine: Where.
        window: Tokens of a window.
        method: `full`, `lora`, or `auto`.
        rank: Of adapters.

    Raises:
        UsageError: A method or rank that is not offered.
        StepError: Nothing fits; says what each way needs.
    """
    if method not in METHODS:
        raise UsageError(f"method {method}: expected one of {', '.join(METHODS)}")
    if not LEAST_RANK <= rank <= MOST_RANK:
        raise UsageError(f"rank {rank}: expected {LEAST_RANK} to {MOST_RANK}")
    every = [
        (means, memory_bytes(student, teacher, means, window, mixed=machine.mixed, gpu=machine.gpu))
        for means in ways(teacher, machine, rank)
    ]
    asked = [(means, need) for means, need in every if method in ("auto", means.method)]
    free = machine.free_bytes
    for means, need in asked:
        if free is None or need <= _SHARE * free:
            return means
    raise _too_little(student, every, asked, free or 0)


def peak_rate(means: Means, student: Facts) -> float:
    """Peak learning rate of AdamW where nobody names one (measured: docs/healing.md).

    Args:
        means: How the student is trained.
        student: What is trained.
    """
    rate = min(_MOST_RATE, _RATE_BY_WIDTH / student.hidden) * (_LORA_FACTOR if means.method == "lora" else 1)
    return significant(rate, 2)


def ways(teacher: Facts, machine: Machine, rank: int) -> Iterator[Means]:
    """Every way of training, the preferred first."""
    # Only where the file has bfloat16 itself: its numbers stay what they are.
    halves = (False, True) if machine.mixed and teacher.stored_half else (False,)
    for method in ("full", "lora"):
        for checkpointing in (False, True):
            for windows in _GPU_WINDOWS if machine.gpu else _CPU_WINDOWS:
                for half in halves:
                    yield Means(method, rank if method == "lora" else 0, checkpointing, windows, half)


def _too_little(student: Facts, every: list[tuple[Means, int]], asked: list[tuple[Means, int]], free: int) -> StepError:
    """What each way needs at least, what is free, and which fits."""
    least: dict[tuple[str, bool], tuple[Means, int]] = {}
    for means, need in asked:
        key = means.method, means.checkpointing
        if key not in least or need < least[key][1]:
            least[key] = means, need
    needs = "; ".join(f"{_way(means)} {need / 1e9:.1f} GB" for means, need in least.values())
    fitting = next(((means, need) for means, need in every if need <= _SHARE * free), None)
    if fitting is not None:
        means, need = fitting
        hint = f"{_way(means).capitalize()} fits with {need / 1e9:.1f} GB: choose method {means.method}, or auto."
    else:
        need = min(need for _, need in every)
        hint = (
            f"At least {need / _SHARE / 1e9:.1f} GB have to be free: close other programs, take a larger machine, or "
            f"prune more before healing. The result is an ordinary model folder."
        )
    return StepError(
        f"healing {student.name} does not fit in memory: {free / 1e9:.1f} GB are free, a tenth of that is left alone; "
        f"at least needed: {needs}",
        hint=hint,
    )


def _way(means: Means) -> str:
    return str(replace(means, half=False))
