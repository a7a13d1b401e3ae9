#!/usr/bin/env python3
"""Converting and quantizing a checkpoint: edgepack beside llama.cpp's converter and llama-quantize, in one run.

    benchmarks/build_llama_tools > peer.txt
    benchmarks/convert.py --peer "$(cat peer.txt)" --random 0.2B 1B 3B --presets Q8_0 Q4_K_M
    benchmarks/convert.py --peer "$(cat peer.txt)" path/to/checkpoint --presets Q4_K_M

Prints a markdown table: CPU seconds (user + system), wall seconds, peak resident memory, bytes written, and how many
tensors of the two results have the same bytes. Measures, asserts nothing. Wall times mean something only as ratios
within one run;
resident memory counts mapped file pages, which is most of what the peer shows.

llama.cpp is used as its users use it: `--outtype q8_0` for Q8_0, else BF16 and then llama-quantize. Its converter
knows pre-tokenizers by a hash of published ones and refuses others, so it is told one (`--pre-tokenizer`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Shapes for random_checkpoint.py, Llama-like, tied: parameters as named.
RANDOM = {
    "0.2B": "--hidden 1024 --layers 11 --heads 16 --kv-heads 8 --ffn 4096",
    "1B": "--hidden 2048 --layers 16 --heads 32 --kv-heads 8 --ffn 8192",
    "3B": "--hidden 3072 --layers 29 --heads 24 --kv-heads 8 --ffn 8192",
}

EDGEPACK = """
import sys
from edgepack.gguf.convert import export
model, preset, folder, threads = sys.argv[1:]
export(model=model, preset=preset, overrides={}, imatrix=None, shard_mb=None, folder=folder, stem="edgepack",
       threads=int(threads), allow_nonfinite=False, extra_metadata={}, progress=lambda done, total: None)
"""
CONVERTER = """
import runpy, sys
source, pre = sys.argv[1:3]
sys.path[:0] = [source + "/gguf-py", source]
from conversion import base
for name in dir(base):
    kind = getattr(base, name)
    if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = [source + "/convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMPARE = """
import sys
from pathlib import Path
from edgepack.gguf.file import read_gguf
ours, theirs = (read_gguf(Path(path)) for path in sys.argv[1:])
same = 0
with ours.path.open("rb") as a, theirs.path.open("rb") as b:
    for name, x in ours.tensors.items():
        y = theirs.tensors.get(name)
        if y is not None and (x.type, x.shape) == (y.type, y.shape):
            a.seek(ours.data_offset + x.offset), b.seek(theirs.data_offset + y.offset)
            same += a.read(x.nbytes) == b.read(y.nbytes)
print(f"{same} of {len(ours.tensors | theirs.tensors)}")
"""


@dataclass(frozen=True)
class Cost:
    """What one command took; sums of commands add CPU, wall and bytes, and keep the larger memory."""

    cpu_seconds: float
    wall_seconds: float
    rss_mb: float
    written_mb: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.cpu_seconds + other.cpu_seconds,
            self.wall_seconds + other.wall_seconds,
            max(self.rss_mb, other.rss_mb),
            self.written_mb + other.written_mb,
        )

    def cells(self) -> str:
        """Table cells."""
        return f"{self.cpu_seconds:.1f} | {self.wall_seconds:.1f} | {self.rss_mb:,.0f} | {self.written_mb:,.0f}"


def measure(command: Sequence[str], output: Path) -> Cost:
    """Run a command that writes `output`; CPU and memory as the kernel counted them for that process alone."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    wall = time.monotonic() - started
    unit = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, in KiB on Linux
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / unit, output.stat().st_size / 1e6)


def peer_costs(arguments: argparse.Namespace, model: Path, preset: str, work: Path) -> tuple[dict[str, Cost], Path]:
    """llama.cpp's way; the steps and the finished file."""
    source, tools = arguments.peer / "vendor" / "llama.cpp", arguments.bin or arguments.peer / "build" / "bin"
    converter = [sys.executable, "-c", CONVERTER, str(source), arguments.pre_tokenizer, str(model)]
    final = work / f"peer-{preset}.gguf"
    if preset in ("Q8_0", "F32", "F16", "BF16"):
        return {"convert": measure([*converter, "--outtype", preset.lower(), "--outfile", str(final)], final)}, final
    middle = work / "peer-bf16.gguf"
    steps = {"convert": measure([*converter, "--outtype", "bf16", "--outfile", str(middle)], middle)}
    quantize = [str(tools / "llama-quantize"), str(middle), str(final), preset, str(arguments.threads)]
    steps["quantize"] = measure(quantize, final)
    middle.unlink()
    return steps, final


