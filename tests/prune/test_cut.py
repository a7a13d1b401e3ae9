"""A cut checkpoint computes what the whole one does with the same parts bypassed or silenced by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pruning_models import DECODERS, ENCODERS, LAYERS, answers, bypass, cut, layers_of, load, make
from safetensors import safe_open

from edgepack.checkpoint import open_checkpoint
from edgepack.gguf.model import describe
from edgepack.prune.anatomy import ANATOMIES, find_anatomy

EVERY = (*DECODERS, *ENCODERS)
# Families GGUF holds; the rest go to ONNX.
IN_GGUF = ("llama", "untied", "qwen3", "gemma2", "gemma3", "phi3", "olmo3", "starcoder2")


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", EVERY)
def test_without_layers_it_computes_what_the_whole_does_with_them_bypassed(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    pruned = load(cut(source, tmp_path / "pruned", layers=(0, 3)))
    expected = answers(bypass(load(source), (1, 2)))
    torch.testing.assert_close(answers(pruned), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, answers(load(source)), atol=1e-3)


@pytest.mark.parametrize("family", EVERY)
def test_without_neurons_it_computes_what_the_whole_does_with_them_silent(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    kept = {number: tuple(sorted(torch.randperm(96)[:64].tolist())) for number in range(LAYERS)}
    pruned = load(cut(source, tmp_path / "pruned", neurons=kept))
    whole = load(source)
    anatomy = find_anatomy(open_checkpoint(source))
    for number, layer in enumerate(layers_of(whole)):

        def silence(module: object, args: tuple[torch.Tensor], stays: tuple[int, ...] = kept[number]) -> torch.Tensor:
            mask = torch.zeros(96)
            mask[list(stays)] = 1
            return args[0] * mask

        layer.get_submodule(anatomy.ffn_out).register_forward_pre_hook(silence)
    torch.testing.assert_close(answers(pruned), answers(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_without_heads_it_computes_what_the_whole_does_with_their_values_zero(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    kept = {0: (0,), 1: (1,), 2: (1,), 3: (0,)}
    pruned = load(cut(source, tmp_path / "pruned", groups=kept))
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (2, 1)
    whole = load(source)
    for number, layer in enumerate(layers_of(whole)):
        values = layer.self_attn.v_proj.weight
        half = values.shape[0] // 2
        with torch.no_grad():
            values[half * (1 - kept[number][0]) : half * (2 - kept[number][0])] = 0
    torch.testing.assert_close(answers(pruned), answers(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "untied", "gpt2", "bert"])
def test_with_fewer_tokens_it_computes_the_same_for_those_that_stay(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    kept = tuple(range(1920))
    pruned, whole = load(cut(source, tmp_path / "pruned", tokens=kept)), load(source)
    expected = answers(whole)
    expected = expected[..., : len(kept)] if expected.shape[-1] == 2048 else expected
    torch.testing.assert_close(answers(pruned), expected, rtol=0, atol=1e-5)


def test_everything_at_once(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    kept = (0, 2, 3)
    pruned = cut(
        source,
        tmp_path / "pruned",
        layers=kept,
        neurons=dict.fromkeys(kept, tuple(range(64))),
        groups=dict.fromkeys(kept, (1,)),
        tokens=tuple(range(1024)),
    )
    model = load(pruned)
    assert answers(model).shape[-1] == 1024
    assert open_checkpoint(pruned).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", IN_GGUF)
def test_what_is_left_can_be_exported(family: str, tmp_path: Path) -> None:
    more = {"intermediate_size": 96}
    source = make(family, tmp_path / "source", **more)
    pruned = cut(source, tmp_path / "pruned", layers=(1, 3), neurons=dict.fromkeys((1, 3), tuple(range(32, 96))))
    whole, left = describe(source), describe(pruned)
    assert len(left.attention) == 2
    assert [left.attention[n] for n in range(2)] == [whole.attention[n] for n in (1, 3)]
    assert left.parameters < whole.parameters


@pytest.mark.parametrize(
    ("family", "kept", "expected"),
    [
        ("gemma2", (0, 2, 3), ["sliding_attention", "sliding_attention", "full_attention"]),
        ("qwen2", (1, 2, 3), ["full_attention", "sliding_attention", "sliding_attention"]),
        ("olmo3", (2, 3), ["sliding_attention", "full_attention"]),
        ("modernbert", (0, 3), ["full_attention", "full_attention"]),
    ],
)
def test_layers_keep_their_kind(family: str, kept: tuple[int, ...], expected: list[str], tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    pruned = cut(source, tmp_path / "pruned", layers=kept)
    assert load(pruned).config.layer_types == expected


def test_rules_that_count_layers_are_replaced_by_the_list(tmp_path: Path) -> None:
    source = make("gemma3", tmp_path / "source")
    config = config_of(source)
    del config["layer_types"]
    (source / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 2}))
    left = config_of(cut(source, tmp_path / "pruned", layers=(1, 2, 3)))
    assert "sliding_window_pattern" not in left
    assert left["num_hidden_layers"] == 3
    assert left["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]


def test_max_window_layers_counts_the_layers_that_are_left(tmp_path: Path) -> None:
    source = make("qwen2", tmp_path / "source")
    assert config_of(cut(source, tmp_path / "pruned", layers=(1, 2, 3)))["max_window_layers"] == 1


def test_shards_stay_shards_and_values_stay_bit_for_bit(tmp_path: Path) -> None:
    import transformers

    source = make("untied", tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="200kB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pruned = cut(sharded, tmp_path / "pruned", layers=(3,))
    left = open_checkpoint(pruned)
    assert len({info.file for info in left.tensors.values()}) > 1
    with safe_open(left.tensors["model.layers.0.mlp.up_proj.weight"].file, "pt") as file:
        found = file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(found, model.model.layers[3].mlp.up_proj.weight)


def test_other_files_of_the_folder_come_along_and_pickles_do_not(tmp_path: Path) -> None:
    source = make("bert", tmp_path / "source")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    for name in ("modules.json", "README.md", "LICENSE"):
        (source / name).write_text("[]")
    (source / "pytorch_model.bin").write_text("x")
    left = cut(source, tmp_path / "pruned", layers=(0, 1))
    assert (left / "1_Pooling" / "config.json").is_file() and (left / "LICENSE").is_file()
    assert not (left / "pytorch_model.bin").exists()


def test_every_family_in_the_table_is_one_transformers_has() -> None:
    from transformers import CONFIG_MAPPING

    assert set(ANATOMIES) <= set(CONFIG_MAPPING)
