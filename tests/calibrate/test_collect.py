"""A calibration run: its importance matrix beside llama-imatrix's own, its files, and what a kill leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import Case, make

from edgepack.calibrate import collect as module
from edgepack.calibrate.collect import collect
from edgepack.calibrate.layers import load_model, matrices
from edgepack.calibrate.moments import FEEDBACK_DAMPING, open_moments
from edgepack.calibrate.statistics import Collector
from edgepack.calibrate.texts import calibration_text, calibration_windows
from edgepack.errors import InputRefused, StepError
from edgepack.gguf.imatrix import read_imatrix
from edgepack.gguf.model import describe
from edgepack.text import default_calibration_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
FROM_LLAMA_IMATRIX = Path(__file__).parents[1] / "data" / "tiny-llama-5m.llama-imatrix"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, whose query and key rows the GGUF has in another order."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    make(Case("Llama", {"num_hidden_layers": 2}), folder, seed=3)
    return folder


def run(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    folder.mkdir()
    settings = {"text": None, "windows": 10, "gradient_windows": 9, "threads": 1, "journal": f"{folder}-journal"}
    return collect(model=str(model), folder=str(folder), **(settings | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(pico, folder)
    return folder


def test_importance_values_agree_with_llama_imatrix_within_a_thousandth(tmp_path: Path) -> None:
    """The stored file was made from the example as F32 GGUF, by llama.cpp as it is in llama-cpp-python 0.3.36:

    head -c 16000 edgepack/_data/text/calibration.txt > calibration.txt
    llama-imatrix -m tiny-llama-5m-F32.gguf -f calibration.txt -o out.gguf -c 512 --chunks 4 -t 2 -ngl 0 --no-ppl
    """
    text = tmp_path / "calibration.txt"
    text.write_bytes(default_calibration_text().read_bytes()[:16000])
    run(EXAMPLE, tmp_path / "ours", text=str(text), windows=4, gradient_windows=1)
    ours, theirs = read_imatrix(tmp_path / "ours" / "imatrix.gguf"), read_imatrix(FROM_LLAMA_IMATRIX)
    assert (ours.datasets, ours.chunks) == (theirs.datasets, theirs.chunks)
    assert ours.values.keys() - theirs.values.keys() == {"token_embd.weight"}  # the tied output: llama-imatrix has none
    assert not theirs.values.keys() - ours.values.keys()
    for name, values in theirs.values.items():
        np.testing.assert_allclose(ours.values[name], values, rtol=1e-3, err_msg=name)


def test_importance_is_the_diagonal_of_the_second_moments(whole: Path) -> None:
    known = open_moments(whole)
    for name, number in known.report["inputs"].items():
        moments = load_file(whole / "moments" / f"{number:04d}.safetensors")["moments"]
        np.testing.assert_allclose(known.importance(name), moments.diagonal(), rtol=1e-6)
        assert (moments == moments.T).all() or np.abs(moments - moments.T).max() < 1e-5 * moments.max()
        error = np.random.default_rng(1).normal(size=(3, len(moments))).astype(np.float32)
        expected = np.einsum("ni,ij,nj->n", error.astype(np.float64), moments.astype(np.float64), error)
        np.testing.assert_allclose(known.quadratic(name, error), expected, rtol=1e-5)


def test_the_factor_inverts_the_damped_moments_in_its_order(whole: Path) -> None:
    known = open_moments(whole)
    name = "blk.1.ffn_down.weight"
    moments = load_file(whole / "moments" / f"{known.report['inputs'][name]:04d}.safetensors")["moments"]
    inputs = known.feedback(name)
    factor, order = inputs.factor, inputs.order
    assert (inputs.moments == moments).all()
    assert inputs.damping == pytest.approx(FEEDBACK_DAMPING * moments.diagonal().mean(), rel=1e-5)
    assert (np.diff(moments.diagonal()[order]) <= 0).all()
    ordered = moments[np.ix_(order, order)].astype(np.float64)
    damped = ordered + FEEDBACK_DAMPING * ordered.diagonal().mean() * np.eye(len(order))
    np.testing.assert_allclose(factor.T.astype(np.float64) @ factor @ damped, np.eye(len(order)), atol=2e-3)
    assert (factor == np.triu(factor)).all()


def test_gradients_lie_in_the_order_of_the_rows_of_the_file(pico: Path, whole: Path) -> None:
    loaded = load_model(pico)
    layers = {name: matrix.module for name, matrix in matrices(loaded, describe(pico)).items() if not matrix.looked_up}
    text = calibration_text(None, pico)
    windows = calibration_windows(pico, text, 512, 9)
    torch.set_num_threads(1)
    parts = [Collector(loaded, some).gradients(layers)[0] for some in (windows[:8], windows[8:])]
    found = load_file(whole / "gradients.safetensors")
    for name in layers:
        expected = ((8 * parts[0][name] + parts[1][name]) / 9).numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp turns neighbours, transformers halves (conversion of LlamaForCausalLM, `permute`)
            expected = expected.reshape(-1, 2, 8).swapaxes(1, 2).reshape(-1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)
    assert set(found) == {*layers, "lookups"}


def test_equal_rows_may_stand_for_each_other(pico: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][3:20] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found, spec = matrices(load_model(model), describe(model)), describe(model)
    tensor = next(tensor for tensor in spec.tensors if tensor.name == "blk.0.attn_q.weight")
    order = module._row_order(tensor, found[tensor.name])
    assert sorted(order.tolist()) == list(range(64))
    assert np.array_equal(found[tensor.name].rows[order].numpy(), tensor.read(0, 64))


def test_rows_that_transformers_does_not_have_are_refused(pico: Path) -> None:
    found, spec = matrices(load_model(pico), describe(pico)), describe(pico)
    tensor = next(tensor for tensor in spec.tensors if tensor.name == "blk.0.attn_q.weight")
    found[tensor.name].rows[5] += 1
    with pytest.raises(InputRefused, match=r"rows of blk\.0\.attn_q\.weight are not those"):
        module._row_order(tensor, found[tensor.name])


class Killed(Exception):
    """Stands for whatever ends the process."""


@pytest.mark.parametrize("after", [8, 9, 17, 25])  # of 9 gradient windows and two passes over 10 windows
def test_a_run_that_is_killed_goes_on_and_gives_the_same_bytes(
    pico: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(module, "groups", lambda layers: _halves(layers))

    def kill(done: int, total: int) -> None:
        if done > after:
            raise Killed

    seen: list[int] = []
    with pytest.raises(Killed):
        run(pico, tmp_path / "first", journal=str(tmp_path / "journal"), progress=kill)
    assert list((tmp_path / "journal").glob("*.safetensors"))
    run(pico, tmp_path / "second", journal=str(tmp_path / "journal"), progress=lambda done, _: seen.append(done))
    assert seen[0] >= min(after, 8) and seen[-1] == 29  # what was done is not done again
    run(pico, tmp_path / "undisturbed")
    assert contents(tmp_path / "second") == contents(tmp_path / "undisturbed")
    assert contents(tmp_path / "journal") == {}
    ours, theirs = contents(tmp_path / "second"), contents(whole)
    assert ours["imatrix.gguf"] == theirs["imatrix.gguf"]  # portions of the moments change no value


def _halves(layers: dict[str, Any]) -> list[dict[str, Any]]:
    """Two portions, cut between matrices of different inputs."""
    names = list(layers)
    return [{name: layers[name] for name in part} for part in (names[:8], names[8:])]


def test_the_journal_of_another_run_and_a_torn_one_are_not_used(pico: Path, whole: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.mkdir()
    (journal / "gradients.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    save_file({"windows": np.array([8, 99])}, journal / "moments-0.safetensors")
    run(pico, tmp_path / "run", journal=str(journal))
    assert contents(tmp_path / "run") == contents(whole)


def test_a_model_that_overflows_is_a_step_that_failed(pico: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][:] = 3e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match="NaN or infinite"):
        run(model, tmp_path / "run")


def test_text_of_less_than_two_windows_is_refused(pico: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short to learn from. " * 20, encoding="utf-8")
    with pytest.raises(InputRefused, match=r"short\.txt has \d+ tokens, expected at least 1024"):
        run(pico, tmp_path / "run", text=str(text))
