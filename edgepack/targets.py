"""Target profiles: one TOML file per device, read strictly into a frozen `Target`.

A profile holds facts of a device (each with its source), how its runtime is set up, what may be quantized how, and the
budgets a package is held to. Flat, no inheritance: copy one and edit it. Knows nothing of models and measures nothing.
The keys are in target_keys.py, the checks in target_checks.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgepack.errors import ProfileError, UsageError
from edgepack.target_checks import apply_override, check
from edgepack.target_keys import (
    LIMITS,
    TABLES,
    Budget,
    Delivery,
    Device,
    Format,
    Limit,
    Measure,
    Onnx,
    Quantize,
    Runtime,
)
from edgepack.toml_schema import Problems, keys_of, nearest, parse, read_text, show_name

__all__ = [
    "Budget",
    "Delivery",
    "Device",
    "Format",
    "Measure",
    "Quantize",
    "Runtime",
    "Target",
    "copy_target",
    "list_targets",
    "load_target",
    "parse_target",
    "with_overrides",
]

FIRST = ("laptop", "jetson", "phone")  # what everyone tries first; listed first


@dataclass(frozen=True, kw_only=True)
class Target:
    """A profile, checked, with any overrides applied.

    Args:
        name: Last part of a package's name.
        text: The profile's own text, whole, as it goes into the manifest; `overrides` are not in it.
        overrides: The `key=value` pairs applied on top, in order.
        origin: `built-in`, or the path the profile was read from.
    """

    name: str
    description: str
    date: str
    aliases: tuple[str, ...]
    device: Device
    format: Format
    runtime: Runtime
    quantize: Quantize
    budget: Budget
    measure: Measure
    delivery: Delivery
    onnx: Onnx
    sources: Mapping[str, str]
    text: str
    overrides: tuple[str, ...] = ()
    origin: str = "built-in"

    def limits(self) -> Mapping[str, Mapping[str, float]]:
        """The budgets by measurement: `{"artifact_bytes": {"max": 9e9}, "decode_tokens_per_s_p10": {"min": 3.0}}`.

        `disk_mb` limits `artifact_bytes` (x 10^6), `ram_mb` limits `peak_rss_mb`; every other key has the name of its
        measurement. Budgets the profile does not set are absent: they are not gated.
        """
        limits: dict[str, dict[str, float]] = {}
        for name in keys_of(Budget):
            value = getattr(self.budget, name)
            if name != "require_on_device" and value is not None:
                limit = LIMITS.get(name, Limit(name, "max"))
                limits[limit.measurement] = {limit.side: value * limit.factor}
        return limits

    def as_json(self) -> dict[str, Any]:
        """Every effective value, overrides applied; unset keys are null. Holds no path."""
        tables = {name: asdict(getattr(self, name)) for name in TABLES}
        return {"name": self.name, "date": self.date, "overrides": list(self.overrides), **tables}


def load_target(name_or_path: str) -> Target:
    """Load a profile: an argument that ends in `.toml` is a path, anything else a built-in name or alias.

    Args:
        name_or_path: `jetson`, `jetson-orin-nano`, `./my-board.toml`.

    Returns:
        The checked profile.

    Raises:
        ProfileError: No such profile (the nearest names are given), or one that is not valid (every problem is named).
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        return parse_target(read_text(path), str(path), origin=str(path), folder=path.parent)
    names = _built_in_names()
    if name_or_path in names:
        return _built_in(name_or_path)
    targets = [_built_in(name) for name in names]
    for target in targets:
        if name_or_path in target.aliases:
            return target
    every = [*names, *(alias for target in targets for alias in target.aliases)]
    near = nearest(name_or_path, every)
    raise ProfileError(
        f"no target called {show_name(name_or_path)}" + (f"; did you mean {near!r}?" if near else ""),
        hint=f"Built-in: {', '.join(names)}. The name of a file of your own ends in .toml.",
    )


def list_targets() -> list[Target]:
    """Every built-in profile: `laptop`, `jetson`, `phone`, then the devices by name."""
    return [_built_in(name) for name in _built_in_names()]


