#!/usr/bin/env python3
"""What to do with a text that is passed many times: ways to change its windows between passes, side by side.

    benchmarks/renewal.py [CHECKPOINT] [--windows 50] [--tokens 400k] [--depth 1] [--ways repeated renewed ...]

    repeated    the same windows every time
    recut       every window begins where another one is cut, at a place of its own in each pass
    random      a tenth of the tokens replaced by any others, anew in each pass
    original    half of the tokens drawn from what the teacher expects in the original text, anew in each pass
    renewed     half of the tokens drawn from what it expects in the last pass's windows: what `edgepack heal` does
    back2       the same, but the original windows in every other pass
    back4       the same, but the original windows in every fourth pass

The windows are spread over the calibration text that ships, chosen by chance with a fixed seed. Judged as
`benchmarks/healing.py` judges: KL divergence on 40 windows of the evaluation text. Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from convert import ROOT

from edgepack.calibrate.layers import load_model
from edgepack.calibrate.texts import calibration_text, calibration_windows, evaluation_text
from edgepack.checkpoint import open_checkpoint
from edgepack.heal.budget import parse_tokens
from edgepack.heal.cost import LEAST_K, Means, facts_of
from edgepack.heal.data import split
from edgepack.heal.distill import distill, paced
from edgepack.heal.evaluation import Evaluation, recovered
from edgepack.heal.means import WINDOW_TOKENS, peak_rate
from edgepack.heal.objective import TowardsTeacher
from edgepack.prune.command import prune
from edgepack.prune.request import Request
from edgepack.text import default_evaluation_text

REPLACED = 0.1
WAYS = ("repeated", "recut", "random", "original", "renewed", "back2", "back4")
Renewed = Callable[[torch.Tensor, int], torch.Tensor]


class Ways:
    """Makers of versions, see the head of this file."""

    def __init__(self, text: torch.Tensor, aim: TowardsTeacher, vocabulary: int) -> None:
        self._text, self._aim, self._vocabulary = text, aim, vocabulary

    def __getitem__(self, name: str) -> Renewed | None:
        if name.startswith("back"):
            return lambda windows, version: self._back(windows, version, int(name[4:]))
        found: dict[str, Renewed | None] = {
            "repeated": None, "recut": self._recut, "random": self._random, "original": self._original,
            "renewed": self._aim.renewed,
        }  # fmt: skip
        return found[name]

    def _recut(self, windows: torch.Tensor, version: int) -> torch.Tensor:
        generator = self._forget(windows, version)
        order = torch.randperm(len(windows), generator=generator)
        start = int(torch.randint(1, windows.shape[1], (1,), generator=generator))
        return torch.cat([self._text[:, :1], self._text[:, start:], self._text[order, 1:start]], dim=1)

    def _random(self, windows: torch.Tensor, version: int) -> torch.Tensor:
        generator = self._forget(windows, version)
        others = torch.randint(self._vocabulary, windows.shape, generator=generator)
        chosen = torch.rand(windows.shape, generator=generator) < REPLACED
        chosen[:, 0] = False
        return torch.where(chosen, others, self._text)

    def _original(self, windows: torch.Tensor, version: int) -> torch.Tensor:
        self._forget(windows, version)
        return self._aim.renewed(self._text, version)

    def _back(self, windows: torch.Tensor, version: int, every: int) -> torch.Tensor:
        found = self._aim.renewed(windows, version)
        return found if version % every else self._text

    def _forget(self, windows: torch.Tensor, version: int) -> torch.Generator:
        """Drop answers to the old windows, as drawing from them does."""
        self._aim.renewed(windows, version)
        return torch.Generator().manual_seed(version)


class Bench:
    """A pruned model, its teacher, and the windows it is trained and measured on."""

    def __init__(self, model: Path, arguments: argparse.Namespace, folder: Path) -> None:
        self._folder, self._pruned = folder, folder / "pruned"
        self.tokens = parse_tokens(arguments.tokens, "--tokens")
        prune(model, self._pruned, Request(depth=arguments.depth))
        self._teacher = load_model(model)
        everything = calibration_windows(model, calibration_text(None, model), WINDOW_TOKENS, 10_000)
        training, self._held_out, _ = split(everything)
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))
        self.training = training[order[: arguments.windows]]
        text = evaluation_text(default_evaluation_text())
        self._evaluation = Evaluation(self._teacher, calibration_windows(model, text, WINDOW_TOKENS, 40))

    def row(self, name: str) -> str:
        """Train one way."""
        journal = self._folder / name
        journal.mkdir()
        student = load_model(self._pruned).requires_grad_(True)
        own, before = self._evaluation.rows(student)
        aim = TowardsTeacher(self._teacher, keep=LEAST_K)
        rate = peak_rate(Means("full", 0, False, 4), facts_of(open_checkpoint(self._pruned)))
        cpu = time.process_time()
        outcome = distill(
            student, aim, self.training, self._held_out, paced(self.tokens, WINDOW_TOKENS, rate), journal=journal,
            renewed=Ways(self.training, aim, self._teacher.config.vocab_size)[name],
        )  # fmt: skip
        cpu = time.process_time() - cpu
        _, after = self._evaluation.rows(student)
        back = recovered(own, before, after)
        last = [row["loss"] for row in outcome.history if "loss" in row][-30:]
        cells = [name, f"{sum(last) / len(last):.3f}", f"{before['mean_kld']:.3f}", f"{after['mean_kld']:.3f}"]
        cells += ["-" if back[key] is None else f"{back[key]:.0%}" for key in ("kld", "log_likelihood")]
        return f"| {' | '.join([*cells, f'{cpu:,.0f}'])} |"


def main() -> None:
    """Prune once, train once for each way, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "examples/models/tiny-llama-5m")
    parser.add_argument("--windows", type=int, default=50, help="of the text, 512 tokens each")
    parser.add_argument("--tokens", default="400k")
    parser.add_argument("--depth", type=int, default=1, help="layers to drop")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments.model.resolve(), arguments, Path(temporary))
        print(f"{len(bench.training)} windows, {bench.tokens / bench.training.numel():.1f} passes")
        print("| way | loss at the end | KLD before | KLD after | KLD back | log-likelihood back | CPU s |")
        print("|---|" + "---|" * 6)
        for name in arguments.ways:
            print(bench.row(name), flush=True)


if __name__ == "__main__":
    main()
