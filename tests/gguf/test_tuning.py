"""Types chosen within a size: exact bytes, presets as candidates, and refusals that say what is possible."""

from __future__ import annotations

import random
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_quantize import random_importance, random_model

from edgepack.errors import BudgetError, StepError
from edgepack.gguf import tuning
from edgepack.gguf.file import string
from edgepack.gguf.imatrix import Imatrix
from edgepack.gguf.layout import Layout, plan_layout
from edgepack.gguf.model import ModelSpec
from edgepack.gguf.overrides import matches
from edgepack.gguf.size import parse_size
from edgepack.gguf.stream import stream
from edgepack.gguf.types import TYPES

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
PRESETS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
KEYS = {"edgepack.quantize": string("4.50bpw")}
MODELS = {
    "tied": random_model(layers=3, heads=8, vocab=512, ffn=512),
    "untied": random_model(layers=2, heads=8, vocab=512, ffn=512, tied=False),
    "narrow": random_model(layers=2, width=96, ffn=160, heads=3, kv_heads=1, vocab=128),
}


def importance_of(model: ModelSpec) -> Imatrix:
    return tuning.expected_imatrix(model, ["calibration.txt"])


def room_of(
    model: ModelSpec,
    kinds: tuple[str, ...] = K_TYPES,
    overrides: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
) -> tuning.Room:
    return tuning.room(
        model, kinds, overrides=overrides or {}, imatrix=importance_of(model), shard_bytes=shard_bytes,
        extra_metadata=KEYS,
    )  # fmt: skip


def layout_of(model: ModelSpec, types: Mapping[str, str], base: str, shard_bytes: int | None = None) -> Layout:
    return plan_layout(
        model, base, overrides=types, imatrix=importance_of(model), shard_bytes=shard_bytes, extra_metadata=KEYS
    )


def presets_of(model: ModelSpec, overrides: Mapping[str, str] | None = None) -> dict[str, Layout]:
    return {name: layout_of(model, overrides or {}, name) for name in PRESETS}


def costs_of(where: tuning.Room, presets: Mapping[str, Layout], seed: int) -> dict[str, dict[str, float]]:
    """Some cost for every type on offer and every type of a preset: mostly falling with bits, as measured ones do."""
    draw = random.Random(seed)
    costs = {}
    for name, kinds in where.kinds.items():
        importance = 10 ** draw.uniform(-4, 0)
        every = sorted({*kinds, *(layout.types[name].name for layout in presets.values())})
        costs[name] = {kind: importance * 4 ** -TYPES[kind].bits_per_weight * draw.uniform(0.6, 1.6) for kind in every}
    return costs


