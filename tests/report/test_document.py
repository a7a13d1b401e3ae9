"""From a package to the document of its report, and the report in the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documents import HOSTILE, details
from making import make
from pages import Page

from edgepack.gguf.types import TYPES
from edgepack.package import verify
from edgepack.report.document import tensors


def test_types_of_both_formats_have_their_bits() -> None:
    found = tensors({"a": "Q4_K", "b": "F16", "c": "int4/32", "d": "int8/128", "e": "whatever", "f": "int4/0"})
    assert [(row["name"], row["bits"]) for row in found] == [("a", 4.5), ("b", 16), ("c", 4.5), ("d", 8.125)]
    assert tensors(dict.fromkeys(TYPES, "Q8_0"))[0]["bits"] == 8.5


def test_a_package_carries_its_report_and_the_details_that_are_shown_there(tmp_path: Path) -> None:
    found = details()
    package = make(tmp_path / "p", details=found)
    assert verify(package.path).problems == ()
    assert json.loads((package.path / "evidence/details.json").read_bytes()) == found
    page = Page((package.path / "evidence/report.html").read_text("utf-8"))
    assert page.sections() == {"bits", "spread", "worst"}
    for words in ("tiny-llama-5m for laptop", "example/tiny-llama-5m", "5.0 million", "Example CPU, 4 cores", "✓ pass"):
        assert words in page.text


def test_a_package_without_details_has_a_report_of_what_there_is(tmp_path: Path) -> None:
    package = make(tmp_path / "p", speed=None, recipe={"quantize": "dynamic-int8"})
    assert not (package.path / "evidence/details.json").exists()
    page = Page((package.path / "evidence/report.html").read_text("utf-8"))
    assert page.sections() == set()
    assert "… incomplete" in page.text and "not measured" in page.text


def test_more_pictures_can_be_given(tmp_path: Path) -> None:
    points = [{"label": "Q4_K_M", "kind": "preset", "bytes": 10, "mean_kld": 0.1}]
    package = make(tmp_path / "p", pictures={"points": points})
    assert "frontier" in Page((package.path / "evidence/report.html").read_text("utf-8")).sections()


def test_evidence_changes_nothing_of_the_artifacts_digest(tmp_path: Path) -> None:
    plain, detailed = make(tmp_path / "a"), make(tmp_path / "b", details=details())
    assert plain.artifact_digest == detailed.artifact_digest
    assert plain.package_digest != detailed.package_digest


@pytest.mark.parametrize("name", HOSTILE[:3])
def test_a_models_name_cant_write_into_its_report(name: str, tmp_path: Path) -> None:
    page = (make(tmp_path / "p", name=name).path / "evidence/report.html").read_text("utf-8")
    assert name not in page
    assert name in Page(page).text
    assert not {"script", "img"} & {tag for tag, _ in Page(page).elements}