def copy_target(name: str, destination: str | Path) -> Path:
    """Write a profile to a file of the user's own, to be edited.

    The copy is called after its file (`my-board.toml` is the target `my-board`) and has no aliases, so that a package
    built for an edited profile does not carry the name of the built-in one.

    Args:
        name: A built-in name, an alias, or a path.
        destination: A path ending in `.toml`, or an existing folder (then `<name>.toml` in it).

    Returns:
        The path written.

    Raises:
        ProfileError: No such profile.
        UsageError: The destination exists, does not end in `.toml`, or can't be written.
    """
    target = load_target(name)
    path = Path(destination)
    if path.is_dir():
        path = path / f"{target.name}.toml"
    if path.suffix != ".toml":
        raise UsageError(f"{path}: the name of a profile ends in .toml", hint=f"For example {path.name}.toml")
    text = _renamed(target.text, path.stem)
    parse_target(text, str(path))
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists", hint="Choose another name; a profile is never overwritten.") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be written: {error.strerror}") from None
    return path


def with_overrides(target: Target, pairs: Sequence[str]) -> Target:
    """Set keys of a profile, checked as strictly as the file itself.

    Args:
        target: The profile; earlier overrides stay in force.
        pairs: `table.key=value`, for example `budget.disk_mb=500`, `quantize.candidates=Q8_0,Q4_0`,
            `quantize.tensors.blk.*.ffn_down.weight=Q6_K` (everything between `quantize.tensors.` and the last `=` is
            the pattern). `none` takes an optional key away: `budget.mean_kld=none` is no longer gated. The last of two
            pairs for one key wins.

    Returns:
        A new target; `text` is unchanged, `overrides` has the pairs added.

    Raises:
        ProfileError: A pair that is not valid; all of them are named.
    """
    if not pairs:
        return target
    folder = None if target.origin == "built-in" else Path(target.origin).parent
    return parse_target(
        target.text, "--set", origin=target.origin, folder=folder, overrides=(*target.overrides, *pairs)
    )


def parse_target(
    text: str, where: str, *, origin: str = "built-in", folder: Path | None = None, overrides: Sequence[str] = ()
) -> Target:
    """Check the text of a profile and build the `Target`.

    Args:
        text: The TOML text.
        where: Named in front of every problem: a path, or `--set`.
        origin: `built-in` or the file's path.
        folder: Where relative paths in the file start; None leaves them as they are.
        overrides: `table.key=value` pairs applied before checking.

    Raises:
        ProfileError: Every problem of the text and of the overrides.
    """
    document = parse(text, where)
    problems = Problems(where)
    for pair in overrides:
        apply_override(document, pair, problems)
    problems.raise_if_any(hint=_SET_HINT)
    tables = check(document, problems)
    problems.raise_if_any(hint=_SET_HINT if overrides else "docs/targets.md lists every key with its unit.")
    for name in ("imatrix", "calibration"):
        path = tables["quantize"].get(name)
        if path and folder is not None and not any(pair.startswith(f"quantize.{name}=") for pair in overrides):
            tables["quantize"][name] = str(folder / path)
    return Target(
        name=document["name"],
        description=document["description"],
        date=document["date"],
        aliases=tuple(document.get("aliases", [])),
        **{name: table(**tables[name]) for name, table in TABLES.items()},
        sources=dict(document["sources"]),
        text=text,
        overrides=tuple(overrides),
        origin=origin,
    )


_SET_HINT = "--set takes table.key=value, for example --set budget.disk_mb=500."


def _folder() -> Path:
    """The built-in profiles: `edgepack/_targets` in a wheel, the checkout's `targets/` otherwise."""
    package = Path(str(resources.files("edgepack")))
    shipped = package / "_targets"
    return shipped if shipped.is_dir() else package.parent / "targets"


def _built_in_names() -> list[str]:
    names = sorted(path.stem for path in _folder().glob("*.toml"))
    return [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]


def _built_in(name: str) -> Target:
    path = _folder() / f"{name}.toml"
    return parse_target(read_text(path), f"built-in target {name}")


def _renamed(text: str, name: str) -> str:
    """The profile under another name: only the lines `name = ...` and `aliases = ...` of its top are changed."""
    top, bracket, rest = text.partition("\n[")
    top = re.sub(r"(?m)^name *=.*$", f'name = "{name}"', top, count=1)
    top = re.sub(r"(?m)^aliases *= *\[[^\]]*\]\n?", "", top, count=1)
    return top + bracket + rest
