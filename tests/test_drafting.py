"""A draft of the example model from end to end, and the refusals that come before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from artifacts import random_bert

import edgepack
from edgepack import drafting
from edgepack.draft_request import parse
from edgepack.drafting import Drafted, drafted, refuse_early
from edgepack.errors import InputRefused, UsageError
from edgepack.events import silent
from edgepack.measure.draft_worth import Worth
from edgepack.package.layout import DRAFT_FOLDER
from edgepack.planning import Plan, load_backend, make_plan
from edgepack.source import Source, hash_source, resolve
from edgepack.store import Store
from edgepack.targets import load_target, with_overrides
from edgepack.text import default_evaluation_text
from edgepack.workshop import Exported, Workshop

# Named layers: nothing has to be scored. No healing and one length: what those cost is tested where they are made.
REQUEST = parse("layers=1+2+4,heal=none,length=2")
TEXT = default_evaluation_text()


@pytest.fixture(scope="module")
def shop(own_store: Path) -> Iterator[Workshop]:
    """A workshop in which little is measured."""
    with pytest.MonkeyPatch.context() as patch:
        for place, number in (("prune.command.WINDOWS", 2), ("prune.command.EVALUATION_WINDOWS", 2)):
            patch.setattr(f"edgepack.{place}", number)
        patch.setattr(drafting, "PROMPTS", 4)
        yield Workshop(Store(), silent, 1, evaluation=TEXT)


@pytest.fixture(scope="module")
def source(example: Path) -> Source:
    return hash_source(resolve(str(example)))


def planned(source: Source, target: str, *overrides: str) -> Plan:
    return make_plan(source, with_overrides(load_target(target), overrides), quantize="Q4_K_M")


@pytest.fixture(scope="module")
def exported(shop: Workshop, source: Source) -> Exported:
    return load_backend("gguf").export(shop, source, planned(source, "laptop"), "artifact")


@pytest.fixture(scope="module")
def here(shop: Workshop, source: Source, exported: Exported) -> Drafted:
    """On the machine that is the target."""
    return drafted(shop, source, exported, planned(source, "laptop"), REQUEST, TEXT)


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that no model of this size earns."""
    monkeypatch.setattr(drafting, "judge", lambda *_: Worth(True, "measured", "worth it: said the test"))


def test_a_draft_of_a_tiny_model_is_not_worth_it_and_stays_out(here: Drafted) -> None:
    assert here.record["worth_it"] is False
    assert here.record["reason"].startswith("not worth it: 0.")
    assert here.exported is None
    assert here.runtime == {}
    assert here.known_sha256 == {}


def test_the_record_says_how_it_was_made_and_what_was_measured(here: Drafted, source: Source) -> None:
    record = here.record
    assert record["prune"]["kept_layers"] == [0, 3, 5]
    assert record["request"] == {"heal": 0, "quantize": "Q4_0", "length": 2}
    assert "heal" not in record
    assert record["measured"]["length"] == 2
    assert record["measured"]["n"] == drafting.PROMPTS
    assert 0 < record["measured"]["acceptance"]["value"] < 0.5
    assert json.loads(json.dumps(record)) == record
    assert str(source.path) not in json.dumps(record)


def test_a_draft_that_is_worth_it_lies_in_the_package(
    shop: Workshop, source: Source, exported: Exported, here: Drafted, worth_it: None, tmp_path: Path
) -> None:
    found = drafted(shop, source, exported, planned(source, "laptop"), REQUEST, TEXT)
    model = tmp_path / "model"
    model.mkdir()
    found.place(shop.store, model)
    found.settle(shop.store)
    place = tmp_path / found.record["model"]
    reader = gguf.GGUFReader(place)
    assert reader.fields["llama.block_count"].contents() == 3
    assert place.stat().st_size == found.record["bytes"]
    assert found.runtime == {"draft": {"model": found.record["model"], "length": 2, "type": "draft-simple"}}
    assert [*found.known_sha256] == [found.record["model"]] == [f"{DRAFT_FOLDER}tiny-llama-5m-draft-Q4_0.gguf"]


def test_a_build_packages_the_draft_it_found_worth_it(
    example: Path, here: Drafted, worth_it: None, tmp_path: Path
) -> None:
    bare = ["measure.fidelity=false", "measure.latency=false", "runtime.threads=1"]
    text = "layers=1+2+4,heal=none,length=2"
    package = edgepack.build(example, "laptop", tmp_path / "p", quantize="Q4_K_M", overrides=bare, draft=text)
    assert edgepack.verify(package.path).problems == ()
    assert package.artifact.name == "tiny-llama-5m-Q4_K_M.gguf"
    named = json.loads((package.path / "runtime.json").read_text())["draft"]
    assert gguf.GGUFReader(package.path / named["model"]).fields["llama.block_count"].contents() == 3
    assert package.manifest["recipe"]["draft"]["model"] == named["model"]
    assert f"-md {named['model']} --spec-type draft-simple" in (package.path / "README.md").read_text()


