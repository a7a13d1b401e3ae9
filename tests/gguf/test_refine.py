"""Training in the grid: other codes, the same file otherwise, nearer to the source where it counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import exported
from tiny_models import Case, make

from edgepack.calibrate.layers import load_model, matrices, row_order
from edgepack.errors import InputRefused, StepError, UsageError
from edgepack.gguf import blocks, recode
from edgepack.gguf import refine as module
from edgepack.gguf.file import read_gguf
from edgepack.gguf.grid import GridMatrix
from edgepack.gguf.model import describe
from edgepack.gguf.refine import rate_for, refine
from edgepack.gguf.types import TYPES
from edgepack.measure import bootstrap
from edgepack.measure.fidelity import _measure
from edgepack.pipeline import plan
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import default_calibration_text, default_evaluation_text, read_text

TOKENS = 12 * 4 * 128
Refine = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer, as wide as a block of the k-quants; the GGUF has its query rows in another order."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 128}
    make(Case("Llama", sizes), folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(pico, "Q2_K", tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the calibration text: the toy has a token for nearly every letter."""
    path = tmp_path_factory.mktemp("text") / "training.txt"
    path.write_text(read_text(default_calibration_text())[:30_000], encoding="utf-8")
    return path


@pytest.fixture
def refined(pico: Path, artifact: Path, text: Path, tmp_path: Path) -> Refine:
    def run(name: str = "out", **options: Any) -> dict[str, Any]:
        for folder in (tmp_path / name, tmp_path / f"{name}-journal"):
            folder.mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "model": str(pico), "artifact": str(artifact), "tokens": TOKENS, "text": str(text), "threads": 1,
            "learning_rate": 2e-3,
        }  # fmt: skip
        return refine(folder=str(tmp_path / name), journal=str(tmp_path / f"{name}-journal"), **(settings | options))

    return run


def parts(path: Path) -> dict[str, Any]:
    """Header, and of every tensor its codes and the rest of its bytes."""
    file = read_gguf(path)
    found: dict[str, Any] = {"header": path.read_bytes()[: file.data_offset]}
    for name, entry in file.tensors.items():
        data = recode.tensor_data(file, entry)
        if entry.type.name in blocks.SCALAR:
            grid = blocks.unpack(data, entry.type, entry.shape[-1])
            found[f"{name} codes"], found[f"{name} frame"] = grid.codes.tobytes(), grid.frame.tobytes()
        else:
            found[name] = data.tobytes()
    return found


def test_only_codes_change_and_held_out_text_says_for_the_better(
    refined: Refine, artifact: Path, tmp_path: Path
) -> None:
    report = refined()
    before, after = parts(artifact), parts(tmp_path / "out" / artifact.name)
    differing = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and differing and all(name.endswith(" codes") for name in differing)
    changed = sum(
        np.count_nonzero(np.frombuffer(before[name], np.uint8) != np.frombuffer(after[name], np.uint8))
        for name in differing
    )
    assert report["codes_changed"] == changed > 0
    assert report["difference"]["ci95"][1] < 0 and report["best_step"] > 0
    assert report["frozen"] == [] and report["files"] == [artifact.name]


def test_the_file_computes_what_the_student_computed(
    refined: Refine, pico: Path, artifact: Path, tmp_path: Path
) -> None:
    """Row orders, scales and codes all have to be right for llama.cpp to give the logits of the trained module."""
    kept: list[Any] = []
    original = module.distill

    def watching(student: Any, *arguments: Any, **options: Any) -> Any:
        found = original(student, *arguments, **options)
        kept.append(copy.deepcopy(student))
        return found

    module.distill = watching  # type: ignore[assignment]
    try:
        report = refined(norms=True)
    finally:
        module.distill = original
    ids = np.random.default_rng(1).integers(5, 300, 60).tolist()
    with torch.no_grad():
        ours = torch.log_softmax(kept[0](torch.tensor([ids])).logits[0], -1).numpy()
    file = load_dequantized(tmp_path / "out" / artifact.name, tmp_path / "f32.gguf")
    with Model(file, context=64, threads=1) as model:
        theirs = torch.log_softmax(torch.from_numpy(model.logits([ids], 0)[0].copy()), -1).numpy()
    divergence = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    assert divergence < 2e-5 < report["difference"]["kld"] * -1000  # the cache of llama.cpp is float16


def load_dequantized(path: Path, to: Path) -> Path:
    """The same model in F32: llama.cpp rounds activations in products with quantized matrices."""
    from edgepack.gguf.header import encode_header

    file = read_gguf(path)
    tensors = [(name, entry.shape, TYPES["F32"]) for name, entry in file.tensors.items()]
    header, entries = encode_header(dict(file.metadata), tensors)
    data = bytearray(header)
    for entry in entries:
        stored = file.tensors[entry.name]
        values = blocks.dequantize(recode.tensor_data(file, stored), stored.type, stored.shape[-1])
        data += bytes(len(header) + entry.offset - len(data)) + values.tobytes()
    to.write_bytes(bytes(data) + bytes(-len(data) % 32))
    return to


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(refined: Refine, artifact: Path, tmp_path: Path) -> None:
    def die(done: int, total: int) -> None:
        if done >= total / 2:
            raise Killed

    whole = refined("whole")
    with pytest.raises(Killed):
        refined("killed", progress=die)
    assert not list((tmp_path / "killed").iterdir())
    assert refined("killed") == whole
    first, second = ((tmp_path / name / artifact.name).read_bytes() for name in ("whole", "killed"))
    assert first == second


