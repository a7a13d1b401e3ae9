"""Runs a plan: every step in a worker process, its result in the store, the proof in the package.

    source -> plan -> export -> conform -> fidelity -> latency -> package

Knows no framework: what a step does stands in the step's own module, this one orders steps, keeps their results, and
judges. A step whose inputs, code and toolchain are those of a stored result is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import UsageError
from edgepack.events import Event, Listener, silent, step
from edgepack.measurement import Measurement, PackageVerdict

if TYPE_CHECKING:
    from edgepack.package import Package
    from edgepack.planning import Plan
    from edgepack.source import Source
    from edgepack.targets import Target


def plan(
    model: str | Path,
    target: str | Target,
    *,
    format: str | None = None,
    quantize: str | None = None,
    overrides: Sequence[str] = (),
    listener: Listener = silent,
) -> Plan:
    """Say what `build` would do, before any work.

    Args:
        model: Hugging Face folder, hub id (`org/name@revision`), or a GGUF in F32, F16 or BF16.
        target: Built-in profile name, path of a `.toml`, or a loaded target.
        format: `gguf`; None takes the profile's choice.
        quantize: Preset such as `Q4_K_M`; None lets the plan pick the best that fits the budgets.
        overrides: `key=value` pairs as on the command line.
        listener: Told about a download.

    Returns:
        The plan; `plan.chosen.misses` is empty when every predictable budget is met.

    Raises:
        BudgetError: No candidate of the profile meets the budgets.
        InputRefused: The model is unsafe, malformed or not supported.
        ProfileError: The profile or an override is not valid.
    """
    from edgepack.planning import make_plan

    resolved = _target(target, overrides)
    return make_plan(_resolve(model, listener), resolved, format=format, quantize=quantize)


def build(
    model: str | Path,
    target: str | Target,
    output: str | Path | None = None,
    *,
    format: str | None = None,
    quantize: str | None = None,
    overrides: Sequence[str] = (),
    evaluation: str | Path | None = None,
    prune: str | None = None,
    heal: str | None = None,
    data: str | None = None,
    auto: bool = False,
    draft: str | None = None,
    force: bool = False,
    listener: Listener = silent,
) -> Package:
    """Build a verified package of `model` for `target`.

    Args:
        model: Hugging Face folder, hub id (`org/name@revision`), or a GGUF in F32, F16 or BF16.
        target: Built-in profile name, path of a `.toml`, or a loaded target.
        output: Package folder; None makes `<name>-<target>` in the working directory.
        format: `gguf`; None takes the profile's choice.
        quantize: Preset such as `Q4_K_M`; None lets the plan pick the best that fits the budgets.
        overrides: `key=value` pairs as on the command line.
        evaluation: UTF-8 text to measure fidelity on; None takes the text that ships with edgepack.
        prune: What to leave out first, such as `depth=2,ffn=1024`; see `edgepack.prune.request.parse`. Fidelity is
            then measured against the model before it.
        heal: Tokens to heal what is left on, such as `2M`; None does not heal.
        data: Text to heal on: a file, a folder, `hub:NAME`; None takes the calibration text.
        auto: Decide between fewer bits, fewer layers and narrower ones by what meets the budgets and stays closest to
            the source, tried and measured; see `edgepack/auto`. `heal` is then what the winner is healed on; None
            takes what half an hour of this machine manages.
        draft: A draft model to try for speculative decoding, such as `depth=4,heal=200k`; see
            `edgepack.draft_request.parse`. It is in the package only where it pays.
        force: Replace `output` if it exists.
        listener: Told about steps and progress.

    Returns:
        The package. Its verdict may be `fail` or `incomplete`: see `exit_status`.

    Raises:
        UsageError: `output` exists and `force` is not set, or an argument is wrong.
        BudgetError: The budgets can't be met; nothing was done.
        InputRefused: The model was refused.
        ConformanceError: The artifact differs from its source in token ids, chat rendering or logits.
        StepError: A step failed; finished steps are kept in the store.
    """
    from edgepack import preparing
    from edgepack.auto.build import decided
    from edgepack.auto.trials import refuse_unsuited
    from edgepack.building import Build
    from edgepack.draft_request import parse as parse_draft
    from edgepack.drafting import refuse_early as refuse_draft
    from edgepack.planning import format_of, make_plan
    from edgepack.publish import check_output
    from edgepack.store import Store
    from edgepack.text import named_evaluation_text
    from edgepack.workshop import Workshop, physical_cores

    resolved = _target(target, overrides)
    destination = Path(output) if output is not None else None
    if destination is not None:
        check_output(destination, force=force)
    text = named_evaluation_text(evaluation)
    wish = preparing.parse(prune, heal, data, auto=auto)
    wanted = None if draft is None else parse_draft(draft)
    source = _resolve(model, listener)
    if wanted is not None:
        refuse_draft(source, wanted, format or format_of(source, resolved))
    if destination is None:
        destination = Path(f"{source.name}-{resolved.name}")
        check_output(destination, force=force)
    shop = Workshop(Store(), listener, physical_cores(), evaluation=text)  # holds its entries until the end
    if auto:
        refuse_unsuited(source, resolved, format or format_of(source, resolved))  # before gigabytes are hashed
        hashed = _hash(source, listener)
        prepared, made = decided(shop, hashed, resolved, wish, text, quantize=quantize)
    elif wish.prune is not None:
        calibration = resolved.quantize.calibration
        prepared = preparing.prepare(shop, _hash(source, listener), wish, calibration=calibration, evaluation=text)
        made = make_plan(prepared.source, resolved, format=format, quantize=quantize)
    else:
        made = make_plan(source, resolved, format=format, quantize=quantize)
        prepared = None
    listener(Event("note", "plan", _plan_in_words(made)))
    prepared = prepared or preparing.untouched(_hash(source, listener))
    return Build(prepared, made, text, listener, draft=wanted).run(destination, force=force)


@dataclass(frozen=True)
class Validation:
    """A fresh measurement of a package.

    Args:
        package: The package's folder name.
        verdict: Against the budgets of the package's target.
        measurements: Every row, judged.
        measured_on: Facts of the machine or device.
        require_on_device: The profile's wish that an unmeasured budget counts as a miss.
    """

    package: str
    verdict: PackageVerdict
    measurements: tuple[Measurement, ...]
    measured_on: Mapping[str, Any]
    require_on_device: bool

    @property
    def exit_status(self) -> int:
        """0 or 3, as for a build."""
        return _status(self.verdict, self.require_on_device)

    def as_json(self) -> dict[str, Any]:
        """The document of `edgepack validate --json`; the form of `evidence/validation.json`."""
        return {
            "package": self.package,
            "verdict": self.verdict,
            "measured_on": dict(self.measured_on),
            "measurements": [row.as_json() for row in self.measurements],
        }


def validate(
    package: str | Path,
    *,
    device: str = "local",
    on_target: bool = False,
    source: str | None = None,
    overrides: Sequence[str] = (),
    evaluation: str | Path | None = None,
    listener: Listener = silent,
) -> Validation:
    """Verify a package, measure it again, and judge it against the target it carries.

    Args:
        package: Package folder.
        device: `local`, or `ssh://[user@]host[:port]` for a board that has edgepack installed.
        on_target: This machine is the target: speed and memory measured here count.
        source: The source model for the fidelity rows; None looks where the package was built from.
        overrides: `key=value` pairs on the package's own profile, for example `measure.windows=20`.
        evaluation: Text for the fidelity rows; None takes the text that ships with edgepack.
        listener: Told about steps and progress.

    Returns:
        Rows and verdict. The package itself is not touched.

    Raises:
        InputRefused: The package is not whole, or the source is not the one it was built from.
        MissingError: The device does not answer.
    """
    from edgepack.text import named_evaluation_text
    from edgepack.validation import validate_package

    return validate_package(
        Path(package),
        device=device,
        on_target=on_target,
        source=source,
        overrides=overrides,
        text=named_evaluation_text(evaluation),
        listener=listener,
    )


def compare(
    first: Path,
    second: Path,
    *,
    evaluation: str | Path | None = None,
    source: str | None = None,
    windows: int = 40,
    speed: bool = True,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Put two artifacts of one model side by side; see `edgepack.compare`."""
    from edgepack import compare as comparison
    from edgepack.text import named_evaluation_text

    return comparison.compare(
        first,
        second,
        text=named_evaluation_text(evaluation),
        source=source,
        windows=windows,
        speed=speed,
        listener=listener,
    )


