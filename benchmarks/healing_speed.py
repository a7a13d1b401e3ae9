#!/usr/bin/env python3
"""What healing costs: edgepack's loop beside plain loops of transformers, one process each, taken in turns.

    benchmarks/healing_speed.py STUDENT TEACHER [STUDENT TEACHER ...] [--steps 6] [--batch 8] [--threads N]

    edgepack            edgepack/heal/distill.py as `edgepack heal` runs it: teacher, KL divergence, AdamW
    lora                the same with adapters of rank 16
    plain training      model(input_ids, labels=input_ids).loss.backward(), AdamW, the batch in one pass, float32
    plain distillation  logits of both models, kl_div over all positions, AdamW, the batch in one pass, float32

Steps after the first are timed, text is random tokens, and every loop has the same batch. Tokens per second are of the
wall clock; on a busy machine compare CPU seconds. Peak memory is VmHWM of the process, models included.
Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WINDOW = 512
LOOPS = ("plain training", "edgepack", "plain distillation", "lora")


class Clock:
    """Wall and CPU time from the end of the first step to the last one."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self, *_: int) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def taken(self, tokens_per_step: int, steps: int) -> dict[str, float]:
        (wall, cpu), (end, cpu_end) = self._marks[0], self._marks[steps - 1]
        tokens = tokens_per_step * (steps - 1)
        return {"tokens_per_s": tokens / (end - wall), "cpu_s_per_1k": 1000 * (cpu_end - cpu) / tokens}


def edgepack_loop(student: Any, teacher: Any, windows: Any, batch: int, clock: Clock, rank: int | None) -> None:
    from edgepack.heal.distill import Settings, distill
    from edgepack.heal.lora import LoraWeights
    from edgepack.heal.objective import TowardsTeacher

    weights = LoraWeights(student, rank=rank) if rank else None
    # The last step scores held-out text before it is reported: one more than is timed.
    settings = Settings(len(windows) * WINDOW, 1e-6, batch_windows=batch, evaluations=1)
    with tempfile.TemporaryDirectory() as journal:
        distill(
            student,
            TowardsTeacher(teacher),
            windows,
            windows[:2],
            settings,
            journal=Path(journal),
            weights=weights,
            progress=clock.mark,
        )


def plain_loop(student: Any, teacher: Any, windows: Any, batch: int, clock: Clock) -> None:
    import torch

    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    for start in range(0, len(windows), batch):
        ids = windows[start : start + batch]
        if teacher is None:
            loss = student(input_ids=ids, labels=ids).loss
        else:
            with torch.no_grad():
                taught = torch.log_softmax(teacher(input_ids=ids).logits, dim=-1).flatten(0, 1)
            ours = torch.log_softmax(student(input_ids=ids).logits, dim=-1).flatten(0, 1)
            loss = torch.nn.functional.kl_div(ours, taught, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()


def measured(loop: str, student_folder: Path, teacher_folder: Path, steps: int, batch: int, threads: int) -> None:
    """Run one loop in this process and print what it took."""
    import torch

    from edgepack.calibrate.layers import load_model
    from edgepack.heal.cost import peak_bytes

    torch.set_num_threads(threads)
    student = load_model(student_folder).requires_grad_(True)
    teacher = None if loop == "plain training" else load_model(teacher_folder)
    generator = torch.Generator().manual_seed(0)
    vocabulary = student.config.get_text_config().vocab_size
    windows = torch.randint(vocabulary, ((steps + 2) * batch, WINDOW), generator=generator)
    clock = Clock()
    if loop.startswith("plain"):
        plain_loop(student, teacher, windows, batch, clock)
    else:
        edgepack_loop(student, teacher, windows, batch, clock, 16 if loop == "lora" else None)
    print(json.dumps(clock.taken(batch * WINDOW, steps + 1) | {"peak_mb": peak_bytes() / 1e6}))


def compare(student: Path, teacher: Path, arguments: argparse.Namespace) -> None:
    """All loops in turns, and their table."""
    found: dict[str, list[dict[str, float]]] = {loop: [] for loop in arguments.loops}
    for _ in range(arguments.rounds):
        for loop in found:
            command = [sys.executable, __file__, str(student), str(teacher), "--one", loop]
            for name in ("steps", "batch", "threads"):
                command += [f"--{name}", str(getattr(arguments, name))]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[loop].append(json.loads(output.splitlines()[-1]))
    middle: Callable[[str, str], float] = lambda loop, key: statistics.median(row[key] for row in found[loop])  # noqa: E731
    print(f"\n{student.name} of {teacher.name}, batch {arguments.batch} x {WINDOW}, {arguments.threads} threads")
    print(f"{'loop':20s} {'tokens/s':>9s} {'CPU s per 1k tokens':>20s} {'of plain training':>18s} {'peak MB':>8s}")
    for loop in found:
        share = middle("plain training", "cpu_s_per_1k") / middle(loop, "cpu_s_per_1k")
        print(
            f"{loop:20s} {middle(loop, 'tokens_per_s'):9.0f} {middle(loop, 'cpu_s_per_1k'):20.3f} "
            f"{share:17.2f}x {max(row['peak_mb'] for row in found[loop]):8.0f}",
            flush=True,
        )


def main() -> None:
    from edgepack.workshop import physical_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="STUDENT TEACHER")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--one", choices=LOOPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pairs = list(zip(arguments.models[::2], arguments.models[1::2], strict=True))
    for student, teacher in pairs:
        if arguments.one:
            measured(arguments.one, student, teacher, arguments.steps, arguments.batch, arguments.threads)
        else:
            compare(student, teacher, arguments)


if __name__ == "__main__":
    main()
