"""Fixtures shared by the tests: the example model, a store of the test run, one finished build."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from genai_packages import built

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "tiny-llama-5m"

# A shell's background jobs and nohup start with these ignored, and every child would inherit that: tests that send a
# signal to a build must find it heard.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def example() -> Path:
    """The example model: a trained 5M-parameter Llama."""
    return EXAMPLE


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the store of whoever runs the tests out of them."""
    folder = tmp_path_factory.mktemp("store")
    before = os.environ.get("EDGEPACK_CACHE")
    os.environ["EDGEPACK_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EDGEPACK_CACHE"]
    else:
        os.environ["EDGEPACK_CACHE"] = before


@pytest.fixture(scope="session")
def edgepack_command() -> Run:
    """Run the command line in a process of its own: `edgepack_command("build", ..., EDGEPACK_CACHE=...)`."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgepack.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)

    return run


@pytest.fixture
def copied_model(tmp_path: Path) -> Path:
    """A copy of the example model to spoil."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / EXAMPLE.name))


@pytest.fixture
def spoil_weights(copied_model: Path) -> Callable[[str, float], Path]:
    """Set the first weight of one tensor of the copied model (bfloat16) and give the model's folder."""

    def spoil(tensor: str, value: float) -> Path:
        path = copied_model / "model.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        begin = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
        data[begin : begin + 2] = (np.float32(value).view(np.uint32) >> 16).astype("<u2").tobytes()
        path.write_bytes(bytes(data))
        return copied_model

    return spoil


@pytest.fixture(scope="session")
def fp32_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model in float32 for onnxruntime-genai, made by its builder."""
    return built(EXAMPLE, "fp32", tmp_path_factory.mktemp("genai") / "fp32")


@pytest.fixture(scope="session")
def int4_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model in int4 for onnxruntime-genai, made by its builder."""
    return built(EXAMPLE, "int4", tmp_path_factory.mktemp("genai") / "int4")