def frontier(
    model: str | Path,
    target: str | Target,
    output: str | Path | None = None,
    *,
    sizes: Sequence[str] = (),
    presets: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    evaluation: str | Path | None = None,
    listener: Listener = silent,
) -> tuple[Path, dict[str, Any]]:
    """Measure files of several sizes of one model, and presets beside them; see `edgepack.frontier`.

    Args:
        model: Hugging Face folder or hub id.
        target: Built-in profile name, path of a `.toml`, or a loaded target.
        output: Folder for frontier.json and report.html; None makes `<name>-<target>-frontier` here.
        sizes: `4.5bpw`, `20MB`, ...; none takes a spread of seven.
        presets: Names; None takes five, an empty list none.
        overrides: `key=value` pairs as on the command line.
        evaluation: UTF-8 text to measure on; None takes the text that ships with edgepack.
        listener: Told about steps and progress.

    Returns:
        The folder, and the document of frontier.json.

    Raises:
        UsageError: `output` exists, or the model can't be calibrated.
        BudgetError: A size is smaller than the model can be.
        StepError: A step failed; finished ones are kept in the store.
    """
    from edgepack import frontier as curve
    from edgepack.publish import check_output, publish
    from edgepack.text import named_evaluation_text

    resolved = _target(target, overrides)
    text = named_evaluation_text(evaluation)
    if output is not None:
        check_output(Path(output), force=False)
    source = _resolve(model, listener)
    destination = Path(output) if output is not None else Path(f"{source.name}-{resolved.name}-frontier")
    check_output(destination, force=False)
    chosen = curve.PRESETS if presets is None else presets
    document = curve.measure(_hash(source, listener), resolved, text, sizes=sizes, presets=chosen, listener=listener)
    return publish(lambda folder: curve.write(folder, document), destination), document