@given(st.sampled_from(sorted(MODELS)), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_file_is_never_larger_than_asked_and_never_predicted_worse_than_a_preset(
    name: str, part: float, seed: int
) -> None:
    model = MODELS[name]
    where, presets = room_of(model), presets_of(model)
    costs = costs_of(where, presets, seed)
    budget = int(where.least + part * (where.most - where.least))
    chosen = tuning.choose(where, costs, parse_size(f"{budget}B"), presets)
    layout = layout_of(model, chosen.types, chosen.base)
    assert layout.total_bytes <= budget
    assert {tensor: layout.types[tensor].name for tensor in chosen.types} == chosen.types
    assert chosen.types.keys() == where.kinds.keys()
    assert chosen.predicted_kld == pytest.approx(sum(costs[key][kind] for key, kind in chosen.types.items()), rel=1e-3)
    fitting = {key: found for key, found in presets.items() if found.total_bytes <= budget}
    for found in fitting.values():
        price = sum(costs[key][found.types[key].name] for key in where.kinds)
        assert chosen.predicted_kld <= price * (1 + 1e-3)  # predictions of presets have four digits
    assert (chosen.runner_up is None) == (not fitting)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_room_counts_the_bytes_of_every_file_exactly(name: str) -> None:
    model = MODELS[name]
    where = room_of(model)
    draw = random.Random(1)
    for _ in range(20):
        types = {key: draw.choice(kinds) for key, kinds in where.kinds.items()}
        layout = layout_of(model, types, "Q4_K_M")
        expected = where.fixed + sum(where.nbytes(key, kind) for key, kind in types.items())
        assert layout.total_bytes == expected
        assert where.bits_per_weight(expected) == pytest.approx(layout.bits_per_weight, rel=2e-3)


def test_the_smallest_and_the_largest_file_are_least_and_most() -> None:
    where = room_of(MODELS["untied"])
    costs = costs_of(where, {}, seed=1)
    smallest = tuning.choose(where, costs, parse_size(f"{where.least}B"), {})
    assert layout_of(where.model, smallest.types, "Q4_K_M").total_bytes == where.least
    assert set(smallest.types.values()) == {"Q2_K"}
    every_bit_helps = {
        name: {kind: -TYPES[kind].bits_per_weight for kind in kinds} for name, kinds in where.kinds.items()
    }
    largest = tuning.choose(where, every_bit_helps, parse_size(f"{where.most}B"), {})
    assert layout_of(where.model, largest.types, "Q4_K_M").total_bytes == where.most
    assert set(largest.types.values()) == {"Q8_0"}


@given(st.floats(2.7, 8.5))
@settings(max_examples=40, deadline=None)
def test_bits_that_were_asked_for_are_not_exceeded(bits: float) -> None:
    where = room_of(MODELS["tied"])
    size = parse_size(f"{bits:.3f}bpw")
    try:
        chosen = tuning.choose(where, costs_of(where, {}, seed=4), size, {})
    except BudgetError:
        assert where.budget(size) < where.least
        return
    layout = layout_of(where.model, chosen.types, chosen.base)
    assert layout.bits_per_weight <= size.bits_per_weight
    assert layout.bits_per_weight > min(bits, where.bits_per_weight(where.most)) - 0.3


def test_one_byte_below_the_least_says_what_is_possible_and_what_layers_would_bring() -> None:
    where = room_of(MODELS["tied"])
    presets = presets_of(where.model)
    costs = costs_of(where, presets, seed=2)
    tuning.choose(where, costs, parse_size(f"{where.least}B"), presets)
    with pytest.raises(BudgetError, match="are too few") as refused:
        tuning.choose(where, costs, parse_size(f"{where.least - 1}B"), presets)
    assert f"The least is {where.least:,} bytes" in str(refused.value.hint)
    assert "1 of 3 would have to go" in str(refused.value.hint)
    layer = sum(where.nbytes(name, "Q2_K") for name in where.kinds if name.startswith("blk.0."))
    assert f"Each layer less would save {layer:,} bytes" in str(refused.value.hint)
    with pytest.raises(BudgetError) as refused:
        tuning.choose(where, costs, parse_size("1KB"), presets)
    assert "layer" not in str(refused.value.hint)  # no number of them would do


def test_a_pinned_tensor_keeps_its_type_at_every_size() -> None:
    overrides = {"blk.1.attn_v.weight": "Q8_0", "token_embd.weight": "F16"}
    model = MODELS["tied"]
    where, presets = room_of(model, overrides=overrides), presets_of(model, overrides)
    assert where.kinds["token_embd.weight"] == ("F16",) and where.kinds["blk.1.attn_v.weight"] == ("Q8_0",)
    for budget in (where.least, (where.least + where.most) // 2, where.most):
        chosen = tuning.choose(where, costs_of(where, presets, seed=3), parse_size(f"{budget}B"), presets)
        layout = layout_of(model, chosen.types, chosen.base)
        assert layout.total_bytes <= budget
        assert {name: layout.types[name].name for name in overrides} == overrides


@pytest.mark.parametrize("megabytes", [0.2, 0.4, 1.0])
def test_shards_together_stay_within_the_size(megabytes: float) -> None:
    model, shard = MODELS["untied"], int(megabytes * 1e6)
    where = room_of(model, (*K_TYPES, "F16"), shard_bytes=shard)
    for part in (0.0, 0.2, 0.5, 0.9, 1.0):
        budget = int(where.least + part * (where.most - where.least))
        chosen = tuning.choose(where, costs_of(where, {}, seed=6), parse_size(f"{budget}B"), {})
        layout = layout_of(model, chosen.types, chosen.base, shard)
        assert layout.total_bytes <= budget
        assert len(layout.shards) > 1 or megabytes == 1.0


def test_rows_that_256_does_not_divide_get_types_of_small_blocks() -> None:
    where = room_of(MODELS["narrow"])
    assert {kind for kinds in where.kinds.values() for kind in kinds} == set(tuning.SMALL_BLOCKS)
    odd = random_model(width=72, ffn=40, heads=3, kv_heads=1, vocab=48)
    assert room_of(odd).kinds["blk.0.attn_q.weight"] == room_of(odd).kinds["blk.0.ffn_down.weight"] == ("F16",)


def test_types_that_need_importance_values_are_not_offered_to_a_table_without() -> None:
    kinds = room_of(MODELS["untied"], ("IQ2_XS", "Q4_K")).kinds
    assert kinds["token_embd.weight"] == ("Q4_K",)
    assert kinds["output.weight"] == ("IQ2_XS", "Q4_K")
    assert room_of(MODELS["tied"], ("IQ2_XS", "Q4_K")).kinds["token_embd.weight"] == ("IQ2_XS", "Q4_K")


@given(
    st.sampled_from(
        ["blk.1", "output", "attn_v.weight", "blk.1.attn_v.weight", "", ".", "blk", "weight", "]", "1.attn_v"]
    ),
    st.sampled_from(
        ["blk.1.attn_v.weight", "blk.10.attn_v.weight", "output.weight", "blk.1.attn_output.weight", "a]b"]
    ),
)
def test_a_pattern_without_wildcards_selects_what_the_rule_of_wildcards_says(pattern: str, name: str) -> None:
    assert matches(pattern, name) == fnmatchcase(f".{name}.", f"*.{pattern}.*")


def test_the_profile_s_types_win_over_those_of_its_presets() -> None:
    assert tuning.allowed_types(("Q8_0", "Q4_K_M", "Q4_K_S", "Q2_K"), ()) == ("Q8_0", "Q4_K", "Q2_K")
    assert tuning.allowed_types(("Q8_0",), ("IQ3_S", "Q4_0")) == ("IQ3_S", "Q4_0")


def test_a_preset_that_is_predicted_better_is_taken_as_it_is() -> None:
    model = MODELS["tied"]
    where, presets = room_of(model, ("Q2_K", "Q3_K")), presets_of(model)
    costs = costs_of(where, presets, seed=8)
    budget = presets["Q5_K_M"].total_bytes  # it holds types that are not on offer, and they are better
    chosen = tuning.choose(where, costs, parse_size(f"{budget}B"), presets)
    assert chosen.runner_up is not None and chosen.runner_up["quantize"] == chosen.base
    assert layout_of(model, chosen.types, chosen.base).total_bytes <= budget
    assert chosen.types == {name: presets[chosen.base].types[name].name for name in where.kinds}


def test_a_tensor_without_a_price_is_a_step_that_failed() -> None:
    where = room_of(MODELS["tied"])
    with pytest.raises(StepError, match=r"token_embd\.weight was not priced as Q2_K"):
        tuning.choose(where, {}, parse_size("100MB"), {})


def test_the_header_is_exact_before_the_importance_matrix_is_there(tmp_path: Path) -> None:
    model = MODELS["tied"]
    where = room_of(model)
    chosen = tuning.choose(where, costs_of(where, {}, seed=9), parse_size("4.5bpw"), {})
    planned = layout_of(model, chosen.types, chosen.base)
    table = {"token_embd.weight": importance_of(model).values["token_embd.weight"] + 1}
    made = Imatrix(random_importance(model) | table, "f" * 64, ("calibration.txt",), 100)
    layout = plan_layout(model, chosen.base, overrides=chosen.types, imatrix=made, extra_metadata=KEYS)
    assert layout.total_bytes == planned.total_bytes
    written = stream(model, layout, tmp_path, stem="m", threads=2, imatrix=made)
    assert sum(path.stat().st_size for path in written.paths) == planned.total_bytes
