#!/usr/bin/env python3
"""Build and validate a model: edgepack beside llama.cpp's converter, llama-quantize, llama-perplexity and llama-bench.

    benchmarks/build_llama_tools > peer.txt
    benchmarks/validation.py --peer "$(cat peer.txt)" path/to/checkpoint --parts whole speed ladder

Three parts, each a markdown table:

- `whole`: one `edgepack build` (an empty store; conversion, token and chat checks, logits against transformers, 100
  windows of fidelity, timing, package) beside convert + quantize + llama-perplexity for the reference's logits +
  llama-perplexity --kl-divergence + llama-bench. CPU and wall seconds of every step.
- `speed`: edgepack's latency worker and llama-bench in turns (A, B, A, B) on one file, same threads and counts.
- `ladder`: for each preset, KL divergence, perplexity and top-1 agreement by both, on the same file, against the same
  float32 reference.

Measures, asserts nothing. Wall times mean something only as ratios within one run. llama.cpp's converter knows
pre-tokenizers by a hash of published ones and refuses others, so it is told one (`--pre-tokenizer`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import CONVERTER, ROOT

from edgepack.text import default_evaluation_text
from edgepack.worker import run

PRESETS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
PROMPT, DECODE, REPETITIONS = 128, 64, 5  # the workload of the built-in profiles


@dataclass(frozen=True)
class Step:
    """What one command took and said."""

    cpu_seconds: float
    wall_seconds: float
    output: str


@dataclass(frozen=True)
class Peer:
    """llama.cpp's tools.

    Args:
        source: Its source tree.
        tools: Folder of its programs.
        libraries: LD_LIBRARY_PATH for them alone, or None.
        threads: Threads they are told to use.
    """

    source: Path
    tools: Path
    libraries: str | None
    threads: int

    def run(self, tool: str, *arguments: object) -> Step:
        """Run one of them."""
        environment = os.environ | ({"LD_LIBRARY_PATH": self.libraries} if self.libraries else {})
        return measured([str(self.tools / tool), *map(str, arguments)], environment)

    def perplexity(self, model: Path, text: Path, base: Path, windows: int, *more: str) -> Step:
        """llama-perplexity: with `--kl-divergence` against the logits in `base`, else writing them."""
        arguments = (
            "-m",
            model,
            "-f",
            text,
            "--chunks",
            windows,
            "-t",
            self.threads,
            "--kl-divergence-base",
            base,
            *more,
        )
        return self.run("llama-perplexity", *arguments)


def measured(command: Sequence[str], environment: dict[str, str]) -> Step:
    """Run a command; CPU seconds are those of it and of the children it waited for."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if child.returncode not in (0, 3):  # 3: edgepack built, but a budget is missed
        raise SystemExit(f"{command[0]} failed ({child.returncode}):\n{output[-2000:]}")
    return Step(usage.ru_utime + usage.ru_stime, time.monotonic() - started, output)