def imatrix(
    model: str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    listener: Listener = silent,
) -> Path:
    """Gather an importance matrix and write it as llama-imatrix does.

    Args:
        model: Hugging Face folder or hub id of a language model.
        output: The file.
        overrides: `quantize.calibration=...` and `quantize.calibration_windows=...`.
        force: Replace `output` if it exists.
        listener: Told about steps and progress.

    Returns:
        The absolute path of `output`.

    Raises:
        UsageError: `output` exists and `force` is not set, or the model can't be calibrated.
        InputRefused: The model or the text was refused.
        StepError: The model can't be run.
    """
    from edgepack.files import write_atomic
    from edgepack.gguf import calibrated
    from edgepack.gguf.model import describe
    from edgepack.store import Store
    from edgepack.workshop import Workshop, physical_cores

    destination = Path(output).absolute()
    if destination.exists() and not force:
        raise UsageError(f"{destination} exists", hint="Choose another name, or replace it with --force.")
    target = _target("laptop", overrides)  # of the profile only the calibration keys are read
    source = _hash(_resolve(model, listener), listener)
    if reason := calibrated.obstacle(describe(source.path), source, target):
        raise UsageError(f"{source.name} can't be calibrated: {reason}", hint="llama-imatrix takes a GGUF.")
    entry = calibrated.calibrate(Workshop(Store(), listener, physical_cores()), source, target)
    write_atomic(destination, (entry.path / "imatrix.gguf").read_bytes())
    return destination


def exit_status(package: Package) -> int:
    """0 when the package is within budget, 3 when it is not, as the contract of `build` says."""
    require = bool(package.manifest.get("require_on_device", False))
    return _status(package.verdict, require)


def _status(verdict: PackageVerdict, require_on_device: bool) -> int:
    return 3 if verdict == "fail" or (verdict == "incomplete" and require_on_device) else 0


def _target(target: str | Target, overrides: Sequence[str]) -> Target:
    from edgepack.targets import load_target, with_overrides

    loaded = load_target(target) if isinstance(target, str) else target
    return with_overrides(loaded, overrides) if overrides else loaded


def _resolve(model: str | Path, listener: Listener) -> Source:
    from edgepack.source import resolve

    with step(listener, "source", str(model), unit="bytes") as handle:
        source = resolve(str(model), handle.progress)
        handle.outcome = source.name + (f" at {source.commit[:12]}" if source.commit else "")
    return source


def _hash(source: Source, listener: Listener) -> Source:
    from edgepack.source import hash_source

    with step(listener, "hash", source.name, unit="bytes") as handle:
        hashed = hash_source(source, handle.progress)
        handle.outcome = f"{len(hashed.files)} file{'' if len(hashed.files) == 1 else 's'}"
    return hashed


def _plan_in_words(made: Plan) -> str:
    prediction = made.prediction
    about = "" if prediction.exact else "about "
    size = f"{about}{prediction.artifact_bytes / 1e6:,.1f} MB, about {prediction.ram_mb:,.0f} MB of memory"
    words = f"{made.quantize} ({made.chosen_by}), {size}"
    misses = "; ".join(miss.sentence() for miss in made.chosen.misses)
    return words + (f"; will miss: {misses}" if misses else "")
