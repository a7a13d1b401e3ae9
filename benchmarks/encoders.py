#!/usr/bin/env python3
"""ONNX encoders: edgepack's recipes and its search beside onnxruntime's own quantizers, on one export, in one run.

    benchmarks/encoders.py path/to/sentence-transformers-folder
    benchmarks/encoders.py path/to/folder --rows ort-dynamic-channel int8 "auto 0.997/0.993" --rounds 40

A markdown table with a row for each model: size; cosine to the float32 export on sentences of the evaluation text (mean
and 1 % quantile) and nearest neighbours kept; median milliseconds at batch 1, 64 and 128 tokens, 1 and 2 threads; CPU
seconds and peak memory of making it from the export. Calibration uses the calibration text, fidelity the evaluation
text. Rows take turns run by run, so that noise falls on all of them: latencies mean something only as ratios within one
run. On a busy machine `--clock cpu` counts the CPU time of the thread that computes instead (one thread only).

Measures, asserts nothing. Olive is not run: it wants another transformers; what it reached is in docs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.text import default_calibration_text, default_evaluation_text
from edgepack.worker import run_measured

TASK = "sentence-similarity"
LENGTHS = (64, 128)
# Row -> who makes it, and with what.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 export": ("export", {}),
    "ort-dynamic-tensor": ("ort", {"method": "dynamic", "per_channel": False}),
    "ort-dynamic-channel": ("ort", {"method": "dynamic", "per_channel": True}),
    "ort-static-qdq": ("ort", {"method": "static", "per_channel": True}),
    "ort-matmulnbits-8": ("ort", {"method": "blocks", "per_channel": True}),
    "int8": ("recipe", {"recipe": "int8"}),
    "int8-dynamic": ("recipe", {"recipe": "int8-dynamic"}),
    "int8-qdq": ("recipe", {"recipe": "int8-qdq"}),
    "int8-weights": ("recipe", {"recipe": "int8-weights"}),
    "int4": ("recipe", {"recipe": "int4"}),
    "fp16": ("recipe", {"recipe": "fp16"}),
    "auto": ("search", {}),
    "auto 0.997/0.993": ("search", {"cosine_mean": 0.997, "cosine_p01": 0.993}),
    "auto 0.999/0.998": ("search", {"cosine_mean": 0.999, "cosine_p01": 0.998}),
}


@dataclass
class Made:
    """A model and what making it took; `note` says what a search found."""

    row: str
    folder: Path
    cpu_seconds: float
    peak_rss_bytes: int
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Of all files of the model."""
        return sum(path.stat().st_size for path in self.folder.glob("model.onnx*"))


