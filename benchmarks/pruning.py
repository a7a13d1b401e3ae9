#!/usr/bin/env python3
"""Does choosing pay: layers and neurons chosen by edgepack against random ones, before any healing.

    benchmarks/pruning.py [CHECKPOINT]        default: the example model

Layers: greedy by KL divergence, block influence, and random sets, for 1 to 4 dropped layers. Neurons: activation x norm
against random ones. Chosen on calibration text, measured on evaluation text (second half of each window, float32
transformers, against the full model). Prints tables and CPU seconds; asserts nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from convert import ROOT

from edgepack.calibrate.texts import resolve
from edgepack.checkpoint import open_checkpoint
from edgepack.prune import depth, width
from edgepack.prune.anatomy import find_anatomy, sizes_of
from edgepack.prune.evidence import Stage, measure
from edgepack.prune.likeness import Reference
from edgepack.prune.running import Running, load
from edgepack.prune.statistics import collect
from edgepack.prune.texts import FIRST_SCORED, texts_of
from edgepack.text import default_evaluation_text

State = Callable[[], AbstractContextManager[None]]


class Bench:
    """A model, on text to choose on and on text to measure on."""

    def __init__(self, model: Path, windows: int, tokens: int, evaluation_windows: int) -> None:
        checkpoint = open_checkpoint(model)
        self.anatomy = find_anatomy(checkpoint)
        self.sizes = sizes_of(checkpoint, self.anatomy)
        texts = texts_of(
            checkpoint, resolve(None).as_json(), default_evaluation_text(), windows, tokens, evaluation_windows
        )
        loaded, layers = load(model, generates=True), self.sizes.layers
        self.choosing = Running(
            loaded, layers, texts.calibration(windows), first=FIRST_SCORED, stop=texts.tokens - 1, pooling=None
        )
        self.first, self.stop = texts.scored
        self.measuring = Running(
            loaded, layers, texts.evaluation(model), first=self.first, stop=self.stop, pooling=None
        )

    def measured(self, states: dict[str, State]) -> dict[str, dict[str, Any]]:
        """KL divergence and perplexity of each state; all on the same windows, the full model run once."""
        stages = [Stage(name, self.measuring, state) for name, state in states.items()]
        before, rows = measure(self.measuring, stages, self.measuring.batches, first=self.first, stop=self.stop)
        return {"full": before} | dict(zip(states, rows, strict=True))

    def without(self, layers: tuple[int, ...]) -> State:
        return lambda: self.measuring.without(layers)

    def narrow(self, kept: dict[int, tuple[int, ...]]) -> State:
        @contextmanager
        def state() -> Iterator[None]:
            with width.silenced(self.measuring, self.anatomy, kept):
                yield

        return state


def layers_table(bench: Bench, most: int, sets: int, generator: random.Random) -> None:
    """Greedy, influence and random sets."""
    started = time.process_time()
    references = [Reference(bench.choosing.outputs(batch), vectors=False) for batch in bench.choosing.batches]
    rounds = depth.choose(bench.choosing, references, most, "greedy").evidence["rounds"]
    greedy_seconds, started = time.process_time() - started, time.process_time()
    influence = depth.block_influence(bench.choosing)
    influence_seconds = time.process_time() - started
    order = sorted(range(len(influence)), key=lambda number: influence[number])
    states: dict[str, State] = {}
    names: dict[str, tuple[int, ...]] = {}
    for count in range(1, most + 1):
        dropped = tuple(number for step in rounds[:count] for number in step["dropped"])
        names |= {f"greedy {count}": dropped, f"influence {count}": tuple(order[:count])}
        for number in range(sets):
            names[f"random {count} {number}"] = tuple(sorted(generator.sample(range(bench.sizes.layers), count)))
    states = {name: bench.without(layers) for name, layers in names.items()}
    found = bench.measured(states)
    print(f"\nlayers of {bench.sizes.layers}; full model: perplexity {found['full']['perplexity']:.3f}")
    print("| dropped | greedy | | influence | | median of random | best, worst of random |")
    print("|---|---|---|---|---|---|---|")
    for count in range(1, most + 1):
        drawn = [found[f"random {count} {number}"]["mean_kld"] for number in range(sets)]
        cells = [
            word
            for method in ("greedy", "influence")
            for word in (
                ", ".join(map(str, names[f"{method} {count}"])),
                f"{found[f'{method} {count}']['mean_kld']:.3f} (PPL {found[f'{method} {count}']['perplexity']:.2f})",
            )
        ]
        print(
            f"| {count} | {' | '.join(cells)} | {statistics.median(drawn):.3f} | {min(drawn):.3f}, {max(drawn):.3f} |"
        )
    print(f"{sets} random sets each; choosing took {greedy_seconds:.0f} and {influence_seconds:.0f} CPU seconds")


def neurons_table(bench: Bench, widths: list[int], draws: int, generator: random.Random) -> None:
    """Activation x norm against random neurons."""
    started = time.process_time()
    gathered = collect(bench.choosing, bench.anatomy, bench.sizes)
    seconds = time.process_time() - started
    states: dict[str, State] = {}
    for wide in widths:
        states[f"chosen {wide}"] = bench.narrow(width.choose_neurons(bench.choosing, bench.anatomy, gathered, wide)[0])
        for number in range(draws):
            kept = {
                layer: tuple(sorted(generator.sample(range(bench.sizes.ffn), wide)))
                for layer in range(bench.sizes.layers)
            }
            states[f"random {wide} {number}"] = bench.narrow(kept)
    found = bench.measured(states)
    print(f"\nneurons of {bench.sizes.ffn}")
    print("| stay | activation x norm | random (mean) | lower by |")
    print("|---|---|---|---|")
    for wide in widths:
        drawn = [found[f"random {wide} {number}"]["mean_kld"] for number in range(draws)]
        chosen, mean = found[f"chosen {wide}"], statistics.mean(drawn)
        shown = f"{chosen['mean_kld']:.3f} (PPL {chosen['perplexity']:.2f})"
        print(f"| {wide} | {shown} | {mean:.3f} | {1 - chosen['mean_kld'] / mean:.0%} |")
    print(f"{draws} random draws each; statistics took {seconds:.0f} CPU seconds")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "examples/models/tiny-llama-5m")
    parser.add_argument("--layers", type=int, default=4, help="most layers to drop; 0 leaves them out")
    parser.add_argument("--sets", type=int, default=20, help="random sets of layers of each size")
    parser.add_argument("--ffn", type=int, nargs="*", default=[512, 256], help="neurons that stay")
    parser.add_argument("--draws", type=int, default=3, help="random draws of neurons")
    parser.add_argument("--windows", type=int, default=16, help="of calibration text")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--evaluation-windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.model.resolve(), arguments.windows, arguments.window_tokens, arguments.evaluation_windows)
    generator = random.Random(20260301)
    if arguments.layers:
        layers_table(bench, arguments.layers, arguments.sets, generator)
    if arguments.ffn:
        neurons_table(bench, arguments.ffn, arguments.draws, generator)
    print(f"\n{time.process_time():.0f} CPU seconds in all")


if __name__ == "__main__":
    main()
