"""The command line: parse, call one library function, print. Exit codes are those of `errors.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgepack import console
from edgepack.command_options import listed, sized, with_calibration, with_text
from edgepack.errors import BudgetError, UsageError
from edgepack.exits import run

if TYPE_CHECKING:
    from edgepack.events import Listener
    from edgepack.heal.means import Method

DOCS = "Docs: https://github.com/edgepack/edgepack#readme"
Command = TypeVar("Command", bound=Callable[..., Any])


# Shared options, one decorator each.
_target = click.option(
    "-t", "--target", required=True, metavar="NAME|FILE", help="Built-in profile, or your own .toml."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one profile key, e.g. budget.disk_mb=500."
)
_format = click.option("--format", type=click.Choice(["gguf", "onnx"]), help="Instead of the profile's choice.")
_quantize = click.option("--quantize", metavar="NAME", help="A preset such as Q4_K_M, instead of the best that fits.")
_size = click.option("--size", metavar="SIZE", help="The best file of a size: 2.0GB, 600MiB, or plain bytes.")
_bpw = click.option("--bpw", type=click.FloatRange(min=0, min_open=True), help="The same, in bits per weight: 4.5.")
_calibration = click.option(
    "--calibration",
    metavar="FILE|FOLDER|hub:NAME",
    help="Text to calibrate on, or an importance matrix of llama-imatrix.  [default: the text that ships]",
)
_refine = click.option(
    "--refine", metavar="TOKENS", help="Then train the file's codes towards the source: 200k, 2M tokens (GGUF)."
)
_evaluation = click.option(
    "--evaluation", type=click.Path(path_type=Path), metavar="FILE", help="Text to measure fidelity on."
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="No steps, no progress.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="More about each step.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=DOCS)
@click.version_option(package_name="edgepack", message="edgepack %(version)s")
def cli() -> None:
    """From a Hugging Face model to a package a device can run and a release pipeline can trust.

    \b
      edgepack build ./my-model -t laptop
      edgepack build org/name@revision -t phone --quantize Q4_0

    Exit status: 0 done and within budget, 1 a step failed, 2 wrong usage or profile, 3 a budget is missed,
    4 a dependency or device is missing, 5 the input was refused.
    """


@cli.command(epilog=DOCS)
@click.argument("model")
@_target
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the package goes; must not exist.  [default: <name>-<target>]",
)
@_format
@_quantize
@_size
@_bpw
@_set
@_calibration
@_refine
@_evaluation
@click.option("--prune", "pruning", metavar="KEY=N,...", help="Leave parts out first: depth=2,ffn=1024.")
@click.option(
    "--heal", "healing", metavar="TOKENS", help="Then distil the original into what is left: 200k, 2M tokens."
)
@click.option("--data", metavar="FILE|FOLDER|hub:NAME", help="Text to heal on.  [default: the calibration text]")
@click.option(
    "--draft", is_flag=False, flag_value="", metavar="[KEY=N,...]", help="Try a draft model for speculative decoding."
)
@click.option("--auto", is_flag=True, help="Decide between bits, depth and width by trying the best few.")
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@_json
@_quiet
@_verbose
def build(
    model: str,
    target: str,
    output: Path | None,
    format: str | None,
    quantize: str | None,
    size: str | None,
    bpw: float | None,
    overrides: tuple[str, ...],
    calibration: str | None,
    refine: str | None,
    evaluation: Path | None,
    pruning: str | None,
    healing: str | None,
    data: str | None,
    draft: str | None,
    auto: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Shrink MODEL to fit a device, prove it, and package it.

    \b
      edgepack build ./my-model -t jetson -o dist/my-model-jetson

    MODEL is a Hugging Face folder, a hub id (org/name or org/name@revision), or a GGUF in F32, F16 or BF16.
    Exit status 3 means the package was built but misses the device's budget.
    """
    from edgepack import pipeline, render

    overrides, quantize = with_text(overrides, calibration, refine), sized(quantize, size, bpw)
    if dry_run and (auto or any(word is not None for word in (pruning, healing, draft))):
        hint = "Prune with `edgepack prune MODEL -o DIR`, then `edgepack plan DIR`."
        raise UsageError("--dry-run can't say what pruning would choose without doing it", hint=hint)
    if dry_run:
        plan = pipeline.plan(model, target, format=format, quantize=quantize, overrides=overrides)
        _show_plan(plan.as_json(), as_json)
        return
    with _steps(quiet, verbose) as listener:
        package = pipeline.build(
            model, target, output, format=format, quantize=quantize, overrides=overrides, evaluation=evaluation,
            prune=pruning, heal=healing, data=data, auto=auto, draft=draft, force=force,
            listener=listener,
        )  # fmt: skip
    status = pipeline.exit_status(package)
    if as_json:
        console.emit_json(render.package_json(package) | {"exit_code": status})
    else:
        render.show_package(package)
    raise SystemExit(status)


