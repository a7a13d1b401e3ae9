"""Deferred tensors against the same operations on the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.checkpoint import Checkpoint, open_checkpoint
from edgepack.onnx.deferred import Deferred, defer, identity, leaf, materialize, row_reader, sources, without_casts

QUERY, KEY = (f"model.layers.0.self_attn.{name}_proj.weight" for name in ("q", "k"))


@pytest.fixture(scope="module")
def checkpoint(example: Path) -> Checkpoint:
    return open_checkpoint(example)


def real(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the checkpoint as the safetensors library reads it, widened."""
    from safetensors import safe_open

    with safe_open(checkpoint.tensors[name].file, "pt") as file:
        return file.get_tensor(name).to(torch.float32)


STEPS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.T,
    lambda t: t + 1,
    lambda t: t * 0.5,
    lambda t: t.reshape(-1, 64),
    lambda t: t.chunk(2, dim=0)[1],
    lambda t: t.split([32, t.shape[0] - 32])[1],
    lambda t: torch.cat([t, t], dim=0),
    lambda t: t[8:],
    lambda t: t.to(torch.float16).to(torch.float32),
    lambda t: t.contiguous().detach().clone(),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(STEPS))), max_size=5))
def test_recorded_operations_give_what_they_give_on_weights(steps: list[int]) -> None:
    checkpoint = open_checkpoint(Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m")
    deferred, expected = leaf(checkpoint.tensors[QUERY]), real(checkpoint, QUERY)
    for step in steps:
        deferred, expected = STEPS[step](deferred), STEPS[step](expected)
    assert isinstance(deferred, Deferred)
    assert deferred.shape == expected.shape and deferred.dtype == expected.dtype
    assert torch.equal(materialize(deferred), expected)
    assert sources(deferred) == (QUERY,)
    assert torch.equal(row_reader(deferred)(1, 3), expected[1:3].to(torch.float32))


def test_joined_tensors_know_what_they_are_made_of(checkpoint: Checkpoint) -> None:
    joined = torch.cat([leaf(checkpoint.tensors[QUERY]), leaf(checkpoint.tensors[KEY])]).T
    assert sources(joined) == (QUERY, KEY)
    expected = torch.cat([real(checkpoint, QUERY), real(checkpoint, KEY)]).T
    assert torch.equal(materialize(joined), expected)
    assert identity(joined) is None


def test_a_matrix_is_itself_however_it_lies(checkpoint: Checkpoint) -> None:
    weight = leaf(checkpoint.tensors[QUERY])
    assert identity(weight) == identity(weight.T) == identity(weight.T.T.detach()) is not None
    assert identity(weight) != identity(leaf(checkpoint.tensors[KEY]))
    assert identity(weight * 2) is None


def test_rounding_to_the_type_of_activations_can_be_undone(checkpoint: Checkpoint) -> None:
    half = leaf(checkpoint.tensors[QUERY]).T.to(torch.float16)
    assert torch.equal(materialize(without_casts(half)), real(checkpoint, QUERY).T)


def test_rows_come_from_the_file_without_the_rest(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepack.onnx import deferred

    asked: list[tuple[int, int]] = []
    read = deferred.read_float32

    def counting(info: object, start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return read(info, start, stop)

    monkeypatch.setattr(deferred, "read_float32", counting)
    row_reader(leaf(checkpoint.tensors[QUERY]).T.T)(5, 9)
    assert asked == [(5, 9)]


def test_values_can_be_asked_for(checkpoint: Checkpoint) -> None:
    weight = leaf(checkpoint.tensors[QUERY])
    assert np.array_equal(weight[0, :4].detach().cpu().numpy(), real(checkpoint, QUERY)[0, :4].numpy())
    assert float(weight[3, 3]) == float(real(checkpoint, QUERY)[3, 3])
    assert QUERY in repr(weight) and str(float(weight[3, 3])) not in repr(weight)


def test_a_model_stays_as_it_is_when_names_differ(checkpoint: Checkpoint) -> None:
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"other": torch.nn.Linear(4, 4)})
    assert defer(model, checkpoint) == ["other.weight", "other.bias"]
    assert not isinstance(model["other"].weight, Deferred)