def test_elsewhere_acceptance_is_measured_and_times_are_not(
    shop: Workshop, source: Source, exported: Exported, here: Drafted
) -> None:
    found = drafted(shop, source, exported, planned(source, "jetson"), REQUEST, TEXT).record
    assert found["basis"] == "predicted"
    assert "not measured on the target" in found["reason"]
    assert found["measured"]["acceptance"] == here.record["measured"]["acceptance"]  # of the models, not of a machine
    assert {name for name, value in found["measured"].items() if value is None} == set(drafting._OF_THIS_MACHINE)
    assert found["predicted_speed_up"] < 1.2


def test_a_draft_too_slow_to_pay_is_not_healed(
    shop: Workshop, source: Source, exported: Exported, here: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "_healed", lambda *_: pytest.fail("healed in vain"))
    found = drafted(shop, source, exported, planned(source, "laptop"), replace(REQUEST, heal=4096), TEXT).record
    assert "even if every drafted token were accepted, so it was not healed" in found["reason"]
    assert found["measured"] == here.record["measured"]
    assert "heal" not in found


def test_a_draft_that_may_pay_is_healed_by_the_source_and_measured_again(
    shop: Workshop, source: Source, exported: Exported, here: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def perfectly(
        shop: Workshop, student: Source, teacher: Source, tokens: int, **texts: Any
    ) -> tuple[Source, dict[str, Any]]:
        """Heal until nothing is missing."""
        asked.append((len(student.files), teacher, tokens, texts))
        return source, {"tokens": tokens, "held_out": "long", "cost": {}}

    monkeypatch.setattr(drafting, "hopeless", lambda *_: None)
    monkeypatch.setattr("edgepack.heal.command.healed_source", perfectly)
    found = drafted(shop, source, exported, planned(source, "laptop"), replace(REQUEST, heal=4096), TEXT).record
    assert asked == [(len(source.files), source, 4096, {"calibration": None, "evaluation": TEXT})]
    assert found["heal"] == {"tokens": 4096}
    assert found["before_healing"]["acceptance"] == here.record["measured"]["acceptance"]
    assert found["measured"]["acceptance"]["value"] > 0.6  # what was measured is the healed one: the source in Q4_0


def test_what_was_measured_once_is_not_measured_again(
    shop: Workshop, source: Source, exported: Exported, here: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(drafting, "run", again)
    assert drafted(shop, source, exported, planned(source, "laptop"), REQUEST, TEXT).record == here.record


@pytest.mark.parametrize(
    ("override", "words"),
    [("budget.disk_mb=4", "5.1 MB on disk, the budget is 4.0"), ("budget.ram_mb=60", "MB of memory, predicted")],
)
def test_a_draft_that_breaks_a_budget_is_neither_healed_nor_measured(
    shop: Workshop,
    source: Source,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    words: str,
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("worked on a draft that has no room")

    monkeypatch.setattr(drafting, "_healed", never)
    monkeypatch.setattr(drafting, "run", never)
    plan = planned(source, "laptop", override)
    found = drafted(shop, source, exported, plan, replace(REQUEST, heal=4096), TEXT)
    assert found.exported is None
    assert found.record["basis"] == "budget"
    assert words in found.record["reason"]


def test_what_was_said_of_the_artifacts_tensors_is_not_said_of_the_draft(source: Source) -> None:
    target = with_overrides(load_target("laptop"), ("quantize.tensors.blk.5.*=F16", "quantize.refine=4096"))
    plain = drafting._for_draft(target).quantize
    assert (plain.imatrix, plain.calibration, plain.refine, dict(plain.tensors)) == (None, None, None, {})
    assert plain.candidates == target.quantize.candidates


def test_an_encoder_is_refused_before_any_work(tmp_path: Path) -> None:
    source = resolve(str(random_bert(tmp_path / "bert")))
    with pytest.raises(InputRefused, match="an encoder answers in one pass"):
        refuse_early(source, REQUEST, "gguf")


def test_a_gguf_is_refused_before_any_work(exported: Exported) -> None:
    with pytest.raises(InputRefused, match="a GGUF can't be made smaller"):
        refuse_early(resolve(str(exported.path)), REQUEST, "gguf")


def test_onnx_is_refused_before_any_work(source: Source) -> None:
    with pytest.raises(UsageError, match="this model becomes onnx") as caught:
        refuse_early(source, REQUEST, "onnx")
    assert caught.value.hint == "Leave --draft out, or add --format gguf."


def test_numbers_that_do_not_fit_the_model_are_refused_before_any_work(source: Source) -> None:
    with pytest.raises(UsageError, match="dropping 6 would leave none"):
        refuse_early(source, parse("depth=6"), "gguf")
    with pytest.raises(UsageError, match="ffn is 500"):
        refuse_early(source, parse("ffn=500"), "gguf")


def test_nothing_heavy_is_imported_with_the_module() -> None:
    import subprocess
    import sys

    heavy = "{'torch', 'transformers', 'llama_cpp', 'numpy'} & set(sys.modules)"
    code = f"import sys, edgepack.drafting, edgepack.draft_request; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
