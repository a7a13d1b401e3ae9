"""The package: a folder a device can run and a pipeline can check, written once and readable for ever.

    <name>-<target>/
      edgepack.json       the manifest: what this is, from what and how, every file with its sha256, digests, verdict
      model/              the artifact; a draft model for speculative decoding in model/draft/
      tokenizer/          only for formats that do not embed it
      runtime.json        engine, oldest version, load options
      Modelfile           for Ollama
      evidence/           validation.json (every check and measurement), plan.json, samples.jsonl, details.json (where
                          artifact and source part), report.html (all of it as pictures)
      README.md           the model card
      LICENSES/           the source's licence texts, and what is known of them
      SHA256SUMS          every file but itself; `sha256sum -c SHA256SUMS` works without edgepack

`write_package` makes one, `read_package` opens one, `verify` says whether every byte is as its manifest says. Reading
and verifying need the standard library alone.
"""

from __future__ import annotations

from edgepack.package.layout import safe_name
from edgepack.package.manifest import Package, packaged_target, read_package
from edgepack.package.verify import Verification, verify
from edgepack.package.write import write_package

__all__ = ["Package", "Verification", "packaged_target", "read_package", "safe_name", "verify", "write_package"]
