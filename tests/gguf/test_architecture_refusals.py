"""What the table does not cover is refused with one line that says why: never written, never dropped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import Case, make, write_pooling

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused
from edgepack.gguf.architectures import describe_checkpoint
from edgepack.gguf.families import ARCHITECTURES
from edgepack.gguf.general import general_metadata, size_label
from edgepack.gguf.hyperparameters import hyperparameter_metadata, read_hyperparameters
from edgepack.gguf.model import ModelSpec, describe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "Tiny-5M-Instruct-v2"
    folder.mkdir()
    make(Case("Llama", {"num_hidden_layers": 2}), folder, 0)
    return folder


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    make(Case("Bert", {"num_key_value_heads": 4, "num_hidden_layers": 1}, "Model", tokenizer="wordpiece"), folder, 0)
    return folder


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.fixture
def bert(saved_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_bert, tmp_path / "bert"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refusal(folder: Path) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        describe(folder)
    assert "\n" not in caught.value.message
    return caught.value


def test_unknown_architecture_lists_the_known_ones_and_offers_the_gguf_way(llama: Path) -> None:
    edit_config(llama, architectures=["FalconForCausalLM"])
    error = refusal(llama)
    assert "FalconForCausalLM" in error.message
    assert all(name in error.message for name in ARCHITECTURES)
    assert "edgepack build model-f16.gguf" in str(error.hint)
    assert error.exit_code == 5


def test_an_unknown_model_type_without_a_class_is_unknown_too(llama: Path) -> None:
    edit_config(llama, architectures="gone", model_type="mamba")
    assert "model_type mamba" in refusal(llama).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 128}, ["mlp.gate_proj.weight", "[96, 64]", "[128, 64]"]),
        ({"num_hidden_layers": 3}, ["model.layers.2.input_layernorm.weight", "missing", "3 layers"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "lost"]),
        ({"vocab_size": 400}, ["embed_tokens.weight", "[320, 64]", "[400, 64]"]),
        ({"num_key_value_heads": 3}, ["not a multiple", "3"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "found 0"]),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": "gone"}, ["64", "7 attention heads"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": "gone"}, ["hidden_size", "None"]),
        ({"attention_bias": True}, ["q_proj.bias", "missing"]),
        ({"attention_bias": "yes"}, ["attention_bias", "'yes'"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "'1e-6'"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"num_hidden_layers": 513}, ["513", "512"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["GPTQ"]),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, ["proportional", "llama3"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor", "nan"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, ["beta_fast", "16", "32"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ["rope_theta", "-1.0"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": "yarn"}, ["rope_parameters", "'yarn'"]),
    ],
)
def test_a_config_that_contradicts_the_weights_or_the_graph_is_refused(
    llama: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_config(llama, **changes)
    error = refusal(llama)
    assert all(word in error.message for word in words), error.message


def test_a_missing_tensor_is_named(llama: Path) -> None:
    edit_tensors(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refusal(llama).message


def test_an_unknown_tensor_is_never_dropped(llama: Path) -> None:
    edit_tensors(llama, lambda tensors: tensors.update({"model.layers.1.extra.weight": np.ones((4, 4), np.float32)}))
    assert "model.layers.1.extra.weight is not part of llama" in refusal(llama).message


def test_a_bias_that_config_json_does_not_announce_is_refused(llama: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(llama, lambda tensors: tensors.update({name: np.ones(64, np.float32)}))
    assert name in refusal(llama).message


def test_rotary_frequencies_of_older_checkpoints_are_ignored(llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(llama, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
    assert name not in {tensor.source for tensor in describe(llama).tensors}


def test_a_model_without_output_matrix_is_refused(llama: Path) -> None:
    edit_tensors(llama, lambda tensors: tensors.pop("lm_head.weight"))
    assert "no lm_head.weight" in refusal(llama).message


def test_equal_matrices_are_tied_when_the_config_says_so(llama: Path) -> None:
    edit_config(llama, tie_word_embeddings=True)
    assert not describe(llama).tied  # they differ: transformers keeps both, and so does the file
    edit_tensors(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert describe(llama).tied


def test_more_tokens_than_embedding_rows_are_refused(llama: Path) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:200].copy()

    edit_tensors(llama, cut)
    edit_config(llama, vocab_size=200)
    assert "200 rows" in refusal(llama).message


GEMMA2 = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "vocab_size": 320,
}


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0, "hidden_activation": "gelu_new"}, "attn_logit_softcap"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}, "no_rope_layer_interval"),
        ("Qwen2ForCausalLM", {"head_dim": 8}, "hidden_size"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias"),
        (
            "Qwen2ForCausalLM",
            {"head_dim": None, "layer_types": ["sliding_attention"] * 4},
            "no sliding_window is in force",
        ),
        (
            "Qwen2ForCausalLM",
            {"head_dim": None, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "llama3",
        ),
        (
            "Phi3ForCausalLM",
            {"head_dim": None, "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 values; expected 8",
        ),
        ("Olmo3ForCausalLM", {"head_dim": 16, "rope_local_base_freq": 1e4, "rope_theta": 5e5}, "one base for both"),
    ],
)
def test_what_a_graph_hard_codes_is_checked(name: str, changes: dict[str, Any], word: str) -> None:
    config = {"hidden_act": "silu", "max_position_embeddings": 64} | GEMMA2 | changes
    if not name.startswith("Gemma"):
        config.setdefault("head_dim", None)
    with pytest.raises(InputRefused) as caught:
        read_hyperparameters(config, ARCHITECTURES[name])
    assert word in caught.value.message


def test_a_graph_without_scaling_in_sliding_layers_refuses_it() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = GEMMA2 | {"rope_parameters": {"full_attention": scaled, "sliding_attention": scaled}}
    with pytest.raises(InputRefused, match="sliding layers"):
        read_hyperparameters(config, ARCHITECTURES["Gemma3ForCausalLM"])


def test_gemma_27b_scales_queries_by_hidden_over_heads() -> None:
    config = GEMMA2 | {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}
    assert read_hyperparameters(config, ARCHITECTURES["Gemma2ForCausalLM"]).sizes["layers"] == 46


def test_both_spellings_of_rope_give_the_same_keys() -> None:
    base = {key: value for key, value in GEMMA2.items() if key != "head_dim"} | {"max_position_embeddings": 512}
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    newer = base | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}}
    older = base | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}}
    row = ARCHITECTURES["Qwen2ForCausalLM"]
    keys = [hyperparameter_metadata(read_hyperparameters(config, row), row) for config in (newer, older)]
    assert keys[0] == keys[1]
    assert keys[0]["qwen2.rope.scaling.type"].value == "yarn"
    assert keys[0]["qwen2.rope.scaling.original_context_length"].value == 64


def pooled(folder: Path) -> int:
    spec = describe(folder)
    assert spec.embedding
    return int(spec.metadata["bert.pooling_type"].value)


def test_an_encoder_without_sentence_transformers_files_pools_the_mean(bert: Path) -> None:
    assert pooled(bert) == 1


def test_the_newer_form_of_a_pooling_file_is_read(bert: Path) -> None:
    write_pooling(bert, "mean")
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert pooled(bert) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling max"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "mean + max"),
        ({}, "pooling none"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_a_pooling_llama_cpp_has_not_is_refused(bert: Path, settings: dict[str, Any], words: str) -> None:
    write_pooling(bert, "mean")
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert words in refusal(bert).message


def test_a_dense_step_after_pooling_is_refused(bert: Path) -> None:
    write_pooling(bert, "mean")
    steps = json.loads((bert / "modules.json").read_text())
    steps.append({"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (bert / "modules.json").write_text(json.dumps(steps))
    assert "'Dense'" in refusal(bert).message


def test_a_pooling_folder_that_is_not_there_is_named(bert: Path) -> None:
    write_pooling(bert, "mean")
    (bert / "1_Pooling" / "config.json").unlink()
    assert "1_Pooling/config.json is missing" in refusal(bert).message


def test_a_relative_position_encoder_is_refused(bert: Path) -> None:
    edit_config(bert, position_embedding_type="relative_key")
    assert "position_embedding_type" in refusal(bert).message


CARD = """---
license: other
license_name: tiny-licence
license_link: https://example.org/licence
base_model: someone/Tiny-5M
language: [en, de]
tags: [conversational]
pipeline_tag: text-generation
---
# A model
"""


def general(spec: ModelSpec) -> dict[str, Any]:
    return {key: value.value for key, value in spec.metadata.items() if key.startswith("general.")}


def test_the_card_fills_the_general_keys(llama: Path) -> None:
    (llama / "README.md").write_text(CARD)
    (llama / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 20}))
    keys = general(describe(llama))
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "Tiny-5M-Instruct-v2"
    assert (keys["general.basename"], keys["general.finetune"], keys["general.version"]) == ("Tiny", "Instruct", "v2")
    assert keys["general.license"] == "other"
    assert keys["general.license.name"] == "tiny-licence"
    assert keys["general.license.link"] == "https://example.org/licence"
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.name"] == "Tiny-5M"
    assert keys["general.base_model.0.organization"] == "someone"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/someone/Tiny-5M"
    assert list(keys["general.languages"]) == ["en", "de"]
    assert list(keys["general.tags"]) == ["conversational", "text-generation"]
    assert keys["general.sampling.temp"] == 0.6
    assert keys["general.sampling.top_k"] == 20


@pytest.mark.parametrize(
    "card",
    [
        "---\n- a\n- list\n---\n",
        "---\n{unclosed\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
        "---\nlicense: " + "[" * 5000 + "]" * 5000 + "\n---\n",
        "---\nlicense: {a: b}\ntags: 5\nlanguage: [1, null, en]\nbase_model: 2024-01-01\n---\n",
        "---\nlicense: 2024-99-99\n---\n",
        "no front matter",
    ],
)
def test_a_broken_card_breaks_nothing(llama: Path, card: str) -> None:
    (llama / "README.md").write_text(card)
    keys = general(describe(llama))
    assert keys["general.name"] == "Tiny-5M-Instruct-v2"
    assert not str(keys.get("general.license", "")).startswith("{")


def test_the_name_is_the_repository_in_a_hub_cache(saved: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Name-1B" / "snapshots" / ("0" * 40)
    shutil.copytree(saved, snapshot)
    assert general(describe(snapshot))["general.name"] == "Name-1B"


def test_a_name_does_not_switch_on_another_tokenizer(llama: Path) -> None:
    # llama.cpp changes special tokens, or fails to load, when general.name says phi-3 and the vocabulary is not Phi-3's
    checkpoint = open_checkpoint(Path(shutil.copytree(llama, llama.parent / "My-Phi-3-7B")))
    assert general_metadata(checkpoint, "llama", 1)["general.name"].value == "My-Phi 3-7B"


def test_a_phi3_tokenizer_gets_the_name_that_llama_cpp_looks_for(llama: Path) -> None:
    path = llama / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = [{"id": 300 + i, "content": token, "special": True} for i, token in enumerate(("<unk>", "<|endoftext|>"))]
    tokenizer["added_tokens"] += [*added, {"id": 302, "content": "<|user|>", "special": True, "rstrip": True}]
    path.write_text(json.dumps(tokenizer))
    assert general_metadata(open_checkpoint(llama), "phi3", 1)["general.name"].value == "Tiny-5M-Instruct-v2 (phi-3)"


@pytest.mark.parametrize(
    ("parameters", "label"),
    [(999, "1.0K"), (37_237_248, "37M"), (134_515_008, "135M"), (1_235_814_400, "1.2B"), (8_030_261_248, "8.0B")],
)
def test_size_labels_have_two_digits(parameters: int, label: str) -> None:
    assert size_label(parameters) == label


def test_a_checkpoint_describes_the_same_from_any_folder(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "elsewhere" / llama.name))
    first, second = describe_checkpoint(open_checkpoint(llama)), describe_checkpoint(open_checkpoint(other))
    assert first.metadata == second.metadata
    assert [t.name for t in first.tensors] == [t.name for t in second.tensors]
