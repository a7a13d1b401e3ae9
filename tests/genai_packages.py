"""Packages for onnxruntime-genai, made by its own builder in a process of its own (it changes `sys.path`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def built(model: Path, precision: str, folder: Path) -> Path:
    """`model` as a package of the builder's: `fp32`, `int8`, `int4`."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "--extra_options", "hf_token=false"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
