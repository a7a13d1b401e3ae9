"""Artifacts that the runtime tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import exported, random_bert


@pytest.fixture(scope="session")
def f32(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model in float32."""
    return exported(example, "F32", tmp_path_factory.mktemp("f32"))


@pytest.fixture(scope="session")
def q4(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model in Q4_K_M."""
    return exported(example, "Q4_K_M", tmp_path_factory.mktemp("q4"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random embedder, as a Hugging Face folder."""
    return random_bert(tmp_path_factory.mktemp("bert"))
