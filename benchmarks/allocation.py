#!/usr/bin/env python3
"""The best file at a size: edgepack's calibrated types beside llama-quantize with llama-imatrix.

    benchmarks/allocation.py --peer "$(benchmarks/build_llama_tools)" path/to/checkpoint

Both calibrate on the same windows of the same text; both files are measured by edgepack in llama.cpp against the same
float32 reference, on text that nothing was tuned on. A row gets the bytes of the preset's file and not one more.
Measures, asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import ROOT
from validation import Peer, export

from edgepack import pipeline
from edgepack.text import default_calibration_text, default_evaluation_text
from edgepack.worker import run

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ALL_TYPES = (*K_TYPES, "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS")
# Row -> profile keys.
ROWS: Mapping[str, Mapping[str, str]] = {
    "allocation, K types": {"quantize.types": ",".join(K_TYPES), "quantize.feedback": "false"},
    "allocation, all types": {"quantize.types": ",".join(ALL_TYPES), "quantize.feedback": "false"},
    "K types + column feedback": {"quantize.types": ",".join(K_TYPES)},
    "all types + column feedback": {"quantize.types": ",".join(ALL_TYPES)},
}


def measured(reference: Path, candidate: Path, text: Path, windows: int, threads: int) -> dict[str, Any]:
    """Rows of one file, by name."""
    request = {"reference": str(reference), "candidate": str(candidate), "text": str(text)}
    request |= {"windows": windows, "window_tokens": 512, "threads": threads}
    found = run("edgepack.measure.fidelity:fidelity", request, what="fidelity")
    return {row["name"]: row for row in found["rows"]}


def theirs(peer: Peer, model: Path, arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """llama-imatrix and llama-quantize: preset -> bytes, KLD, interval, perplexity."""
    reference = export(model, "F32", work, peer.threads)
    imatrix = work / "imatrix.gguf"
    step = peer.run(
        "llama-imatrix", "-m", reference, "-f", arguments.calibration, "--chunks", arguments.calibration_windows,
        "-t", peer.threads, "-o", imatrix,
    )  # fmt: skip
    print(f"llama-imatrix: {step.cpu_seconds:.1f} CPU s", flush=True)
    found = {}
    for preset in arguments.presets:
        file = work / f"peer-{preset}.gguf"
        quantized = peer.run("llama-quantize", "--imatrix", imatrix, reference, file, preset, peer.threads)
        rows = measured(reference, file, arguments.evaluation, arguments.windows, peer.threads)
        kld, ppl = rows["mean_kld"], rows["perplexity"]
        found[preset] = {"bytes": file.stat().st_size, "mean_kld": kld["value"], "ci95": kld["ci95"]}
        found[preset] |= {"perplexity": ppl["value"], "cpu": quantized.cpu_seconds}
        file.unlink()
    return found


def ours(model: Path, sizes: Sequence[int], keys: Mapping[str, str], arguments: argparse.Namespace, work: Path) -> Any:
    """Points of one row, in the order of the sizes, and the CPU and wall seconds of all of them."""
    settings = {"measure.windows": arguments.windows, "runtime.threads": arguments.threads}
    settings |= {"quantize.calibration": arguments.calibration}
    settings |= {"quantize.calibration_windows": arguments.calibration_windows}
    overrides = [f"{key}={value}" for key, value in {**settings, **keys}.items()]
    before, started = os.times(), time.monotonic()
    _, document = pipeline.frontier(
        model, "laptop", work / f"row-{len(list(work.glob('row-*')))}", sizes=[f"{size}B" for size in sizes],
        presets=[], overrides=overrides, evaluation=arguments.evaluation,
    )  # fmt: skip
    after = os.times()
    cpu = sum(after[i] - before[i] for i in range(4))
    points = {point["label"]: point for point in document["points"]}
    return [points[f"{size}B"] for size in sizes], cpu, time.monotonic() - started


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "../shared/models/ref-llama-37m")
    peer = os.environ.get("EDGEPACK_PEER")
    parser.add_argument("--peer", type=Path, default=peer and Path(peer), help="what build_llama_tools printed")
    parser.add_argument("--bin", type=Path, help="folder of llama.cpp's tools, if not PEER/build/bin")
    parser.add_argument("--peer-libraries", help="LD_LIBRARY_PATH for llama.cpp's tools alone")
    parser.add_argument("--presets", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--windows", type=int, default=100, help="of evaluation text")
    parser.add_argument("--calibration-windows", type=int, default=100)
    parser.add_argument("--calibration", type=Path, default=default_calibration_text())
    parser.add_argument("--evaluation", type=Path, default=default_evaluation_text())
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if not arguments.peer:
        parser.error("--peer: name the folder that benchmarks/build_llama_tools printed")
    tools = arguments.bin or arguments.peer / "build" / "bin"
    peer = Peer(arguments.peer / "vendor" / "llama.cpp", tools, arguments.peer_libraries, arguments.threads)
    model = arguments.model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["EDGEPACK_CACHE"] = str(work / "store")
        baseline = theirs(peer, model, arguments, work)
        print(f"\n{model.name}, {arguments.windows} windows of {arguments.evaluation.name}\n")
        print("| at the bytes of | file | bytes | KLD | 95 % | ratio | predicted | PPL |")
        print("|---|---|---|---|---|---|---|---|")
        for preset, point in baseline.items():
            print(f"| {preset} | llama-quantize + llama-imatrix | {numbers(point)} | 1 | | {point['perplexity']:.3f} |")
        sizes = [point["bytes"] for point in baseline.values()]
        for name in arguments.rows:
            points, cpu, wall = ours(model, sizes, ROWS[name], arguments, work)
            for (preset, base), point in zip(baseline.items(), points, strict=True):
                ratio = point["mean_kld"] / base["mean_kld"]
                print(
                    f"| {preset} | {name} | {numbers(point)} | {ratio:.3f} | {point['predicted_kld']:.5f} "
                    f"| {point['perplexity']:.3f} |",
                    flush=True,
                )
            print(
                f"| | {name}: {cpu:.0f} CPU s, {wall:.0f} s for all sizes, measuring included | | | | | | |", flush=True
            )


def numbers(point: Mapping[str, Any]) -> str:
    """Bytes, divergence, interval."""
    low, high = point["ci95"]
    return f"{point['bytes']:,} | {point['mean_kld']:.5f} | {low:.5f} to {high:.5f}"


if __name__ == "__main__":
    main()
