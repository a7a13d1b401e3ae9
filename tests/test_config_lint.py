"""Configurations: those of published models pass, those that ask for code or absurd sizes do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest

from edgepack.checkpoint import open_checkpoint
from edgepack.config_lint import lint, lint_config, quantization
from edgepack.errors import InputRefused


def _refused(config: dict[str, Any]) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        lint_config(config, "config.json")
    assert caught.value.message.isprintable()
    return caught.value


CODE = {
    "auto_map": {"auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}},
    "auto_map in a part": {"text_config": {"auto_map": {"AutoModel": "evil.Evil"}}},
    "auto_map in a list": {"parts": [{"auto_map": {"AutoModel": "evil.Evil"}}]},
    "trust_remote_code": {"trust_remote_code": True},
    "trust_remote_code in a part": {"keypoint_detector_config": {"trust_remote_code": True}},
    "trust_remote_code as a word": {"trust_remote_code": "yes"},
    "custom_pipelines": {"custom_pipelines": {"evil": {"impl": "evil.Evil"}}},
    "_attn_implementation_internal": {"_attn_implementation_internal": "evil/kernel"},
    "_attn_implementation": {"_attn_implementation": "evil/kernel"},
    "attn_implementation": {"attn_implementation": "evil/kernel"},
    "attn_implementation in a part": {"text_config": {"attn_implementation": "evil/kernel:fn"}},
    "attn_implementation by part": {"attn_implementation": {"text_config": "evil/kernel"}},
    "experts_implementation": {"experts_implementation": "evil/kernel"},
    "flash_attention_2": {"attn_implementation": "flash_attention_2"},
    "a class of another repository": {"tokenizer_class": "evil/repo--evil.Tokenizer"},
    "a kernel of another repository": {"hub_kernels": {"RMSNorm": "evil/kernel"}},
    "a kernel in a list": {"mlp_kernel": ["evil/kernel"]},
}


@pytest.mark.parametrize("name", CODE)
def test_a_key_that_leads_to_code_is_refused(name: str) -> None:
    error = _refused(pico.CONFIG | CODE[name])
    assert "config.json: " in error.message
    assert error.hint


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_every_configuration_file_of_the_folder_is_checked(file: str, tmp_path: Path) -> None:
    base = pico.CONFIG if file == "config.json" else {}
    data = json.dumps(base | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}).encode()
    with pytest.raises(InputRefused, match=f"{file}: auto_map"):
        open_checkpoint(pico.write(tmp_path, pico.files() | {file: data}))


SANE = {
    "nothing more": {},
    "newer names": {"dtype": "bfloat16", "transformers_version": "5.23.0", "layer_types": ["full_attention"]},
    "no architectures": {"architectures": None},
    "rope": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "longrope": {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    "text_config": {"text_config": {"hidden_size": 640, "_name_or_path": "", "torch_dtype": "bfloat16"}},
    "labels": {"id2label": {"0": "a/b"}, "label2id": {"a/b": 0}},
    "no window": {"sliding_window": None, "max_window_layers": 28, "pad_token_id": -1},
    "many eos": {"eos_token_id": [1, 106]},
    "autoset": {"_attn_implementation_autoset": True},
    "eager": {"_attn_implementation": "eager", "_attn_implementation_internal": None},
    "sdpa by part": {"attn_implementation": {"text_config": "sdpa"}},
    "empty": {"auto_map": {}, "quantization_config": None, "trust_remote_code": False, "custom_pipelines": {}},
    "a conv kernel": {"conv_kernel": 4, "d_conv": 4},
    "long context": {"max_position_embeddings": 10_485_760},
    "a long integer elsewhere": {"tokens_seen": 10**20},
}


@pytest.mark.parametrize("name", SANE)
def test_what_published_configurations_say_passes(name: str) -> None:
    lint_config(pico.CONFIG | SANE[name], "config.json")


def test_the_example_models_configuration_passes() -> None:
    path = Path(__file__).parent.parent / "examples" / "models" / "tiny-llama-5m" / "config.json"
    lint_config(json.loads(path.read_text()), str(path))


NUMBERS: list[tuple[str, Any]] = [
    ("hidden_size", 10**18),
    ("hidden_size", 1e18),
    ("hidden_size", 0),
    ("hidden_size", -1),
    ("hidden_size", True),
    ("hidden_size", "256"),
    ("hidden_size", [256, 10**18]),
    ("num_hidden_layers", 1025),
    ("num_attention_heads", 0),
    ("vocab_size", (1 << 22) + 1),
    ("intermediate_size", 1 << 40),
    ("max_position_embeddings", 1 << 31),
    ("head_dim", 1 << 20),
    ("n_embd", {}),
]


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_number_out_of_reason_is_named_with_its_bounds(key: str, value: Any) -> None:
    assert f"config.json: {key} must be a whole number from" in _refused(pico.CONFIG | {key: value}).message
    assert f"text_config.{key} must" in _refused(pico.CONFIG | {"text_config": {key: value}}).message


@pytest.mark.parametrize("value", [None, 5, "", "a b", "x" * 65, ["llama"]])
def test_the_model_type_is_a_plain_word(value: Any) -> None:
    assert "model_type must be a plain word" in _refused(pico.CONFIG | {"model_type": value}).message


@pytest.mark.parametrize("value", ["LlamaForCausalLM", ["os.system"], ["a/b"], [5], ["a b"], {"a": 1}, ["x" * 200]])
def test_architectures_are_class_names(value: Any) -> None:
    _refused(pico.CONFIG | {"architectures": value})


def test_a_part_in_another_repository_is_refused() -> None:
    assert "backbone._name_or_path" in _refused(pico.CONFIG | {"backbone": {"_name_or_path": "evil/model"}}).message


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "4-bit GPTQ"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "4-bit AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4-bit bitsandbytes"),
        ({"load_in_8bit": True}, "8-bit bitsandbytes"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "brandnew"}, "brandnew"),
        ({"bits": 3}, "3-bit quantized"),
        ("int8", "quantized"),
    ],
)
def test_a_quantized_checkpoint_is_named_and_the_original_asked_for(value: Any, name: str) -> None:
    assert quantization(value) == name
    for config in ({"quantization_config": value}, {"text_config": {"quantization_config": value}}):
        error = _refused(pico.CONFIG | config)
        assert name in error.message
        assert "unquantized" in str(error.hint)


def test_deep_nesting_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"a": deep}
    assert "nested more than" in _refused(pico.CONFIG | {"x": deep}).message
    with pytest.raises(InputRefused, match="nested more than"):
        lint({"x": deep}, "config.json")


TEXTS = {
    "duplicate key": (b'{"model_type": "llama", "model_type": "gpt2"}', "duplicate key 'model_type'"),
    "duplicate key inside": (b'{"model_type": "llama", "a": {"b": 1, "b": 2}}', "duplicate key 'b'"),
    "not JSON": (b"{'model_type': 'llama'}", "not valid JSON at line 1, column 2"),
    "NaN": (b'{"model_type": "llama", "x": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"model_type": "llama", "x": -Infinity}', "-Infinity is not a JSON number"),
    "1e999": (b'{"model_type": "llama", "x": 1e999}', "not finite"),
    "5000 digits": (b'{"x": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "UTF-16": ('{"model_type": "llama"}'.encode("utf-16"), "not UTF-8"),
    "BOM": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "an array": (b"[]", "expected a JSON object, found array"),
    "empty": (b"", "not valid JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "no model_type": (b"{}", "model_type must be a plain word"),
    "over the limit": (b" " * (1 << 20) + b"{}", "at most 1,048,576"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_malformed_config_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, word = TEXTS[name]
    with pytest.raises(InputRefused) as caught:
        open_checkpoint(pico.write(tmp_path, pico.files() | {"config.json": data}))
    assert word in caught.value.message
    assert caught.value.message.isprintable()


def test_a_folder_without_config_says_which_folder_to_give(tmp_path: Path) -> None:
    contents = pico.files()
    del contents["config.json"]
    with pytest.raises(InputRefused, match=r"no config\.json") as caught:
        open_checkpoint(pico.write(tmp_path, contents))
    assert "config.json" in str(caught.value.hint)
