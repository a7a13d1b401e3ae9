#!/usr/bin/env python3
"""ONNX decoders: edgepack beside the model builder of onnxruntime-genai, in one run.

    benchmarks/decoders.py path/to/checkpoint                         # size, fidelity, speed, cost of building
    benchmarks/decoders.py path/to/large --rows builder-int4 int4 --windows 0    # cost of building only

A markdown table with a row for each way to build: size of graph and weights, mean KL divergence from transformers in
float32 on the evaluation text (in onnxruntime-genai itself), perplexity, top-1 agreement, tokens per second and time to
the first token as ratios to the first row (rows in turns, so that noise falls on all of them), CPU seconds and peak
memory of the build. `--keep` leaves the folders for a closer look.

The builder runs as its users run it; its options take effect without the `int4_` prefix only.
Measures, asserts nothing. Speeds mean something only as ratios within one run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.text import default_evaluation_text
from edgepack.worker import run, run_measured

# Row -> recipe and options of edgepack, or precision and options of the builder.
ROWS: dict[str, tuple[str, dict[str, Any] | list[str]]] = {
    "builder-int4": ("int4", []),
    "builder-int4-rtn": ("int4", ["algo_config=rtn"]),
    "builder-int4-k_quant": ("int4", ["algo_config=k_quant"]),
    "builder-int4-k_quant_mixed": ("int4", ["algo_config=k_quant_mixed"]),
    "builder-int8": ("int8", []),
    "int4-small": ("int4-small", {}),
    "int4": ("int4", {}),
    "int4-mixed 5.085": ("int4-mixed", {"bits_per_weight": 5.085}),
    "int4-mixed 6.46": ("int4-mixed", {"bits_per_weight": 6.46}),
    "int8": ("int8", {}),
}


@dataclass(frozen=True)
class Built:
    """A folder and what making it took."""

    row: str
    folder: Path
    nbytes: int
    cpu_seconds: float
    peak_rss_bytes: int


def main() -> int:
    """Build every row, measure it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens; 0: build only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="of the timed runs; 0: no timing")
    parser.add_argument("--keep", type=Path, help="a new folder for what is built; default: removed")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        scratch = chosen.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="edgepack-bench-"))
        Path(scratch).mkdir(parents=True, exist_ok=True)
        built = [build(row, chosen.model, Path(scratch), chosen.threads) for row in chosen.rows]
        speeds = times(built, chosen.threads, chosen.repetitions) if chosen.windows and chosen.repetitions else {}
        print(f"{chosen.threads} threads, {chosen.windows} windows, {chosen.repetitions} repetitions\n")
        print("| row | MB | KLD | ± | PPL | top-1 % | decode rate | first token | build CPU s | build peak MB |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for one in built:
            fidelity = measure(one, chosen.model, chosen.windows, chosen.threads) if chosen.windows else [""] * 4
            timing = speeds.get(one.row, ["", ""])
            cost = [f"{one.cpu_seconds:.1f}", f"{one.peak_rss_bytes / 1e6:,.0f}"]
            print(f"| {' | '.join([one.row, f'{one.nbytes / 1e6:.2f}', *fidelity, *timing, *cost])} |", flush=True)
    return 0


def build(row: str, model: Path, scratch: Path, threads: int) -> Built:
    """Make one folder."""
    folder = scratch / row.replace(" ", "-")
    recipe, options = ROWS[row]
    if isinstance(options, dict):
        folder.mkdir()
        arguments = {"model": str(model), "folder": str(folder), "recipe": recipe}
        asked = arguments | {"options": options | {"threads": threads}}
        _, usage = run_measured("edgepack.onnx.decoder:export", asked, what=row)
        return Built(row, folder, size(folder), usage.cpu_seconds, usage.peak_rss_bytes)
    return by_builder(row, model, folder, recipe, options)


def by_builder(row: str, model: Path, folder: Path, precision: str, options: list[str]) -> Built:
    """Run the builder's command line; its options take effect without the `int4_` prefix only."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder.parent / "cache")]
    command += ["--extra_options", "hf_token=false", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{row}: the builder ended with status {status}")
    return Built(row, folder, size(folder), usage.ru_utime + usage.ru_stime, peak(usage))


def peak(usage: resource.struct_rusage) -> int:
    """Peak resident bytes."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def size(folder: Path) -> int:
    """Bytes of graph and weights."""
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def measure(built: Built, model: Path, windows: int, threads: int) -> list[str]:
    """KL divergence, its standard error, perplexity and top-1 agreement."""
    arguments = {"candidate": str(built.folder), "source": str(model), "text": str(default_evaluation_text())}
    settings = {"windows": windows, "window_tokens": 512, "threads": threads}
    rows = run("edgepack.measure.onnx_fidelity:decoder_fidelity", arguments | settings, what=built.row)["rows"]
    found = {row["name"]: row for row in rows}
    divergence = found["mean_kld"]
    error = divergence.get("standard_error") or divergence.get("extra", {}).get("standard_error") or float("nan")
    perplexity, agreement = found["perplexity"]["value"], found["top1_agreement"]["value"]
    return [f"{divergence['value']:.5f}", f"{error:.5f}", f"{perplexity:.3f}", f"{100 * agreement:.2f}"]


def times(built: list[Built], threads: int, repetitions: int) -> dict[str, list[str]]:
    """Median decode rate and time to the first token, as ratios to the first row's; rows in turns."""
    settings = {"prompt_tokens": 128, "decode_tokens": 64, "repetitions": 1, "warmups": 1, "pause_seconds": 0.0}
    seen: dict[str, list[tuple[float, float]]] = {one.row: [] for one in built}
    for _ in range(repetitions):
        for one in built:
            arguments = settings | {"artifact": str(one.folder), "threads": threads, "context": 256}
            rows = run("edgepack.measure.onnx_latency:decoder_latency", arguments, what=one.row)["rows"]
            found = {row["name"]: row["value"] for row in rows}
            seen[one.row].append((found["decode_tokens_per_s_p50"], found["ttft_ms_p50"]))
    medians = {row: [statistics.median(value[at] for value in values) for at in (0, 1)] for row, values in seen.items()}
    first = medians[built[0].row]
    print(f"{built[0].row}: {first[0]:.0f} tokens/s, first token after {first[1]:.0f} ms\n")
    return {row: [f"{value / base:.2f}" for value, base in zip(found, first, strict=True)]
            for row, found in medians.items()}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
