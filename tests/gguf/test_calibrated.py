"""Builds of a given size from end to end: better than presets, within the bytes, the same again; and refusals."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import exported
from llama_quantize import llama_quantize
from tiny_models import Case, make

from edgepack import pipeline, worker
from edgepack.calibrate import collect
from edgepack.errors import BudgetError, InputRefused, StepError, UsageError
from edgepack.events import Event, silent
from edgepack.gguf import backend, calibrated
from edgepack.gguf.blocks import dequantize
from edgepack.gguf.file import GgufFile, read_gguf
from edgepack.gguf.imatrix import read_imatrix
from edgepack.gguf.model import describe
from edgepack.gguf.presets import PRESETS
from edgepack.package import Package
from edgepack.planning import make_plan
from edgepack.source import hash_source, resolve
from edgepack.store import Store
from edgepack.targets import load_target, with_overrides
from edgepack.text import default_calibration_text, default_evaluation_text
from edgepack.workshop import Exported, Workshop

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
FAST = ("quantize.calibration_windows=12", "measure.windows=8", "measure.latency=false")
Rows = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tied Llama of 0.9M parameters whose rows hold K types."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": True}
    make(Case("Llama", sizes), folder, seed=3)
    return folder


def export(
    model: Path, quantize: str, *overrides: str, store: Path | None = None, listener: Callable[[Event], None] = silent,
    evaluation: Path | None = None,
) -> Exported:  # fmt: skip
    """The artifact alone, as `build` makes it."""
    target = with_overrides(load_target("laptop"), [*FAST, *overrides])
    source = hash_source(resolve(str(model)))
    plan = make_plan(source, target, quantize=quantize)
    shop = Workshop(Store(store), listener, 2, evaluation=evaluation)
    return backend.export(shop, source, plan, "artifact")


def tensor_values(file: GgufFile, name: str) -> np.ndarray:
    entry = file.tensors[name]
    with file.path.open("rb") as handle:
        handle.seek(file.data_offset + entry.offset)
        data = np.frombuffer(handle.read(entry.nbytes), dtype=np.uint8)
    if entry.type.name == "F32":
        return data.view(np.float32).reshape(-1, entry.shape[-1])
    return dequantize(data.reshape(int(np.prod(entry.shape[:-1])), -1), entry.type, entry.shape[-1])


def spent() -> float:
    """Seconds of processor time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The example as Q4_K_M with the importance matrix of the text that ships."""
    return export(EXAMPLE, "Q4_K_M", f"quantize.calibration={default_calibration_text()}")


@pytest.fixture(scope="module")
def size(preset: Exported) -> str:
    return f"{preset.size}B"


@pytest.fixture(scope="module")
def built(size: str, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The example at the bytes of the preset."""
    settings = (*FAST, f"quantize.calibration={default_calibration_text()}")
    return pipeline.build(EXAMPLE, "laptop", tmp_path_factory.mktemp("out") / "p", quantize=size, overrides=settings)


def test_the_file_is_closer_to_the_source_than_the_preset_of_its_size(
    built: Package, preset: Exported, tmp_path: Path
) -> None:
    assert built.artifact.stat().st_size <= preset.size
    reference = exported(EXAMPLE, "F32", tmp_path)
    rows: Rows = {
        row["name"]: row
        for row in worker.run(
            "edgepack.measure.pair:pair",
            {
                "first": str(preset.path), "second": str(built.artifact), "reference": str(reference), "threads": 2,
                "text": str(default_evaluation_text()), "windows": 12, "window_tokens": 512,
            },
            what="comparison",
        )
    }  # fmt: skip
    kld = rows["mean_kld"]
    assert kld["difference"]["ci95"][1] < 0  # paired by window, bootstrap
    assert kld["b"] < 0.8 * kld["a"]


def test_every_tensor_decodes_to_about_what_the_source_holds(built: Package) -> None:
    file = read_gguf(built.artifact)
    used = set()
    for tensor in describe(EXAMPLE).tensors:
        expected = tensor.read(0, tensor.rows)
        found = tensor_values(file, tensor.name)
        bits = file.tensors[tensor.name].type.bits_per_weight
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 1.6 * 2.0**-bits * 2, (tensor.name, bits, error)
        used.add(file.tensors[tensor.name].type.name)
    assert len(used - {"F32"}) > 1


