"""What `doctor` says of a healthy machine and of one that lacks something."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from edgepack import doctor
from edgepack.errors import MissingError


def states() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine().checks}


def test_a_complete_installation_is_healthy_and_names_its_llama_cpp() -> None:
    report = doctor.examine()
    assert report.healthy, report.as_json()
    assert version("llama-cpp-python") in states()["llama.cpp runtime"].found


def test_a_runtime_that_does_not_load_is_missing_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise MissingError("llama-cpp-python can't be used: no such library", hint="pip install llama-cpp-python")

    monkeypatch.setattr(doctor, "_runtime", broken)
    report = doctor.examine()
    assert not report.healthy
    row = states()["llama.cpp runtime"]
    assert (row.state, row.advice) == ("missing", "pip install llama-cpp-python")


def test_a_store_that_can_not_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert states()["store"].state == "warn"
    assert "EDGEPACK_CACHE" in states()["store"].advice


def test_hub_code_that_could_be_fetched_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    assert states()["hub kernels"].state == "warn"
