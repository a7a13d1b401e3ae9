"""edgepack: from a Hugging Face model to a package a device can run and a release pipeline can trust.

    package = edgepack.build("my-model", target="jetson", output="dist/my-model-jetson")
    package.verdict                       # "pass", "fail" or "incomplete"
    edgepack.verify(package.path)         # every byte as the manifest says

`plan` says what `build` would do, `validate` measures a package again, `load_target` reads a device profile. Everything
heavy is imported when it is first needed: `import edgepack` costs milliseconds.
"""

from __future__ import annotations

from edgepack.errors import EdgepackError
from edgepack.package import Package, verify
from edgepack.pipeline import build, plan, validate
from edgepack.targets import load_target

__all__ = ["EdgepackError", "Package", "build", "load_target", "plan", "validate", "verify"]