def test_the_manifest_says_what_was_chosen_and_why(built: Package, preset: Exported) -> None:
    recipe = built.manifest["recipe"]
    file = read_gguf(built.artifact)
    allocation = recipe["allocation"]
    assert {name: file.tensors[name].type.name for name in allocation["types"]} == allocation["types"]
    assert allocation["runner_up"]["quantize"] in PRESETS
    assert allocation["runner_up"]["artifact_bytes"] <= preset.size
    assert allocation["predicted_kld"] < allocation["runner_up"]["predicted_kld"]
    assert recipe["calibration"]["windows"] == 12 and recipe["calibration"]["text"] == "calibration.txt"
    (measured,) = (row.value for row in built.measurements if row.name == "mean_kld")
    assert measured is not None and 0.6 < allocation["predicted_kld"] / measured < 1.6
    assert min(recipe["feedback"].values()) > 0 and max(recipe["feedback"].values()) <= 1


def test_the_plan_foretells_the_bytes_within_a_hundredth(built: Package, size: str) -> None:
    plan = pipeline.plan(EXAMPLE, "laptop", quantize=size, overrides=FAST)
    assert not plan.prediction.exact
    assert plan.prediction.artifact_bytes == pytest.approx(built.artifact.stat().st_size, rel=0.01)
    assert any("windows of 512 tokens" in note for note in plan.notes)


def test_the_same_build_again_takes_everything_from_the_store(built: Package, size: str, tmp_path: Path) -> None:
    events: list[Event] = []
    before = spent()
    settings = (*FAST, f"quantize.calibration={default_calibration_text()}")
    again = pipeline.build(EXAMPLE, "laptop", tmp_path / "p", quantize=size, overrides=settings, listener=events.append)
    assert spent() - before < 2
    steps = {event.step: event.cached for event in events if event.kind == "done"}
    assert {"calibrate", "sensitivity", "export", "fidelity"} <= {name for name, cached in steps.items() if cached}
    assert again.artifact.read_bytes() == built.artifact.read_bytes()


def test_two_stores_give_the_same_bytes_and_no_more_than_was_asked(pico: Path, tmp_path: Path) -> None:
    digests = set()
    for store in (None, tmp_path / "other"):
        made = export(pico, "4.5bpw", store=store)
        assert 4.3 < made.report["bits_per_weight"] <= 4.5
        digests.add(hashlib.sha256(made.path.read_bytes()).hexdigest())
        assert not list((Store(store).root / "journals").iterdir())
    assert len(digests) == 1


@pytest.mark.parametrize("asked", ["5.123bpw", "700KB"])
def test_any_size_is_filled_and_not_exceeded(pico: Path, asked: str) -> None:
    made = export(pico, asked, "quantize.tensors.blk.0.attn_v.weight=Q8_0")
    assert made.report["types"]["blk.0.attn_v.weight"] == "Q8_0"
    if asked.endswith("bpw"):
        assert float(asked[:-3]) - 0.2 < made.report["bits_per_weight"] <= float(asked[:-3])
    else:
        assert 0.95 * 700_000 < made.size <= 700_000


def test_a_preset_with_text_is_the_preset_with_the_importance_matrix_of_that_text(pico: Path, tmp_path: Path) -> None:
    text = f"quantize.calibration={default_calibration_text()}"
    ours = export(pico, "Q3_K_M", text)
    source, target = hash_source(resolve(str(pico))), with_overrides(load_target("laptop"), [*FAST, text])
    statistics = calibrated.calibrate(Workshop(Store(), silent, 2), source, target)
    assert statistics.cached
    matrix = statistics.path / "imatrix.gguf"
    given = export(pico, "Q3_K_M", f"quantize.imatrix={matrix}")
    assert given.path.read_bytes() == ours.path.read_bytes()
    # and llama-quantize's own bytes with the same values
    np.savez(tmp_path / "values.npz", **read_imatrix(matrix).values)
    job = {
        "source": str(exported(pico, "F32", tmp_path)), "output": str(tmp_path / "theirs.gguf"), "imatrix": True,
        "file_type": PRESETS["Q3_K_M"].file_type,
    }  # fmt: skip
    (answer,) = llama_quantize([job], tmp_path / "values.npz")
    assert answer["status"] == "0"
    mine, theirs = read_gguf(ours.path), read_gguf(tmp_path / "theirs.gguf")
    for name in mine.tensors:
        assert mine.tensors[name].type == theirs.tensors[name].type, name
        assert np.array_equal(tensor_values(mine, name), tensor_values(theirs, name)), name


def test_a_size_below_the_smallest_types_is_a_budget_that_can_t_be_met(pico: Path) -> None:
    with pytest.raises(BudgetError, match="are too few for this model") as refused:
        pipeline.plan(pico, "laptop", quantize="100KB")
    assert refused.value.exit_code == 3
    assert "The least is" in str(refused.value.hint)