@cli.command(epilog=DOCS)
@click.argument("model")
@_target
@_format
@_quantize
@_size
@_bpw
@_set
@_calibration
@_refine
@_json
def plan(
    model: str,
    target: str,
    format: str | None,
    quantize: str | None,
    size: str | None,
    bpw: float | None,
    overrides: tuple[str, ...],
    calibration: str | None,
    refine: str | None,
    as_json: bool,
) -> None:
    """Say what build would do: size, memory and speed, before any work.

    \b
      edgepack plan ./my-model -t jetson
    """
    from edgepack import pipeline

    made = pipeline.plan(
        model,
        target,
        format=format,
        quantize=sized(quantize, size, bpw),
        overrides=with_text(overrides, calibration, refine),
    )
    _show_plan(made.as_json(), as_json)


@cli.command(epilog=DOCS)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--device", default="local", show_default=True, metavar="local|ssh://HOST", help="Where to measure.")
@click.option("--on-target", is_flag=True, help="This machine is the target: speed measured here counts.")
@click.option("--source", metavar="MODEL", help="The source model, if it is not where the package was built from.")
@_set
@_evaluation
@_json
@_quiet
@_verbose
def validate(
    package: Path,
    device: str,
    on_target: bool,
    source: str | None,
    overrides: tuple[str, ...],
    evaluation: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Measure PACKAGE again, here or on a device, and judge it against its target's budgets.

    \b
      edgepack validate dist/my-model-jetson --device ssh://jetson.local
    """
    from edgepack import pipeline, render

    with _steps(quiet, verbose) as listener:
        result = pipeline.validate(
            package, device=device, on_target=on_target, source=source, overrides=overrides, evaluation=evaluation,
            listener=listener,
        )  # fmt: skip
    status = result.exit_status
    if as_json:
        console.emit_json(result.as_json() | {"exit_code": status})
    else:
        render.show_validation(result)
    raise SystemExit(status)


@cli.command(epilog=DOCS)
@click.argument("package", type=click.Path(path_type=Path))
@_json
def verify(package: Path, as_json: bool) -> None:
    """Check that every byte of PACKAGE is what its manifest says. Needs nothing but the folder.

    \b
      edgepack verify dist/my-model-jetson
    """
    from edgepack.package import verify as check

    result = check(package)
    if as_json:
        document = {"package": package.name, "whole": not result.problems, "problems": list(result.problems)}
        error = result.error()
        console.emit_json(document | ({} if error is None else {"error": error.as_json()}))
    elif result.problems:
        for problem in result.problems:
            console.emit_note(f"edgepack: {console.one_line(problem)}")
    else:
        console.emit_text(f"{package}: whole, every file is what the manifest says")
    raise SystemExit(5 if result.problems else 0)


@cli.command(epilog=DOCS)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@_json
def inspect(path: Path, tensors: bool, as_json: bool) -> None:
    """Say what is in PATH: a checkpoint folder, a GGUF or ONNX file, or a package.

    \b
      edgepack inspect model.gguf
    """
    from edgepack import render
    from edgepack.inspect import inspect as look

    found = look(path, tensors=tensors)
    if as_json:
        console.emit_json(found)
    else:
        render.show_inspection(found)


@cli.command(epilog=DOCS)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@_evaluation
@click.option("--source", metavar="MODEL", help="Compare both with this full-precision model.")
@click.option("--windows", type=click.IntRange(min=1), default=40, show_default=True, help="Evaluation windows.")
@click.option("--no-speed", is_flag=True, help="Leave speed out.")
@_json
@_quiet
def compare(
    first: str,
    second: str,
    evaluation: Path | None,
    source: str | None,
    windows: int,
    no_speed: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Put two artifacts of one model side by side: size, fidelity, speed.

    \b
      edgepack compare a.gguf b.gguf --evaluation text.txt
    """
    from edgepack import pipeline, render

    with _steps(quiet, False) as listener:
        result = pipeline.compare(
            Path(first), Path(second), evaluation=evaluation, source=source, windows=windows, speed=not no_speed,
            listener=listener,
        )  # fmt: skip
    if as_json:
        console.emit_json(result)
    else:
        render.show_comparison(result)


@cli.command(epilog=DOCS)
@click.argument("model")
@_target
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where frontier.json and report.html go; must not exist.  [default: <name>-<target>-frontier]",
)
@click.option("--sizes", metavar="SIZE,...", help="For example 3bpw,4bpw,20MB.  [default: seven from 2.75 to 6.5 bpw]")
@click.option("--presets", metavar="NAME,...", help="Presets to measure beside them; none for none.  [default: five]")
@_set
@_calibration
@_evaluation
@_json
@_quiet
@_verbose
def frontier(
    model: str,
    target: str,
    output: Path | None,
    sizes: str | None,
    presets: str | None,
    overrides: tuple[str, ...],
    calibration: str | None,
    evaluation: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Draw the curve MODEL can be bought at: size against divergence, calibrated beside presets.

    \b
      edgepack frontier ./my-model -t laptop

    Every point is written and measured; nothing is kept but the numbers and a report to look at.
    """
    from edgepack import pipeline, render

    with _steps(quiet, verbose) as listener:
        folder, document = pipeline.frontier(
            model, target, output, sizes=listed(sizes), presets=None if presets is None else listed(presets),
            overrides=with_calibration(overrides, calibration), evaluation=evaluation, listener=listener,
        )  # fmt: skip
    if as_json:
        console.emit_json(document)
    else:
        render.show_frontier(document, folder)


@cli.command(epilog=DOCS)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="What to write.")
@click.option("--windows", type=click.IntRange(min=2), help="Windows of 512 tokens.  [default: by the model's size]")
@_calibration
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@_json
@_quiet
@_verbose
def imatrix(
    model: str,
    output: Path,
    windows: int | None,
    calibration: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Gather MODEL's importance matrix: a file that llama-quantize reads too.

    \b
      edgepack imatrix ./my-model -o imatrix.gguf
    """
    from edgepack import pipeline

    overrides = with_calibration((), calibration)
    overrides += (f"quantize.calibration_windows={windows}",) if windows else ()
    with _steps(quiet, verbose) as listener:
        written = pipeline.imatrix(model, output, overrides=overrides, force=force, listener=listener)
    if as_json:
        console.emit_json({"imatrix": str(written)})
    else:
        console.emit_text(f"imatrix: {written}")


@cli.command(epilog=DOCS)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Must not exist.")
@click.option("--depth", type=int, metavar="N", help="Drop N layers, chosen by --method.")
@click.option("--layers", metavar="N,...", help="Drop these layers, counted from 0.")
@click.option(
    "--method",
    type=click.Choice(["greedy", "influence", "angular"]),
    help="How layers are chosen.  [default: greedy, by KL divergence]",
)
@click.option("--ffn", type=int, metavar="WIDTH", help="Neurons that stay in every layer, a multiple of 256.")
@click.option("--kv-heads", type=int, metavar="N", help="Key-value heads that stay, with their query heads.")
@click.option("--vocabulary", multiple=True, metavar="FILE", help="Keep the tokens of this text; may be repeated.")
@click.option("--sparsity", metavar="PATTERN", help="wanda:0.5, magnitude:0.5 or 2:4; makes nothing smaller.")
@click.option("--refit", is_flag=True, help="Matrices that stay make up for what goes, by least squares on text.")
@click.option("--calibration", metavar="FILE|FOLDER|hub:NAME", help="Text to choose on.  [default: the one that ships]")
@click.option("--windows", type=click.IntRange(min=2), help="Windows of it.  [default: 16]")
@_evaluation
@_json
@_quiet
@_verbose
def prune(
    model: str,
    output: Path,
    depth: int | None,
    layers: str | None,
    method: str | None,
    ffn: int | None,
    kv_heads: int | None,
    vocabulary: tuple[str, ...],
    sparsity: str | None,
    refit: bool,
    calibration: str | None,
    windows: int | None,
    evaluation: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Leave out of MODEL what it can best do without; write a model folder.

    \b
      edgepack prune ./my-model -o pruned/ --depth 2

    The folder is one that transformers loads and `edgepack build` takes; what went and what it cost is in its
    edgepack-prune.json.
    """
    from edgepack import render
    from edgepack.prune import command
    from edgepack.prune.request import make

    request = make(
        depth=depth, layers=layers, method=method, ffn=ffn, kv_heads=kv_heads, vocabulary=vocabulary,
        sparsity=sparsity, refit=refit,
    )  # fmt: skip
    with _steps(quiet, verbose) as listener:
        folder, document = command.prune(
            model, output, request, calibration=calibration, evaluation=evaluation,
            windows=windows or command.WINDOWS, listener=listener,
        )  # fmt: skip
    if as_json:
        console.emit_json({"path": str(folder)} | document)
    else:
        render.show_pruning(document, folder)


@cli.command(epilog=DOCS)
@click.argument("model")
@click.option("--teacher", required=True, metavar="MODEL", help="The model it was made from.")
@click.option("--tokens", required=True, metavar="N", help="To train on: 200k, 2M.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Must not exist.")
@click.option("--data", "calibration", metavar="FILE|FOLDER|hub:NAME", help="Text to train on.  [default: what ships]")
@click.option(
    "--method",
    type=click.Choice(["auto", "full", "lora"]),
    default="auto",
    show_default=True,
    help="All weights, or low-rank adapters that are merged; auto: the best that fits in memory.",
)
@click.option("--rank", type=click.IntRange(16, 64), default=32, show_default=True, help="Of adapters.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Peak.  [default: by width]")
@click.option(
    "--hidden-weight",
    type=click.FloatRange(min=0, min_open=True),
    help="Also pull hidden states towards the teacher's, by a loss of this weight.",
)
@_evaluation
@_json
@_quiet
@_verbose
def heal(
    model: str,
    teacher: str,
    tokens: str,
    output: Path,
    calibration: str | None,
    method: Method,
    rank: int,
    learning_rate: float | None,
    hidden_weight: float | None,
    evaluation: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Repair a pruned MODEL by distilling its original into it; write a model folder.

    \b
      edgepack heal pruned/ --teacher ./my-model -o healed/ --tokens 2M

    What scored best on held-out text is kept, the start included. Killed at any time, the same command goes on.
    """
    from edgepack.heal import command

    options = command.Options(calibration, learning_rate, method, rank, hidden_weight)
    with _steps(quiet, verbose) as listener:
        folder, document = command.heal(
            model, teacher, output, tokens, options=options, evaluation=evaluation, listener=listener
        )
    if as_json:
        console.emit_json({"path": str(folder)} | document)
    else:
        console.emit_text(f"{command.in_words(document)}\nmodel:   {folder}")


@cli.group(epilog=DOCS)
def targets() -> None:
    """List the device profiles, show one, or copy one to edit."""


@targets.command("list")
@_json
def targets_list(as_json: bool) -> None:
    """List the built-in profiles."""
    from edgepack import render
    from edgepack.targets import list_targets

    render.show_targets(list_targets(), as_json=as_json)


@targets.command("show")
@click.argument("name")
@_json
def targets_show(name: str, as_json: bool) -> None:
    """Print a profile as TOML."""
    from edgepack.targets import load_target

    target = load_target(name)
    if as_json:
        console.emit_json({"name": target.name, "toml": target.text})
    else:
        console.emit_text(target.text)


@targets.command("copy")
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@_json
def targets_copy(name: str, destination: Path, as_json: bool) -> None:
    """Copy a profile to DESTINATION, for you to edit and pass to -t."""
    from edgepack.targets import copy_target

    written = copy_target(name, destination)
    if as_json:
        console.emit_json({"path": str(written)})
    else:
        console.emit_text(f"{written}\nUse it with: edgepack build MODEL -t {written}")


@cli.command(epilog=DOCS)
@_json
def doctor(as_json: bool) -> None:
    """Say what is installed and which runtimes answer."""
    from edgepack import render
    from edgepack.doctor import examine

    report = examine()
    if as_json:
        console.emit_json(report.as_json())
    else:
        render.show_doctor(report)
    raise SystemExit(0 if report.healthy else 4)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: the entry point of the `edgepack` script."""
    raise SystemExit(run(cli, list(sys.argv[1:] if argv is None else argv)))


@contextmanager
def _steps(quiet: bool, verbose: bool) -> Iterator[Listener]:
    printer = console.StepPrinter(quiet=quiet, verbose=verbose)
    try:
        yield printer
    finally:
        printer.close()


def _show_plan(document: dict[str, Any], as_json: bool) -> None:
    from edgepack import render

    if as_json:
        console.emit_json(document)
    else:
        render.show_plan(document)
    if not document["feasible"]:
        raise SystemExit(BudgetError.exit_code)


if __name__ == "__main__":
    main()