def test_a_rate_that_ruins_it_leaves_the_file_as_it_was(refined: Refine, artifact: Path, tmp_path: Path) -> None:
    report = refined(learning_rate=10.0)
    assert (report["best_step"], report["codes_changed"]) == (0, 0)
    assert report["after"] == report["before"]
    assert (tmp_path / "out" / artifact.name).read_bytes() == artifact.read_bytes()


def test_a_loss_that_is_nan_writes_no_file_and_keeps_the_best(
    refined: Refine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = module.TowardsTeacher.loss, []

    def breaking(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return plain(self, *arguments) * (float("nan") if len(calls) > 6 else 1.0)

    monkeypatch.setattr(module.TowardsTeacher, "loss", breaking)
    with pytest.raises(StepError, match="loss is nan at step 7") as caught:
        refined()
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "out").iterdir())
    assert (tmp_path / "out-journal" / "best.safetensors").stat().st_size > 300_000


def test_text_that_is_evaluation_text_is_refused(refined: Refine, text: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text("Something of its own to begin with.\n" + read_text(text)[5_000:20_000], encoding="utf-8")
    with pytest.raises(InputRefused, match=r"holds .* words of the evaluation text"):
        refined(evaluation=str(evaluation))


def test_a_file_of_another_model_is_refused(refined: Refine, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 128}
    make(Case("Llama", sizes), other, seed=4)
    with pytest.raises(
        InputRefused, match=r"blk\.0\.ffn_\w+\.weight is \[.*512.*\], expected .*: made of another model"
    ):
        refined(artifact=str(exported(other, "Q2_K", tmp_path)))


def test_a_file_without_codes_of_single_weights_is_a_usage_error(refined: Refine, pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing can be refined"):
        refined(artifact=str(exported(pico, "F16", tmp_path)))


@pytest.mark.parametrize("kind", sorted(blocks.SCALAR))
def test_a_model_on_the_grid_starts_as_the_file(kind: str, pico: Path) -> None:
    """Every type, with weights that are not those the file was made from: codes as the file has them all the same."""
    tensor = next(tensor for tensor in describe(pico).tensors if tensor.name == "blk.0.attn_q.weight")
    model = load_model(pico)
    matrix = matrices(model, describe(pico))[tensor.name]
    order = row_order(tensor, matrix)
    rows = tensor.read(0, tensor.rows) + np.random.default_rng(0).normal(0, 0.02, tensor.shape).astype(np.float32)
    rows[3, :256] = 0
    data = np.empty((len(rows), TYPES[kind].block_bytes * 256 // TYPES[kind].block), np.uint8)
    blocks.ggml.quantize_rows(rows, TYPES[kind], data, None)
    stored = blocks.unpack(data, TYPES[kind], 256)
    original = matrix.rows.clone()
    grid = GridMatrix(matrix, stored, TYPES[kind], order)
    assert np.array_equal(grid.gguf_codes(), stored.codes) and grid.changed == 0
    grid.push()
    decoded = blocks.dequantize(data, TYPES[kind], 256)
    assert np.array_equal(matrix.rows[order].numpy(), decoded)
    off = (grid.master.flatten(1) - original).abs().numpy()
    assert (off <= np.abs(matrix.rows.numpy() - original.numpy()) + 1e-6).all()  # as near as the cell allows


def test_the_rate_falls_with_the_bits() -> None:
    assert [rate_for(bits) for bits in (2.0, 2.6, 3.5, 4.5, 8.5)] == [2.5e-4, 2.5e-4, 1e-4, 4e-5, 4e-5]
    assert 1e-4 < rate_for(3.0) < 2.5e-4


def test_a_trained_model_measures_nearer_in_llama_cpp_on_other_text(example: Path, tmp_path: Path) -> None:
    """Three bits of the example model, 16,000 tokens: the evaluation text, in the real runtime, window by window."""
    artifact = exported(example, "Q3_K_S", tmp_path)
    reference = exported(example, "F32", tmp_path)
    for folder in ("out", "journal"):
        (tmp_path / folder).mkdir()
    refine(
        model=str(example), artifact=str(artifact), folder=str(tmp_path / "out"), tokens=16_384, text=None, threads=2,
        journal=str(tmp_path / "journal"), evaluation=str(default_evaluation_text()),
    )  # fmt: skip
    content = read_text(default_evaluation_text())[:40_000]
    divergences = []
    for candidate in (artifact, tmp_path / "out" / artifact.name):
        scores, _ = _measure(str(reference), str(candidate), content, 24, 256, 2, lambda done, total: None)
        assert scores.kld is not None
        divergences.append(scores.kld.reshape(24, -1))
    found = bootstrap.mean(divergences[1] - divergences[0])
    assert found.ci95 is not None and found.ci95[1] < 0
    assert divergences[1].mean() < divergences[0].mean()


def test_the_plan_says_what_refining_takes_and_when_it_is_done(example: Path) -> None:
    made = plan(example, "laptop", quantize="Q4_K_M", overrides=["quantize.refine=200000"])
    assert made.steps[:3] == ("export", "refine", "conform")
    assert "200,000 tokens" in made.notes[-1]
    assert "refine" not in plan(example, "laptop", quantize="Q4_K_M").steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "F16"}, "has no tensor whose weights are rounded one by one"),
        ({"format": "onnx"}, "this model becomes onnx"),
    ],
)
def test_what_can_not_be_refined_is_a_usage_error_before_any_work(
    options: dict[str, str], message: str, example: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(example, "laptop", overrides=["quantize.refine=200000"], **options)


def test_a_gguf_as_source_can_not_be_refined(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its source is a GGUF"):
        plan(exported(pico, "F16", tmp_path), "laptop", quantize="Q4_0", overrides=["quantize.refine=200000"])
