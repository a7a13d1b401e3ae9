#!/usr/bin/env python3
"""How much healing brings back: by KL divergence from the teacher, and by plain cross-entropy on the same text.

    benchmarks/healing.py [CHECKPOINT] --tokens 200k [--depth 2] [--ffn 1024] [--refit] [--folder DIR]

The checkpoint is pruned (two ways where --ffn is given), and each pruned model is trained on the same windows in the
same order: renewed between passes for KL divergence, as `edgepack heal` does, as they are for cross-entropy. Held-out
text decides which step is kept; the table is measured on the evaluation text (second half of each window, transformers
in float32, against the full model). Prints a table; asserts nothing. `--folder` keeps pruned models and journals: a run
that is killed goes on there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from convert import ROOT

from edgepack.calibrate.layers import load_model
from edgepack.calibrate.texts import calibration_text, calibration_windows, evaluation_text, resolve
from edgepack.checkpoint import open_checkpoint
from edgepack.heal.budget import MOST_PASSES, parse_tokens
from edgepack.heal.cost import Means, facts_of
from edgepack.heal.data import TrainingText, training_text, windows_wanted
from edgepack.heal.distill import distill, paced
from edgepack.heal.evaluation import Evaluation, recovered
from edgepack.heal.means import peak_rate
from edgepack.heal.memory import worth_keeping
from edgepack.heal.objective import TowardsTeacher, forward, mixed_precision
from edgepack.prune.command import prune
from edgepack.prune.request import Request, parse
from edgepack.text import default_evaluation_text


class NextTokens(TowardsTeacher):
    """Cross-entropy on the text itself, judged as the other is: by KL divergence from the teacher."""

    def loss(self, student: Any, windows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        with mixed_precision(windows.device):
            logits, _ = forward(student, windows)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


class Bench:
    """A teacher, its text, and the windows it is measured on."""

    def __init__(self, model: Path, arguments: argparse.Namespace, folder: Path) -> None:
        self.model, self.tokens, self.folder = model, parse_tokens(arguments.tokens, "--tokens"), folder
        self.renew, self.batch_windows = not arguments.no_renewal, arguments.batch_windows
        self.teacher = load_model(model)
        wanted = arguments.text_windows or windows_wanted(self.tokens)
        pieces = calibration_windows(model, calibration_text(None, model), 512, wanted)
        folder.mkdir(parents=True, exist_ok=True)
        self.text: TrainingText = training_text(
            self.teacher, pieces, self.tokens, journal=folder, passes=arguments.passes
        )
        text = evaluation_text(default_evaluation_text())
        windows = calibration_windows(model, text, 512, arguments.evaluation_windows)
        self.evaluation = Evaluation(self.teacher, windows)

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
        divergence = kind is TowardsTeacher
        keep = worth_keeping(self.tokens, self.text.training, self.teacher) if divergence else None
        aim, settings = kind(self.teacher, keep=keep), paced(self.tokens, 512, rate)
        if self.batch_windows:
            settings = replace(settings, batch_windows=self.batch_windows)
        cpu, wall = time.process_time(), time.monotonic()
        outcome = distill(
            model, aim, self.text.training, self.text.held_out, settings, journal=journal,
            renewed=aim.renewed if divergence and self.renew else None,
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
    parser.add_argument("--refit", action="store_true", help="what stays makes up for what went before training")
    parser.add_argument("--no-cross-entropy", action="store_true", help="by KL divergence only")
    parser.add_argument("--no-renewal", action="store_true", help="repeat the text in every pass as it is")
    parser.add_argument("--passes", type=int, default=MOST_PASSES, help="over the text, before the teacher writes more")
    parser.add_argument("--text-windows", type=int, help="of 512 tokens, instead of all of the text")
    parser.add_argument("--batch-windows", type=int, help="of a step; the default is that of `edgepack heal`")
    parser.add_argument("--learning-rate", type=float, help="peak; the default is that of `edgepack heal`")
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps pruned models and journals")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        bench = Bench(arguments.model.resolve(), arguments, folder)
        print(f"text: {resolve(None).origin}, {len(bench.text.training)} windows, {bench.text.sampled} of them sampled")
        print(
            "| run | tokens | KLD before | KLD after (95 %) | PPL of the teacher | PPL before | PPL after | KLD back "
            "| log-likelihood back | best step | tokens/s | CPU s |"
        )
        print("|---|" + "---|" * 11)
        parts = {"depth": arguments.depth, "ffn": arguments.ffn}
        refit = ",refit" if arguments.refit else ""
        requests = [(f"{key}={count}{refit}", parse(f"{key}={count}{refit}")) for key, count in parts.items() if count]
        for name, request in requests:
            student = bench.pruned(name, request)
            bench.healed(f"{name}, KL", student, TowardsTeacher, arguments.learning_rate)
            if not arguments.no_cross_entropy and name.startswith("depth"):
                bench.healed(f"{name}, cross-entropy", student, NextTokens, arguments.learning_rate)


if __name__ == "__main__":
    main()
