"""What a checkpoint can be exported for, from its configuration alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepack.errors import InputRefused, UsageError
from edgepack.onnx.tasks import TASKS, kind_of, task_of, tasks_of


def config(architecture: str | None, **more: Any) -> dict[str, Any]:
    names = {} if architecture is None else {"architectures": [architecture]}
    return {"model_type": "bert", "vocab_size": 8} | names | more


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("BertForSequenceClassification", "text-classification"),
        ("DebertaV2ForTokenClassification", "token-classification"),
        ("ElectraForQuestionAnswering", "question-answering"),
        ("RobertaForMaskedLM", "fill-mask"),
        ("BertForPreTraining", "fill-mask"),
        (None, "feature-extraction"),
    ],
)
def test_the_default_task_is_the_head_of_the_checkpoint(tmp_path: Path, architecture: str | None, task: str) -> None:
    assert task_of(config(architecture), tmp_path).name == task


def test_the_pretrained_electra_discriminator_is_no_language_model(tmp_path: Path) -> None:
    assert tasks_of(config("ElectraForPreTraining"), tmp_path) == ("feature-extraction",)


def test_a_sentence_transformers_folder_is_exported_whole(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert task_of(config("BertForMaskedLM"), tmp_path).name == "sentence-similarity"
    assert tasks_of(config("BertForMaskedLM"), tmp_path) == ("sentence-similarity", "fill-mask", "feature-extraction")


@pytest.mark.parametrize("name", ["ner", "token-classification"])
def test_a_task_without_a_head_is_refused_with_the_tasks_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"no head for it.*BertForMaskedLM") as caught:
        task_of(config("BertForMaskedLM"), tmp_path, name)
    assert caught.value.hint == "It can be exported for fill-mask, feature-extraction."


def test_sentence_similarity_without_modules_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"modules\.json"):
        task_of(config("BertModel"), tmp_path, "sentence-similarity")


def test_an_unknown_task_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'summarization' is unknown.*question-answering"):
        task_of(config("BertModel"), tmp_path, "summarization")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "t5", "vocab_size": 8, "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": "clip", "text_config": {}, "vision_config": {}}, "several towers"),
        ({"model_type": "wav2vec2"}, "neither vocab_size nor num_channels"),
    ],
)
def test_models_that_are_no_single_encoder_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        kind_of(given)


def test_a_decoder_is_refused_unless_its_hidden_states_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="LlamaForCausalLM generates text"):
        task_of(config("LlamaForCausalLM"), tmp_path)
    assert task_of(config("LlamaForCausalLM"), tmp_path, "feature-extraction") is TASKS["feature-extraction"]


def test_an_image_model_has_image_tasks_only(tmp_path: Path) -> None:
    given = {"model_type": "vit", "image_size": 32, "architectures": ["ViTForImageClassification"]}
    assert tasks_of(given, tmp_path) == ("image-classification", "feature-extraction")
    with pytest.raises(UsageError):
        task_of(given, tmp_path, "fill-mask")


def test_every_task_is_one_that_optimum_knows() -> None:
    from optimum.exporters.tasks import TasksManager

    known = {*TasksManager.get_all_tasks(), "sentence-similarity"}
    assert set(TASKS) <= known


def test_planning_needs_no_heavy_import() -> None:
    code = (
        "import sys, edgepack.onnx.tasks; print([m for m in ('torch', 'transformers', 'optimum') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