def compare(arguments: argparse.Namespace, title: str, model: Path, preset: str) -> list[str]:
    """Rows of the table for one model and preset: edgepack, every step of the peer, their sum, the ratio."""
    ours, theirs = [], []
    names: list[str] = []
    same = "-"
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            work = Path(folder)
            output = work / "edgepack.gguf"
            command = [sys.executable, "-c", EDGEPACK, str(model), preset, folder, str(arguments.threads)]
            ours.append(measure(command, output))
            if arguments.peer:
                steps, final = peer_costs(arguments, model, preset, work)
                theirs.append([*steps.values(), sum(steps.values(), Cost(0, 0, 0, 0))])
                names = [*steps, "together"] if len(steps) > 1 else [*steps]
                check = [sys.executable, "-c", COMPARE, str(output), str(final)]
                same = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    head = f"| {title} | {preset} |"
    rows = [f"{head} edgepack | {median(ours).cells()} | {same} |"]
    for i, name in enumerate(names):
        rows.append(f"{head} llama.cpp {name} | {median([run[i] for run in theirs]).cells()} | |")
    if theirs:
        total, mine = median([run[-1] for run in theirs]), median(ours)
        ratios = [mine.cpu_seconds / total.cpu_seconds, mine.wall_seconds / total.wall_seconds]
        ratios += [mine.rss_mb / total.rss_mb, mine.written_mb / total.written_mb]
        rows.append(f"{head} ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |")
    return rows


def median(costs: Sequence[Cost]) -> Cost:
    """Median of each figure."""
    fields = ("cpu_seconds", "wall_seconds", "rss_mb", "written_mb")
    return Cost(*(statistics.median(getattr(cost, field) for cost in costs) for field in fields))


def random_checkpoint(arguments: argparse.Namespace, size: str) -> Path:
    """Make a random checkpoint of that size, or use the one that is there."""
    folder = arguments.work / f"random-{size}"
    if not (folder / "config.json").exists():
        script = [sys.executable, str(arguments.generator), str(folder), "--tokenizer", str(arguments.tokenizer)]
        subprocess.run([*script, *RANDOM[size].split()], check=True, stdout=sys.stderr)
    return folder


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="checkpoint folders")
    parser.add_argument(
        "--random", nargs="*", choices=RANDOM, default=[], help="random checkpoints to make and measure"
    )
    parser.add_argument("--generator", type=Path, default=ROOT / "../shared/bench/random_checkpoint.py")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples/models/tiny-llama-5m")
    parser.add_argument("--presets", nargs="+", default=["Q8_0", "Q4_K_M"])
    peer = os.environ.get("EDGEPACK_PEER")
    parser.add_argument("--peer", type=Path, default=peer and Path(peer), help="what build_llama_tools printed")
    parser.add_argument("--bin", type=Path, help="folder of llama-quantize, if not PEER/build/bin")
    parser.add_argument("--pre-tokenizer", default="gpt-2", help="told to the peer's converter")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=1, help="medians of this many")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgepack-bench-convert")
    arguments = parser.parse_args()
    if not arguments.models and not arguments.random:
        parser.error("name a checkpoint folder, or sizes with --random")
    if not arguments.peer:
        print("no --peer: only edgepack is measured", file=sys.stderr)
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(f"{arguments.threads} threads, {arguments.runs} runs\n")
    print("| model | preset | what | CPU s | wall s | peak RSS MB | written MB | tensors with the same bytes |")
    print("|---|---|---|---|---|---|---|---|")
    models = [(folder.name, folder.resolve()) for folder in arguments.models]
    models += [(f"random {size}", random_checkpoint(arguments, size)) for size in arguments.random]
    for title, model in models:
        for preset in arguments.presets:
            for row in compare(arguments, title, model, preset):
                print(row, flush=True)


if __name__ == "__main__":
    main()
