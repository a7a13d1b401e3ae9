#!/usr/bin/env python3
"""Does the predicted divergence rank type maps as the measured one does?

    benchmarks/sensitivity.py path/to/checkpoint

Draws random maps of types, predicts the KL divergence of each from calibration, measures it (in float32 on dequantized
weights, on windows that calibration has not seen), and prints the rank correlation: for several numbers of gradient
windows. No column feedback, so that the
weights measured are those of ggml. Measures, asserts nothing.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convert import ROOT

from edgepack.calibrate.collect import collect
from edgepack.calibrate.layers import Forward, load_model, matrices, mean_kld
from edgepack.calibrate.moments import open_moments
from edgepack.calibrate.sensitivity import sensitivity
from edgepack.calibrate.texts import CalibrationText, calibration_windows
from edgepack.gguf import ggml
from edgepack.gguf.blocks import dequantize
from edgepack.gguf.model import describe
from edgepack.gguf.types import TYPES, row_bytes
from edgepack.text import default_evaluation_text, read_text, text_sha256

KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Ranks from 0; ties don't happen among divergences."""
    return np.argsort(np.argsort(values)).astype(float)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation."""
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def measured(
    forward: Forward, reference: torch.Tensor, found: Mapping[str, Any], kinds: Mapping[str, str], moments: Any
) -> float:
    """KL divergence with every matrix in the type of the map."""
    kept = {name: matrix.rows.clone() for name, matrix in found.items()}
    for name, matrix in found.items():
        kind = TYPES[kinds[name]]
        rows = np.ascontiguousarray(matrix.rows.numpy())
        data = np.empty(len(rows) * row_bytes(kind, matrix.width), dtype=np.uint8)
        ggml.quantize_rows(rows, kind, data, moments.importance(name) if name in moments else None)
        matrix.rows.copy_(torch.from_numpy(dequantize(data.reshape(len(rows), -1), kind, matrix.width)))
    value = mean_kld(reference, forward.logits())
    for name, matrix in found.items():
        matrix.rows.copy_(kept[name])
    return value


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "../shared/models/ref-llama-37m")
    parser.add_argument("--maps", type=int, default=20)
    parser.add_argument("--gradient-windows", type=int, nargs="+", default=[2, 4, 16, 32])
    parser.add_argument("--windows", type=int, default=40, help="for the second moments")
    parser.add_argument("--evaluation-windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    torch.set_num_threads(arguments.threads)
    spec = describe(model)
    text = read_text(default_evaluation_text())
    named = CalibrationText(text, text_sha256(text), "evaluation text")
    pieces = calibration_windows(model, named, 512, arguments.evaluation_windows)
    predictions: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.gradient_windows:
            out, journal = Path(folder, f"out-{count}"), Path(folder, f"journal-{count}")
            out.mkdir()
            journal.mkdir()
            started = time.process_time()
            collect(
                model=str(model), text=None, windows=max(arguments.windows, count), gradient_windows=count,
                folder=str(out), journal=str(journal), threads=arguments.threads,
            )  # fmt: skip
            found = sensitivity(
                model=str(model), statistics=str(out), kinds=KINDS, feedback=False, threads=arguments.threads
            )
            name = f"{count} gradient windows"
            predictions[name] = found["costs"]
            print(f"{name}: {time.process_time() - started:.0f} CPU s", flush=True)
        moments = open_moments(out)
        loaded = load_model(model)
        matrix_of = matrices(loaded, spec)
        forward = Forward(loaded, pieces)
        reference = torch.log_softmax(forward.logits(), dim=-1)
        draw = random.Random(20260101)
        maps = [{name: draw.choice(KINDS) for name in matrix_of} for _ in range(arguments.maps)]
        truth = [measured(forward, reference, matrix_of, kinds, moments) for kinds in maps]
    print(f"\n{model.name}: {len(maps)} random maps of {', '.join(KINDS)}, KLD {min(truth):.4f} to {max(truth):.4f}\n")
    print("| prediction from | Spearman | measured / predicted, least to most |\n|---|---|---|")
    for name, costs in predictions.items():
        guess = [sum(costs[tensor][kind] for tensor, kind in kinds.items()) for kinds in maps]
        ratios = sorted(real / made for real, made in zip(truth, guess, strict=True))
        print(f"| {name} | {spearman(truth, guess):.3f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