def test_a_gguf_an_embedder_a_short_context_and_a_lack_of_memory_are_told_why(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = exported(pico, "F32", tmp_path)
    with pytest.raises(UsageError, match="its source is a GGUF") as refused:
        pipeline.plan(gguf, "laptop", quantize="4.5bpw")
    assert refused.value.exit_code == 2 and "--quantize Q4_K_M" in str(refused.value.hint)
    embedder = tmp_path / "embedder"
    make(Case("Llama", {"num_hidden_layers": 1}, model="Model", pooling="mean"), embedder, seed=1)
    with pytest.raises(UsageError, match="it is an embedder"):
        pipeline.plan(embedder, "laptop", format="gguf", quantize="4.5bpw")
    short = tmp_path / "short"
    make(Case("Llama", {"num_hidden_layers": 1, "max_position_embeddings": 256}), short, seed=1)
    with pytest.raises(UsageError, match="its context is 256 tokens, and calibration reads windows of 512"):
        pipeline.plan(short, "laptop", quantize="4.5bpw")
    monkeypatch.setattr(calibrated, "available_memory_bytes", lambda: 10_000_000)
    with pytest.raises(UsageError, match=r"calibration needs about 0\.\d GB of memory, and 0\.0 GB are free"):
        pipeline.plan(pico, "laptop", quantize="4.5bpw")
    with pytest.raises(UsageError, match="can't be calibrated"):
        pipeline.plan(pico, "laptop", quantize="Q4_K_M", overrides=["quantize.calibration=x.txt"])


def test_calibrating_on_the_evaluation_text_is_refused(pico: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_bytes(default_evaluation_text().read_bytes()[100_000:300_000])
    for spec in (default_evaluation_text(), text):
        with pytest.raises(InputRefused) as refused:
            export(pico, "4.5bpw", f"quantize.calibration={spec}", evaluation=default_evaluation_text())
        assert refused.value.exit_code == 5
    assert not list((Store().root / "journals").iterdir())


def test_text_unlike_the_evaluation_text_is_worth_a_word(pico: Path, tmp_path: Path) -> None:
    text = tmp_path / "digits.txt"
    numbers = np.random.default_rng(1).integers(0, 10**6, 6000)
    text.write_text("\n".join(map(str, numbers)), encoding="utf-8")
    events: list[Event] = []
    shop = Workshop(Store(), events.append, 2, evaluation=default_evaluation_text())
    settings = [f"quantize.calibration={text}", "quantize.calibration_windows=2"]
    calibrated.calibrate(shop, hash_source(resolve(str(pico))), with_overrides(load_target("laptop"), settings))
    assert [event.detail for event in events if event.kind == "note" and event.step == "calibrate"]


def test_an_importance_matrix_of_another_model_is_refused_with_its_tensors(pico: Path) -> None:
    golden = Path(__file__).parents[1] / "data" / "tiny-llama-5m.llama-imatrix"
    with pytest.raises(InputRefused, match=r"another model: the model has no blk\.1\.attn_k\.weight") as refused:
        pipeline.plan(pico, "laptop", quantize="Q4_K_M", overrides=[f"quantize.imatrix={golden}"])
    assert refused.value.exit_code == 5
    assert "blk.0.ffn_down.weight has 768 values, expected 512" in str(refused.value)


def test_a_calibration_that_fails_keeps_its_journal_and_the_next_one_goes_on(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = hash_source(resolve(str(pico))), Store(tmp_path / "store")
    target = with_overrides(load_target("laptop"), [*FAST, "quantize.calibration_windows=18"])
    monkeypatch.setattr(collect, "_SAVE_SECONDS", -1.0)

    def here(function: str, arguments: Mapping[str, Any], *, what: str, progress: Any) -> Any:
        return collect.collect(**arguments, progress=progress)  # in this process: no numba in it

    monkeypatch.setattr(calibrated, "run", here)

    def fail(event: Event) -> None:
        if event.kind == "progress" and event.done > 12:
            raise StepError("the power went")

    monkeypatch.setattr("edgepack.events.time.monotonic", iter(range(10**6)).__next__)  # every progress is told
    with pytest.raises(StepError, match="the power went"):
        calibrated.calibrate(Workshop(store, fail, 1), source, target)
    (journal,) = (store.root / "journals").iterdir()
    assert list(journal.glob("*.safetensors"))
    events: list[Event] = []
    entry = calibrated.calibrate(Workshop(store, events.append, 1), source, target)
    done = {event.done for event in events if event.kind == "progress"}
    assert done == {4, 12, 20, 22}  # 4 with gradients, 18 in portions of 8: it does not begin at 0
    assert not list((store.root / "journals").iterdir())
    undisturbed = calibrated.calibrate(Workshop(Store(tmp_path / "other"), silent, 1), source, target)
    assert {name: file.sha256 for name, file in entry.files.items()} == {
        name: file.sha256 for name, file in undisturbed.files.items()
    }