def whole(peer: Peer, model: Path, arguments: argparse.Namespace, work: Path) -> None:
    """One build of ours beside their five commands."""
    text, preset, windows = default_evaluation_text(), arguments.preset, arguments.windows
    settings = {
        "measure.windows": windows,
        "runtime.threads": peer.threads,
    }
    command = [sys.executable, "-m", "edgepack.cli", "build", str(model), "-t", "laptop", "--quantize", preset]
    command += ["-o", str(work / "package"), "--json"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    ours = measured(command, os.environ | {"EDGEPACK_CACHE": str(work / "store")})

    bf16, quantized, base = work / "bf16.gguf", work / "quantized.gguf", work / "base.kld"
    converter = [sys.executable, "-c", CONVERTER, str(peer.source), arguments.pre_tokenizer, str(model)]
    bench = ("-m", quantized, "-p", PROMPT, "-n", DECODE, "-r", REPETITIONS, "-t", peer.threads)
    theirs = {
        "convert --outtype bf16": measured([*converter, "--outtype", "bf16", "--outfile", str(bf16)], dict(os.environ)),
        f"llama-quantize {preset}": peer.run("llama-quantize", bf16, quantized, preset, peer.threads),
        "llama-perplexity, reference": peer.perplexity(bf16, text, base, windows),
        "llama-perplexity, KLD": peer.perplexity(quantized, text, base, windows, "--kl-divergence"),
        "llama-bench": peer.run("llama-bench", *bench),
    }
    print(f"\n{model.name} to {preset}, {windows} windows, {peer.threads} threads\n")
    print("| what | CPU s | wall s |\n|---|---|---|")
    print(f"| edgepack build | {ours.cpu_seconds:.1f} | {ours.wall_seconds:.1f} |")
    for name, step in theirs.items():
        print(f"| {name} | {step.cpu_seconds:.1f} | {step.wall_seconds:.1f} |")
    cpu, wall = (sum(getattr(step, key) for step in theirs.values()) for key in ("cpu_seconds", "wall_seconds"))
    print(f"| llama.cpp together | {cpu:.1f} | {wall:.1f} |")
    print(f"| ratio | {ours.cpu_seconds / cpu:.2f} | {ours.wall_seconds / wall:.2f} |", flush=True)


def speed(peer: Peer, model: Path, arguments: argparse.Namespace, work: Path) -> None:
    """Prompt and decode rates by both, in turns, on one file."""
    artifact = export(model, arguments.preset, work, peer.threads)
    settings = {"prompt_tokens": PROMPT, "decode_tokens": DECODE, "repetitions": REPETITIONS, "warmups": 1}
    settings |= {"pause_seconds": 0.0, "threads": peer.threads, "context": PROMPT + DECODE, "gpu_layers": 0}
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        found = run("edgepack.measure.latency:latency", settings | {"artifact": str(artifact)}, what="latency")
        rows = {row["name"]: row for row in found["rows"]}
        ours.append((rows["prefill_tokens_per_s"]["value"], rows["decode_tokens_per_s_p50"]["median_of_runs"]))
        common = ("-m", artifact, "-t", peer.threads, "-r", REPETITIONS, "-o", "json")
        prompt = peer.run("llama-bench", *common, "-p", PROMPT, "-n", 0)
        decode = peer.run("llama-bench", *common, "-p", 0, "-n", DECODE, "-d", PROMPT)
        theirs.append((rate(prompt.output), rate(decode.output)))
    print(f"\n{artifact.name}: medians of {arguments.rounds} turns each, {peer.threads} threads, tokens/s\n")
    print("| work | edgepack | llama-bench | ratio |\n|---|---|---|---|")
    for i, name in enumerate((f"prompt of {PROMPT}", f"decode {DECODE} after {PROMPT}")):
        a, b = (statistics.median(turn[i] for turn in turns) for turns in (ours, theirs))
        print(f"| {name} | {a:,.1f} | {b:,.1f} | {a / b:.3f} |", flush=True)


def rate(output: str) -> float:
    """Tokens per second of llama-bench's only test: the median of its runs."""
    document = json.loads(output[output.index("[\n") : output.rindex("]") + 1])
    return statistics.median(document[0]["samples_ts"])


def ladder(peer: Peer, model: Path, arguments: argparse.Namespace, work: Path) -> None:
    """Fidelity of every preset by both."""
    text, base = default_evaluation_text(), work / "ladder.kld"
    reference = export(model, "F32", work, peer.threads)
    peer.perplexity(reference, text, base, arguments.windows)
    print(f"\n{model.name}, {arguments.windows} windows, reference F32\n")
    print(
        "| type | bytes | KLD edgepack | KLD llama.cpp | difference | PPL edgepack | PPL llama.cpp | difference % |",
        end="",
    )
    print(" top-1 % edgepack | top-1 % llama.cpp |\n|---|---|---|---|---|---|---|---|---|---|")
    for preset in arguments.presets:
        artifact = export(model, preset, work, peer.threads, arguments.imatrix)
        request = {"reference": str(reference), "candidate": str(artifact), "text": str(text)}
        request |= {"windows": arguments.windows, "window_tokens": 512, "threads": peer.threads}
        found = run("edgepack.measure.fidelity:fidelity", request, what="fidelity")
        ours = {row["name"]: row["value"] for row in found["rows"]}
        output = peer.perplexity(artifact, text, base, arguments.windows, "--kl-divergence").output
        kld, ppl, top = (number(output, name) for name in (r"Mean +KLD:", r"Mean PPL\(Q\) +:", r"Same top p:"))
        mine = (ours["mean_kld"], ours["perplexity"], 100 * ours["top1_agreement"])
        print(
            f"| {preset} | {artifact.stat().st_size:,} | {mine[0]:.6f} | {kld:.6f} | {mine[0] - kld:+.6f} "
            f"| {mine[1]:.4f} | {ppl:.4f} | {100 * (mine[1] / ppl - 1):+.4f} | {mine[2]:.2f} | {top:.2f} |",
            flush=True,
        )
        artifact.unlink()


def number(output: str, name: str) -> float:
    """The figure after `name` in llama-perplexity's summary."""
    match = re.search(name + r"\s*(-?[\d.]+)", output)
    if match is None:
        raise SystemExit(f"llama-perplexity printed no {name!r}:\n{output[-2000:]}")
    return float(match[1])


def export(model: Path, preset: str, work: Path, threads: int, imatrix: Path | None = None) -> Path:
    """Our artifact of the model."""
    (work / f"{model.name}-{preset}.gguf").unlink(missing_ok=True)
    request: dict[str, Any] = {"model": str(model), "preset": preset, "overrides": {}, "shard_mb": None}
    request |= {"imatrix": str(imatrix) if imatrix else None, "folder": str(work), "stem": f"{model.name}-{preset}"}
    request |= {"threads": threads, "allow_nonfinite": False, "extra_metadata": {}}
    return work / str(run("edgepack.gguf.convert:export", request, what="export")["files"][0])


PARTS = {"whole": whole, "speed": speed, "ladder": ladder}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "../shared/models/ref-llama-37m")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    peer = os.environ.get("EDGEPACK_PEER")
    parser.add_argument("--peer", type=Path, default=peer and Path(peer), help="what build_llama_tools printed")
    parser.add_argument("--bin", type=Path, help="folder of llama.cpp's tools, if not PEER/build/bin")
    parser.add_argument("--peer-libraries", help="LD_LIBRARY_PATH for llama.cpp's tools alone")
    parser.add_argument("--pre-tokenizer", default="smollm", help="told to the peer's converter")
    parser.add_argument("--preset", default="Q4_K_M", help="for whole and speed")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="for the ladder")
    parser.add_argument("--imatrix", type=Path, help="llama-imatrix file for the ladder")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="turns of the speed part")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if not arguments.peer:
        parser.error("--peer: name the folder that benchmarks/build_llama_tools printed")
    tools = arguments.bin or arguments.peer / "build" / "bin"
    llama = Peer(arguments.peer / "vendor" / "llama.cpp", tools, arguments.peer_libraries, arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            PARTS[part](llama, arguments.model.resolve(), arguments, Path(folder))


if __name__ == "__main__":
    main()
