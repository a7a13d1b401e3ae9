"""The wheel: what a user installs holds everything the checkout has at run time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_every_profile_and_the_texts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"edgepack/_targets/{path.name}" for path in (ROOT / "targets").glob("*.toml")} <= names
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "edgepack" / "_data").rglob("*") if path.is_file()}
    assert data and data <= names
    assert "edgepack/py.typed" in names
    assert not {name for name in names if name.startswith(("tests/", "examples/", "benchmarks/"))}


def test_an_unpacked_wheel_finds_its_profiles_and_text_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import edgepack, edgepack.text, edgepack.targets; print(edgepack.__file__); "
        "print(edgepack.load_target('jetson').name, edgepack.text.default_evaluation_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    where, found = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert found.startswith(f"jetson {tmp_path}")
