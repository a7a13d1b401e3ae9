"""Versions of all that shapes an artifact or a measurement: recorded in every package, part of every store key."""

from __future__ import annotations

import hashlib
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What a different version of may change bytes or numbers.
PACKAGES = ("llama-cpp-python", "numpy", "tokenizers", "transformers", "torch", "huggingface_hub", "jinja2")


@cache
def versions() -> dict[str, str | None]:
    """Versions of edgepack, Python and the packages edgepack works through; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("edgepack", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"platform": f"{sys.platform}-{platform.machine()}"}


@cache
def code_digest() -> str:
    """sha256 over edgepack's own source files: a store key with it can't hit a result that other code made."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
