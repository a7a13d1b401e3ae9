"""What is put into a state for training is an ordinary model afterwards; what was decided stays decided."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from edgepack.calibrate.layers import load_model
from edgepack.heal.cost import Means
from edgepack.heal.journal import Journal
from edgepack.heal.session import decided, here, trained

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama-5m"


def test_a_decision_outlives_what_it_was_made_of(tmp_path: Path) -> None:
    assert decided(tmp_path, "means", lambda: {"rank": 16}) == {"rank": 16}
    assert decided(tmp_path, "means", lambda: {"rank": 64}) == {"rank": 16}
    assert decided(tmp_path, "keep", lambda: None) is None
    assert json.loads((tmp_path / "keep.json").read_text()) is None


def test_halved_models_are_what_they_were_afterwards() -> None:
    student, teacher = load_model(EXAMPLE), load_model(EXAMPLE)
    before = {name: values.clone() for name, values in teacher.state_dict().items()}
    with trained(student, teacher, Means("lora", 16, checkpointing=False, micro_batch=1, half=True)) as weights:
        assert all(values.dtype == torch.float32 for values in weights.masters.values())
        for model in (student, teacher):
            assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
            assert model.model.embed_tokens.weight.dtype == torch.float32
    for model in (student, teacher):
        assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_all_weights_are_trained_or_the_adapters_alone() -> None:
    student, teacher = load_model(EXAMPLE), load_model(EXAMPLE)
    with trained(student, teacher, Means("full", 0, checkpointing=False, micro_batch=1)) as weights:
        assert set(weights.masters) == {name for name, _ in student.named_parameters()}
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_memory_that_is_free_here_is_told() -> None:
    machine = here(torch.device("cpu"))
    assert not machine.gpu and machine.free_bytes is not None and machine.free_bytes > 1 << 28


def test_the_best_masters_are_read_back_as_safetensors_has_them(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    masters = {"b": values.t(), "a": torch.tensor(2.5), "half": values.bfloat16()}
    journal = Journal(tmp_path, "")
    journal.save_best(masters)
    for found in (load_file(journal.best_file), dict(journal.best())):
        assert found.keys() == masters.keys()
        assert all(
            torch.equal(found[name], masters[name]) and found[name].dtype == masters[name].dtype for name in found
        )
