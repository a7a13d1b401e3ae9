#!/usr/bin/env python3
"""How much healing brings back: by KL divergence from the teacher, and by plain cross-entropy on the same text.

    benchmarks/healing.py [CHECKPOINT] --tokens 200k [--depth 2] [--ffn 1024] [--folder DIR]

The checkpoint is pruned (two ways where --ffn is given), and each pruned model is trained on the same windows in the
same order. Held-out text decides which step is kept; the table is measured on the evaluation text (second half of
each window, transformers in float32, against the full model). Prints a table; asserts nothing. `--folder` keeps pruned
models and journals: a run that is killed goes on there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from convert import ROOT

from edgepack.calibrate.layers import load_model
from edgepack.calibrate.texts import CalibrationText, calibration_text, calibration_windows, resolve
from edgepack.checkpoint import open_checkpoint
from edgepack.heal.budget import parse_tokens
from edgepack.heal.cost import Means, facts_of
from edgepack.heal.data import TrainingText, training_text, windows_wanted
from edgepack.heal.distill import distill, paced
from edgepack.heal.evaluation import Evaluation, recovered
from edgepack.heal.means import peak_rate
from edgepack.heal.memory import worth_keeping
from edgepack.heal.objective import TowardsTeacher, forward, mixed_precision
from edgepack.prune.command import prune
from edgepack.prune.request import Request
from edgepack.text import default_evaluation_text, read_text, text_sha256


class NextTokens(TowardsTeacher):
    """Cross-entropy on the text itself, judged as the other is: by KL divergence from the teacher."""

    def loss(self, student: Any, windows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        with mixed_precision(windows.device):
            logits, _ = forward(student, windows)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


class Bench:
    """A teacher, its text, and the windows it is measured on."""

    def __init__(self, model: Path, tokens: int, windows: int, folder: Path, sample: bool) -> None:
        self.model, self.tokens, self.folder = model, tokens, folder
        self.teacher = load_model(model)
        pieces = calibration_windows(model, calibration_text(None, model), 512, windows_wanted(tokens))
        folder.mkdir(parents=True, exist_ok=True)
        self.text: TrainingText = training_text(self.teacher, pieces, tokens, journal=folder, sample=sample)
        content = read_text(default_evaluation_text())
        text = CalibrationText(content, text_sha256(content), "evaluation.txt")
        self.evaluation = Evaluation(self.teacher, calibration_windows(model, text, 512, windows))

    def pruned(self, name: str, request: Request) -> Path:
        folder = self.folder / name
        if not folder.is_dir():
            prune(self.model, folder, request)
        return folder

    def healed(self, name: str, student: Path, kind: type[TowardsTeacher], rate: float | None) -> None:
        """Train and print a row."""
        rate = rate or peak_rate(Means("full", 0, False, 4), facts_of(open_checkpoint(student)))
        model = load_model(student).requires_grad_(True)
        teacher, before = self.evaluation.rows(model)
        journal = self.folder / f"journal-{student.name}-{kind.__name__}-{self.tokens}"
        journal.mkdir(exist_ok=True)
        keep = worth_keeping(self.tokens, self.text.training, self.teacher) if kind is TowardsTeacher else None
        cpu, wall = time.process_time(), time.monotonic()
        outcome = distill(
            model, kind(self.teacher, keep=keep), self.text.training, self.text.held_out,
            paced(self.tokens, 512, rate), journal=journal,
        )  # fmt: skip
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        _, after = self.evaluation.rows(model)
        back = recovered(teacher, before, after)
        cells = [
            name, f"{outcome.tokens:,}", f"{before['mean_kld']:.3f}",
            f"{after['mean_kld']:.3f} ({after['ci95'][0]:.3f}-{after['ci95'][1]:.3f})",
            f"{teacher['perplexity']:.2f}", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}",
            _percent(back["kld"]), _percent(back["log_likelihood"]), f"{outcome.best_step} of {outcome.steps}",
            f"{outcome.tokens / wall:,.0f}", f"{cpu:,.0f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def main() -> None:
    """Parse, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "examples/models/tiny-llama-5m")
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--depth", type=int, default=2, help="layers to drop; 0 leaves that out")
    parser.add_argument("--ffn", type=int, help="neurons that stay, for a second pruned model")
    parser.add_argument("--no-cross-entropy", action="store_true", help="by KL divergence only")
    parser.add_argument("--no-sampling", action="store_true", help="pass over the text again instead of sampling more")
    parser.add_argument("--learning-rate", type=float, help="peak; the default is that of `edgepack heal`")
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps pruned models and journals")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        tokens = parse_tokens(arguments.tokens, "--tokens")
        bench = Bench(
            arguments.model.resolve(), tokens, arguments.evaluation_windows, folder, not arguments.no_sampling
        )
        print(f"text: {resolve(None).origin}, {len(bench.text.training)} windows, {bench.text.sampled} of them sampled")
        print(
            "| run | tokens | KLD before | KLD after (95 %) | PPL of the teacher | PPL before | PPL after | KLD back "
            "| log-likelihood back | best step | tokens/s | CPU s |"
        )
        print("|---|" + "---|" * 11)
        requests = [(f"depth={arguments.depth}", Request(depth=arguments.depth))] if arguments.depth else []
        requests += [(f"ffn={arguments.ffn}", Request(ffn=arguments.ffn))] if arguments.ffn else []
        for name, request in requests:
            student = bench.pruned(name, request)
            bench.healed(f"{name}, KL", student, TowardsTeacher, arguments.learning_rate)
            if not arguments.no_cross_entropy and name.startswith("depth"):
                bench.healed(f"{name}, cross-entropy", student, NextTokens, arguments.learning_rate)


if __name__ == "__main__":
    main()
