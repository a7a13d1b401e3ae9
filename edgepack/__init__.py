"""edgepack: from a Hugging Face model to a package a device can run and a release pipeline can trust.

    package = edgepack.build("my-model", target="jetson", output="dist/my-model-jetson")
    package.verdict                       # "pass", "fail" or "incomplete"
    edgepack.verify(package.path)         # every byte as the manifest says

`plan` says what `build` would do, `validate` measures a package again, `load_target` reads a device profile. Names are
imported when they are first used (PEP 562): `import edgepack` costs next to nothing, in a worker process too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepack.errors import EdgepackError
    from edgepack.package import Package
    from edgepack.package.verify import verify
    from edgepack.pipeline import build, plan, validate
    from edgepack.targets import load_target

__all__ = ["EdgepackError", "Package", "build", "load_target", "plan", "validate", "verify"]

# No module of the package may have one of these names: importing it would put it in the function's place.
_HOME = {
    "EdgepackError": "edgepack.errors",
    "Package": "edgepack.package",
    "build": "edgepack.pipeline",
    "load_target": "edgepack.targets",
    "plan": "edgepack.pipeline",
    "validate": "edgepack.pipeline",
    "verify": "edgepack.package",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgepack' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