def main() -> int:
    """Make every row, measure it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=30, help="of the timed runs; 0: no timing")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--sentences", type=int, default=500, help="fidelity is measured on")
    chosen = parser.parse_args()
    threads = [1] if chosen.clock == "cpu" else chosen.threads
    with tempfile.TemporaryDirectory(prefix="edgepack-bench-") as scratch:
        export = _export(chosen.model, Path(scratch))
        made = [make(row, export, chosen.model, Path(scratch)) for row in chosen.rows]
        quality = fidelity([export.folder, *(one.folder for one in made)], chosen.model, chosen.sentences)
        speeds = times(made, threads, chosen.rounds, chosen.clock) if chosen.rounds else {}
        columns = [f"{count} thr, {length} tok" for count in threads for length in LENGTHS] if chosen.rounds else []
        print(f"| row | MB | cosine mean | 1 % | neighbours | {' | '.join([*columns, 'CPU s'])} | peak MB | |")
        print("|---|" + "---|" * (len(columns) + 7))
        for one in made:
            mean, low, near = quality[one.folder]
            cells = [one.row, f"{one.nbytes / 1e6:.1f}", f"{mean:.4f}", f"{low:.4f}", f"{near:.3f}"]
            cells += [f"{value:.2f}" for value in speeds.get(one.row, [])]
            cells += [f"{one.cpu_seconds:.1f}", f"{one.peak_rss_bytes / 1e6:,.0f}", one.note]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def make(row: str, export: Made, model: Path, scratch: Path) -> Made:
    """Make one row from the export."""
    kind, options = ROWS[row]
    if kind == "export":
        return Made(row, export.folder, export.cpu_seconds, export.peak_rss_bytes, "from the checkpoint")
    folder = scratch / row.replace(" ", "-").replace("/", "-")
    folder.mkdir()
    arguments: dict[str, Any] = {"model": str(export.folder), "folder": str(folder), "source": str(model)}
    text = str(default_calibration_text())
    if kind == "ort":
        return by_peer(row, arguments | options, folder)
    if kind == "recipe":
        function = "edgepack.onnx.quantize:quantize"
        arguments |= options | {"task": TASK, "calibration": text}
    else:
        from edgepack.onnx.recipes import tried

        function = "edgepack.onnx.search:choose"
        arguments |= {"task": TASK, "text": text, "recipes": tried("CPUExecutionProvider", images=False)}
        arguments["budgets"] = {name: {"min": value} for name, value in options.items()}
    found, usage = run_measured(function, arguments, what=row)
    note = ""
    if kind == "search":
        better = len(found["finer"]) + len(found["kept"])
        note = f"{found['recipe']}, {better} nodes better" + ("" if found["search"]["met"] else ", budget missed")
    return Made(row, folder, usage.cpu_seconds, usage.peak_rss_bytes, note)


def _export(model: Path, scratch: Path) -> Made:
    folder = scratch / "fp32"
    folder.mkdir()
    _, usage = run_measured("edgepack.onnx.export:export", {"model": str(model), "folder": str(folder)}, what="export")
    return Made("fp32 export", folder, usage.cpu_seconds, usage.peak_rss_bytes)


def by_peer(row: str, arguments: dict[str, Any], folder: Path) -> Made:
    """Run `peer` in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, "--peer", json.dumps(arguments)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{row}: onnxruntime's quantizer ended with status {status}")
    return Made(row, folder, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def peer(*, model: str, folder: str, source: str, method: str, per_channel: bool) -> None:
    """What onnxruntime's own quantizers make of the export, called as its documentation does."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    before, after = f"{model}/model.onnx", f"{folder}/model.onnx"
    if method == "dynamic":
        quantize_dynamic(before, after, per_channel=per_channel, weight_type=QuantType.QInt8)
    elif method == "blocks":
        import onnx

        quantizer = MatMulNBitsQuantizer(onnx.load(before), bits=8, block_size=128, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(after)
    else:

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.rows = iter(_feeds(Path(before), Path(source), default_calibration_text(), 64))

            def get_next(self) -> Any:
                return next(self.rows, None)

        operators = ["MatMul", "Gather"]
        quantize_static(before, after, Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
                        op_types_to_quantize=operators, extra_options={"MatMulConstBOnly": True})  # fmt: skip


def _feeds(model: Path, source: Path, text: Path, count: int) -> list[dict[str, Any]]:
    from edgepack.onnx.calibrate import feed, read_samples
    from edgepack.runtimes.onnxruntime import Session

    inputs = Session(model, threads=1).inputs
    return [feed(sample, inputs) for sample in read_samples(str(text), source, inputs, count, task=TASK)]


def fidelity(folders: list[Path], source: Path, count: int) -> dict[Path, list[float]]:
    """Cosine mean, 1 % quantile and neighbours kept of each model, against the first."""
    from edgepack.measure.cosine import vector_estimates
    from edgepack.runtimes.onnxruntime import NO_SPINNING, Session

    feeds = _feeds(folders[0] / "model.onnx", source, default_evaluation_text(), count)
    found: dict[Path, list[float]] = {}
    expected: Any = None
    for folder in folders:
        session = Session(folder / "model.onnx", threads=1, config=NO_SPINNING)
        name = session.outputs[0].name
        vectors = np.concatenate([session.run(one, [name])[name] for one in feeds])
        expected = vectors if expected is None else expected
        values = vector_estimates(expected, vectors)
        found[folder] = [float(values[key].value) for key in ("cosine_mean", "cosine_p01", "neighbour_agreement")]
    return found


def times(made: list[Made], threads: list[int], rounds: int, clock: str) -> dict[str, list[float]]:
    """Median milliseconds per threads and length; all models are open, and take turns."""
    now = time.thread_time if clock == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {one.row: [] for one in made}
    for count in threads:
        sessions = {one.row: _open(one, count) for one in made}
        for length in LENGTHS:
            ids = np.random.default_rng(0).integers(1000, 20_000, (1, length))
            fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            spans: dict[str, list[float]] = {row: [] for row in sessions}
            for turn in range(rounds + 1):
                for row, session in sessions.items():
                    inputs = {port.name: fed[port.name] for port in session.get_inputs()}
                    for again in range(4):
                        started = now()
                        session.run(None, inputs)
                        if turn and again:  # the first round and the first run of a turn warm up
                            spans[row].append(1000 * (now() - started))
            for row, seen in spans.items():
                found[row].append(float(np.median(seen)))
    return found


def _open(one: Made, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Many sessions are open: none may burn the cores while another one runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(one.folder / "model.onnx", options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(**json.loads(sys.argv[2]))
    else:
        sys.exit(main())
