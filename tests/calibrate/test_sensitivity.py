"""Predicted divergence against divergence measured in transformers, on the example model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Case, make

from edgepack.calibrate import sensitivity as module
from edgepack.calibrate.collect import collect
from edgepack.calibrate.layers import Forward, Matrix, load_model, matrices, mean_kld, replaced
from edgepack.calibrate.moments import Moments, open_moments
from edgepack.calibrate.sensitivity import sensitivity
from edgepack.calibrate.texts import calibration_text, calibration_windows
from edgepack.errors import StepError
from edgepack.gguf import ggml
from edgepack.gguf.blocks import dequantize
from edgepack.gguf.feedback import quantize_rows_with_feedback
from edgepack.gguf.model import describe
from edgepack.gguf.types import TYPES, row_bytes
from edgepack.text import default_evaluation_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"
KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q8_0")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example on eight windows of the text that ships."""
    folder = tmp_path_factory.mktemp("statistics")
    collect(
        model=str(EXAMPLE), text=None, windows=8, gradient_windows=6, folder=str(folder),
        journal=str(folder / "journal"), threads=2,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def prices(statistics: Path) -> dict[str, Any]:
    return sensitivity(model=str(EXAMPLE), statistics=str(statistics), kinds=KINDS, feedback=True, threads=2)


class Measured:
    """The example in transformers, and its divergence when some matrices hold other values."""

    def __init__(self, known: Moments) -> None:
        self.known = known
        self.model, spec = load_model(EXAMPLE), describe(EXAMPLE)
        self.matrices = matrices(self.model, spec)
        text = calibration_text(str(default_evaluation_text()), EXAMPLE)
        self.forward = Forward(self.model, calibration_windows(EXAMPLE, text, 512, 1))
        self.reference = torch.log_softmax(self.forward.logits(), -1)
        self._made: dict[tuple[str, str], torch.Tensor] = {}

    def values(self, name: str, kind: str) -> torch.Tensor:
        """The matrix as ggml would write it, importance values and all."""
        if (name, kind) not in self._made:
            rows = self.matrices[name].rows.contiguous().numpy()
            data = np.empty(len(rows) * row_bytes(TYPES[kind], rows.shape[1]), dtype=np.uint8)
            ggml.quantize_rows(rows, TYPES[kind], data, self.known.importance(name))
            self._made[name, kind] = torch.from_numpy(
                dequantize(data.reshape(len(rows), -1), TYPES[kind], rows.shape[1])
            )
        return self._made[name, kind]

    def kld(self, types: Mapping[str, str]) -> float:
        """Divergence with these matrices in these types, everything else as it is."""
        kept: list[tuple[Matrix, torch.Tensor]] = []
        made = {name: self.values(name, kind) for name, kind in types.items()}
        for name, values in made.items():
            kept.append((self.matrices[name], self.matrices[name].rows.clone()))
            self.matrices[name].rows.copy_(values)
        try:
            return mean_kld(self.reference, self.forward.logits())
        finally:
            for matrix, rows in kept:
                matrix.rows.copy_(rows)


@pytest.fixture(scope="module")
def measured(statistics: Path) -> Measured:
    return Measured(open_moments(statistics))


def spearman(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_twenty_random_type_maps_are_ranked_as_they_measure(prices: dict[str, Any], measured: Measured) -> None:
    draw = random.Random(11)
    predicted, found = [], []
    for _ in range(20):
        types = {name: draw.choice(KINDS[:6]) for name in prices["plain"]}
        predicted.append(sum(prices["plain"][name][kind] for name, kind in types.items()))
        found.append(measured.kld(types))
    assert spearman(predicted, found) >= 0.9
    ratios = np.array(predicted) / found
    assert 0.75 < np.median(ratios) < 1.25


def test_the_price_of_one_tensor_is_what_it_costs_within_a_factor(prices: dict[str, Any], measured: Measured) -> None:
    names = ["token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.2.attn_output.weight",
             "blk.3.ffn_gate.weight", "blk.5.ffn_down.weight"]  # fmt: skip
    ratios = [prices["plain"][name]["Q3_K"] / measured.kld({name: "Q3_K"}) for name in names]
    assert min(ratios) > 0.5 and max(ratios) < 2, dict(zip(names, ratios, strict=True))


def test_more_bits_cost_less_and_feedback_never_more_than_ggml(prices: dict[str, Any]) -> None:
    for name, costs in prices["costs"].items():
        assert costs["Q2_K"] > costs["Q3_K"] > costs["Q4_K"] > costs["Q5_K"] > costs["Q6_K"] > 0, name
        if name != "token_embd.weight":  # feedback looks at its part as output matrix, and pays where it is looked up
            assert all(cost <= prices["plain"][name][kind] * (1 + 1e-6) for kind, cost in costs.items()), name


def test_sampled_rows_price_a_tensor_as_all_of_its_rows_do(
    prices: dict[str, Any], statistics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLED_ROWS", 1 << 30)
    full = sensitivity(model=str(EXAMPLE), statistics=str(statistics), kinds=["Q4_K"], feedback=True, threads=2)
    ratios = np.array([prices["costs"][name]["Q4_K"] / costs["Q4_K"] for name, costs in full["costs"].items()])
    assert np.abs(ratios - 1).mean() < 0.03 and np.abs(ratios - 1).max() < 0.12
    assert sum(costs["Q4_K"] for costs in prices["costs"].values()) == pytest.approx(
        sum(costs["Q4_K"] for costs in full["costs"].values()), rel=0.03
    )


def test_a_price_is_half_the_gradients_times_the_error_in_the_moments(statistics: Path) -> None:
    known = open_moments(statistics)
    tensor = next(tensor for tensor in describe(EXAMPLE).tensors if tensor.name == "blk.1.attn_k.weight")
    rows = np.ascontiguousarray(tensor.read(0, tensor.rows))
    assert tensor.rows <= module.SAMPLED_ROWS
    data = np.empty(len(rows) * row_bytes(TYPES["Q4_K"], tensor.width), dtype=np.uint8)
    inputs = known.feedback(tensor.name)
    quantize_rows_with_feedback(
        rows, TYPES["Q4_K"], data, known.importance(tensor.name), inputs.factor, inputs.order,
        moments=inputs.moments, damping=inputs.damping,
    )  # fmt: skip
    error = (dequantize(data.reshape(len(rows), -1), TYPES["Q4_K"], tensor.width) - rows).astype(np.float64)
    moments = known._load(known.report["inputs"][tensor.name]).astype(np.float64)
    expected = 0.5 * (known.gradient(tensor.name) * np.einsum("ni,ij,nj->n", error, moments, error)).sum()
    found = sensitivity(model=str(EXAMPLE), statistics=str(statistics), kinds=["Q4_K"], feedback=True, threads=1)
    assert found["costs"][tensor.name]["Q4_K"] == pytest.approx(expected, rel=0.02)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untied random Llama whose rows of 64 and 96 no block of 256 divides, and its statistics."""
    root = tmp_path_factory.mktemp("pico")
    make(Case("Llama", {"num_hidden_layers": 1}), root / "model", seed=3)
    (root / "statistics").mkdir()
    collect(
        model=str(root / "model"), text=None, windows=2, gradient_windows=2, folder=str(root / "statistics"),
        journal=str(root / "journal"), threads=1,
    )  # fmt: skip
    return root / "model", root / "statistics"


def test_an_embedding_that_is_only_looked_up_has_a_price(pico: tuple[Path, Path]) -> None:
    model, statistics = pico
    found = sensitivity(model=str(model), statistics=str(statistics), kinds=["Q4_0", "Q8_0"], feedback=True, threads=1)
    costs = found["costs"]["token_embd.weight"]
    assert costs["Q4_0"] > 10 * costs["Q8_0"] > 0
    tensor = describe(model).tensors[0]
    assert tensor.name == "token_embd.weight"
    rows = tensor.read(0, tensor.rows)
    data = np.empty(len(rows) * row_bytes(TYPES["Q4_0"], 64), dtype=np.uint8)
    ggml.quantize_rows(rows, TYPES["Q4_0"], data, None)
    error = (dequantize(data.reshape(len(rows), -1), TYPES["Q4_0"], 64) - rows).astype(np.float64)
    expected = 0.5 * float((error**2).mean(axis=0) @ open_moments(statistics).lookups)
    assert costs["Q4_0"] == pytest.approx(expected, rel=0.1)  # 256 of its 320 rows


def test_types_whose_blocks_do_not_divide_a_row_have_no_price(pico: tuple[Path, Path]) -> None:
    model, statistics = pico
    found = sensitivity(model=str(model), statistics=str(statistics), kinds=["Q4_K", "Q5_0"], feedback=False, threads=2)
    assert all(set(costs) == {"Q5_0"} for costs in found["costs"].values())


def test_statistics_of_another_model_are_refused(pico: tuple[Path, Path], tmp_path: Path) -> None:
    make(Case("Llama", {"num_hidden_layers": 2}), tmp_path / "deeper", seed=3)
    with pytest.raises(StepError, match=r"blk\.1\.attn_q\.weight: no calibration statistics"):
        sensitivity(model=str(tmp_path / "deeper"), statistics=str(pico[1]), kinds=["Q8_0"], feedback=False, threads=1)


def test_prices_do_not_depend_on_threads(statistics: Path) -> None:
    found = [
        sensitivity(model=str(EXAMPLE), statistics=str(statistics), kinds=["Q4_K"], feedback=True, threads=threads)
        for threads in (1, 3)
    ]
    assert found[0] == found[1]


def test_a_replaced_matrix_is_put_back(measured: Measured) -> None:
    matrix = measured.matrices["blk.0.attn_q.weight"]
    before = matrix.rows.clone()
    with pytest.raises(ZeroDivisionError), replaced(matrix, before + 1):
        raise ZeroDivisionError
    assert torch.equal(matrix.rows, before)
