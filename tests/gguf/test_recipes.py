"""The type of every tensor, against llama.cpp's own dry run on sparse files of many shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_quantize import hyperparameters, llama_quantize, tensor_shapes

from edgepack.errors import InputRefused, UsageError
from edgepack.gguf.file import encode_header
from edgepack.gguf.overrides import matches
from edgepack.gguf.recipes import PRESETS, assign_types, find_preset, quantizable
from edgepack.gguf.types import TYPES

# What the recipes look at: layer count, heads per key-value head, ties, widths, experts, architecture.
MODELS: dict[str, dict[str, object]] = {
    "one layer": {"layers": 1, "heads": 8, "kv_heads": 8},
    "three layers untied": {"layers": 3, "heads": 8, "kv_heads": 4, "tied": False},
    "six layers grouped by four": {"layers": 6, "heads": 8, "kv_heads": 2},
    "sixteen layers untied grouped": {"layers": 16, "heads": 8, "kv_heads": 2, "tied": False},
    "twenty-two layers": {"layers": 22, "heads": 8, "kv_heads": 4},
    "llama 70B": {"layers": 80, "heads": 8, "kv_heads": 1, "tied": False},
    "llama 65B": {"layers": 80, "heads": 8, "kv_heads": 8, "tied": False},
    "qwen2 72B": {"layers": 80, "heads": 8, "kv_heads": 1, "architecture": "qwen2"},
    "width that 32 divides": {"layers": 9, "width": 288, "ffn": 544, "heads": 9, "kv_heads": 3},
    "the same untied": {"layers": 9, "width": 288, "ffn": 512, "heads": 9, "kv_heads": 3, "tied": False},
    "width that nothing divides": {"layers": 2, "width": 100, "ffn": 300, "heads": 4, "kv_heads": 2, "head": 25},
    "two experts": {"layers": 8, "heads": 8, "kv_heads": 4, "experts": 2},
    "four experts": {"layers": 8, "heads": 8, "kv_heads": 4, "experts": 4, "tied": False},
    "mixtral": {"layers": 32, "heads": 8, "kv_heads": 2, "experts": 8, "tied": False},
    "fused attention": {"layers": 12, "heads": 8, "kv_heads": 8, "fused": True, "tied": False},
    "falcon": {"layers": 32, "heads": 8, "kv_heads": 8, "fused": True, "architecture": "falcon", "tied": False},
    "gpt2 tied": {"layers": 12, "heads": 8, "kv_heads": 8, "fused": True, "architecture": "gpt2"},
}


def _model(options: dict[str, object]) -> tuple[str, dict[str, tuple[int, ...]], dict[str, object]]:
    shape = {"width": 256, "ffn": 512, "experts": 0} | options
    architecture = str(shape.pop("architecture", "llama"))
    shapes = tensor_shapes(**shape)
    if architecture == "gpt2":
        shapes["position_embd.weight"] = (128, int(shape["width"]))
    keys = {key: shape[key] for key in ("layers", "width", "ffn", "heads", "kv_heads", "experts")}
    return architecture, shapes, keys


def _assign(architecture: str, shapes: dict, keys: dict, preset: str, **options: object) -> dict[str, str]:
    numbers = {key: keys[key] for key in ("layers", "heads", "kv_heads", "experts")}
    types = assign_types(list(shapes.items()), preset, architecture=architecture, **numbers, **options)
    return {name: kind.name for name, kind in types.items()}


@pytest.mark.parametrize("title", MODELS)
def test_every_preset_gives_every_tensor_the_type_llama_cpp_gives_it(title: str, tmp_path: Path) -> None:
    architecture, shapes, keys = _model(MODELS[title])
    source = tmp_path / "model-f32.gguf"
    header, entries = encode_header(
        hyperparameters(architecture, **keys), [(name, shape, TYPES["F32"]) for name, shape in shapes.items()]
    )
    with source.open("wb") as file:  # the dry run reads no weights: a hole will do
        file.write(header)
        file.truncate(len(header) + entries[-1].offset + entries[-1].nbytes + 32)
    cases = [(preset, imatrix) for preset in PRESETS.values() for imatrix in (False, True)]
    answers = llama_quantize(
        [
            {
                "source": str(source),
                "output": str(tmp_path / "unused.gguf"),
                "file_type": preset.file_type,
                "dry_run": True,
                "imatrix": imatrix,
            }
            for preset, imatrix in cases
        ]
    )
    compared = 0
    for (preset, imatrix), answer in zip(cases, answers, strict=True):
        try:
            ours = _assign(architecture, shapes, keys, preset.name, has_imatrix=imatrix)
        except UsageError as error:
            assert not imatrix and preset.needs_imatrix and "needs an importance matrix" in error.message
            continue
        except InputRefused:
            assert answer["status"] == "1" and "no tensor type fallback" in answer["log"]
            continue
        assert answer["status"] == "0", answer
        theirs = {name: answer.get(name, "F32") for name in shapes}
        assert ours == theirs, f"{preset.name}, imatrix {imatrix}"
        compared += 1
    assert compared >= 50


def test_norms_biases_position_tables_and_routers_are_never_quantized() -> None:
    for name, shape in {
        "blk.0.attn_norm.weight": (512,),
        "blk.0.attn_q.bias": (4, 512),
        "position_embd.weight": (64, 512),
        "token_types.weight": (2, 512),
        "blk.0.ffn_gate_inp.weight": (8, 512),
        "blk.0.ssm_conv1d.weight": (512, 4),
        "blk.0.weight_row.weight": (1, 512),
    }.items():
        assert not quantizable(name, shape, "llama"), name
    assert quantizable("blk.0.attn_q.weight", (512, 512), "llama")
    assert quantizable("blk.0.attn_kv_a_mqa.weight", (512, 512), "deepseek2")
    assert not quantizable("blk.0.attn_kv_a_mqa.weight", (512, 512), "glm5-next")


def test_presets_that_need_an_importance_matrix_name_those_that_do_not() -> None:
    architecture, shapes, keys = _model(MODELS["one layer"])
    for preset in PRESETS.values():
        if preset.needs_imatrix:
            with pytest.raises(UsageError, match=r"needs an importance matrix: blk\.0\.") as caught:
                _assign(architecture, shapes, keys, preset.name)
            assert "Q4_K_M" in str(caught.value.hint) and "IQ2_XS" not in str(caught.value.hint)
        else:
            assert len(_assign(architecture, shapes, keys, preset.name)) == len(shapes)


def test_a_preset_is_found_in_any_case_by_alias_and_by_its_neighbours() -> None:
    assert find_preset("q4_k_m") is find_preset("Q4_K") is PRESETS["Q4_K_M"]
    assert find_preset("mxfp4").name == "MXFP4_MOE"
    with pytest.raises(UsageError, match="unknown quantization 'Q4_KM'") as caught:
        find_preset("Q4_KM")
    assert "Q4_K_M" in str(caught.value.hint)


def test_an_override_does_not_shift_the_other_layers() -> None:
    """llama.cpp does shift them: 16 layers, Q4_K_M, one ffn_down given by hand moves the Q6_K ones (gguf.md 5)."""
    architecture, shapes, keys = _model({"layers": 16, "heads": 8, "kv_heads": 4})
    plain = _assign(architecture, shapes, keys, "Q4_K_M")
    changed = _assign(architecture, shapes, keys, "Q4_K_M", overrides={"blk.0.ffn_down.weight": "q8_0"})
    six = [i for i in range(16) if changed[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert six == [1, 4, 7, 10, 13, 14, 15]
    assert changed == plain | {"blk.0.ffn_down.weight": "Q8_0"}


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from([p.name for p in PRESETS.values()]),
    patterns=st.dictionaries(
        st.sampled_from(
            ["blk.2", "attn_v", "blk.?.ffn_down", "*.weight", "token_embd", "ffn_*", "blk.[01].attn_output"]
        ),
        st.just("Q5_K"),
        min_size=1,
    ),
)
def test_overrides_touch_what_they_match_and_nothing_else(preset: str, patterns: dict[str, str]) -> None:
    architecture, shapes, keys = _model({"layers": 4, "heads": 8, "kv_heads": 2, "tied": False})
    plain = _assign(architecture, shapes, keys, preset, has_imatrix=True)
    changed = _assign(architecture, shapes, keys, preset, has_imatrix=True, overrides=patterns)
    for name in shapes:
        hit = any(matches(pattern, name) for pattern in patterns) and quantizable(name, shapes[name], architecture)
        assert changed[name] == ("Q5_K" if hit else plain[name])


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("ffn_down", "blk.0.ffn_down.weight", True),
        ("ffn_down", "blk.0.ffn_down_exps.weight", False),
        ("blk.*.ffn_down.weight", "blk.11.ffn_down.weight", True),
        ("blk.1", "blk.1.attn_q.weight", True),
        ("blk.1", "blk.10.attn_q.weight", False),
        ("output", "output.weight", True),
        ("output", "blk.0.attn_output.weight", False),
        ("*output*", "blk.0.attn_output.weight", True),
        ("blk.1?", "blk.10.attn_q.weight", True),
        ("FFN_DOWN", "blk.0.ffn_down.weight", False),
        ("weight.blk", "blk.0.ffn_down.weight", False),
    ],
)
def test_a_pattern_matches_runs_of_whole_parts(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_most_literal_pattern_wins_in_any_order() -> None:
    architecture, shapes, keys = _model({"layers": 2, "heads": 8, "kv_heads": 4})
    rules = {"blk.*": "Q5_K", "blk.1.ffn_down.weight": "F16", "ffn_down": "Q8_0"}
    for order in (rules, dict(reversed(rules.items()))):
        types = _assign(architecture, shapes, keys, "Q4_K_M", overrides=order)
        assert types["blk.0.attn_q.weight"] == "Q5_K"
        assert types["blk.0.ffn_down.weight"] == "Q8_0"
        assert types["blk.1.ffn_down.weight"] == "F16"


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ({"ffn_dwon": "Q8_0"}, "matches no tensor", "ffn_down"),
        ({"blk.9": "Q8_0"}, "matches no tensor", "Did you mean 'blk."),
        ({"zzz": "Q8_0"}, "matches no tensor", "attn_k, attn_output, attn_q, attn_v, ffn_down"),
        ({"output": "Q8_0"}, "matches no tensor", "attn_output"),
        ({"attn_norm": "Q8_0"}, "only tensors that stay F32", "Norms"),
        ({"attn_v": "Q8_1"}, "'Q8_1' is not a tensor type", "Q8_0"),
        ({"attn_v": "Q4KM"}, "'Q4KM' is not a tensor type", "Q4_K"),
        ({"ffn_down": "IQ3_XXS"}, "needs an importance matrix", "--calibration"),
        ({"token_embd": "IQ2_XXS"}, "needs an importance matrix: token_embd.weight", "--calibration"),
        ({"blk.0.attn_?": "Q8_0", "blk.?.attn_v": "Q6_K"}, "both select blk.0.attn_v.weight", "longer"),
    ],
)
def test_an_override_that_can_not_be_meant_is_refused(overrides: dict[str, str], message: str, hint: str) -> None:
    architecture, shapes, keys = _model({"layers": 2, "heads": 8, "kv_heads": 4})
    with pytest.raises(UsageError) as caught:
        _assign(architecture, shapes, keys, "Q4_K_M", overrides=overrides)
    assert message in caught.value.message and hint in str(caught.value.hint)


def test_an_override_whose_block_does_not_divide_the_width_is_refused_not_replaced() -> None:
    architecture, shapes, keys = _model(MODELS["width that 32 divides"])
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q\.weight has 288 weights per row, Q6_K needs") as caught:
        _assign(architecture, shapes, keys, "Q4_K_M", overrides={"attn_q": "Q6_K"})
    assert "Q8_0" in str(caught.value.hint)
    assert _assign(architecture, shapes, keys, "Q4_K_M", overrides={"attn_q": "Q8_0"})["blk.0.attn_q.weight"] == "Q8_0"
