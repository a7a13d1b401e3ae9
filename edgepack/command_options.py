"""Options of the command line that say what others say too, brought into one form."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from edgepack.errors import UsageError


def listed(text: str | None) -> list[str]:
    """Parts between commas; none of `none`."""
    return [part.strip() for part in (text or "").split(",") if part.strip() and part.strip() != "none"]


def with_calibration(overrides: tuple[str, ...], calibration: str | None) -> tuple[str, ...]:
    """`--calibration` as an override: an importance matrix (GGUF) or a text, told apart by the first bytes."""
    if calibration is None:
        return overrides
    path = Path(calibration)
    if not path.is_file():
        return (*overrides, f"quantize.calibration={calibration}")
    with path.open("rb") as file:
        name = "imatrix" if file.read(4) == b"GGUF" else "calibration"
    return (*overrides, f"quantize.{name}={calibration}")


def with_text(overrides: tuple[str, ...], calibration: str | None, refine: str | None) -> tuple[str, ...]:
    """`--calibration` and `--refine` as overrides."""
    from edgepack.heal.budget import parse_tokens

    overrides = with_calibration(overrides, calibration)
    return overrides if refine is None else (*overrides, f"quantize.refine={parse_tokens(refine, '--refine')}")


def sized(quantize: str | None, size: str | None, bpw: float | None) -> str | None:
    """`--size` and `--bpw` are other ways to say what to quantize to."""
    given = [name for name, value in (("--quantize", quantize), ("--size", size), ("--bpw", bpw)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} say different things of one file", hint="Give one of them.")
    if size is None and bpw is None:
        return quantize
    from edgepack.gguf.size import parse_size

    if size is None:
        return parse_size(f"{Decimal(str(bpw)):f}bpw").name
    asked = parse_size(size)
    if asked.total_bytes is None:
        raise UsageError(f"--size {size}: expected bytes, such as 2.0GB", hint=f"Say --bpw {asked.bits_per_weight:g}.")
    return asked.name
