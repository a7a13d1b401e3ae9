"""What can be refused is refused from headers, in words that say what is possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pruning_models import cut, make

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused, UsageError
from edgepack.prune.anatomy import Sizes, find_anatomy, sizes_of
from edgepack.prune.request import Request, Sparsity, check, from_json, parse
from edgepack.prune.request import make as asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth=2,ffn=1024", Request(depth=2, ffn=1024)),
        ("layers=7+3", Request(layers=(3, 7))),
        ("depth=2, refit", Request(depth=2, refit=True)),
        ("depth=1, method=influence", Request(depth=1, method="influence")),
        ("kv_heads=2", Request(kv_heads=2)),
        ("sparsity=wanda:0.5", Request(sparsity=Sparsity("wanda", 0.5))),
        ("sparsity=2:4", Request(sparsity=Sparsity("wanda", 0.5, 2, 4))),
        ("vocabulary=a.txt+b", Request(vocabulary=("a.txt", "b"))),
    ],
)
def test_what_is_written_is_what_is_asked(text: str, expected: Request) -> None:
    assert parse(text) == expected
    assert from_json(json.loads(json.dumps(expected.as_json()))) == expected


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("dept=2", "expected KEY=VALUE", "Did you mean depth?"),
        ("", "expected KEY=VALUE", ""),
        ("depth=2,depth=3", "given twice", ""),
        ("depth=two", "whole number", ""),
        ("depth=0", "at least 1", ""),
        ("depth=-1", "whole number", ""),
        ("depth=2,layers=1", "both given", ""),
        ("layers=1+1", "only once", ""),
        ("layers=a", "expected numbers", ""),
        ("depth=1,method=magic", "greedy, influence, angular", ""),
        ("ffn=512,method=greedy", "depth is not given", ""),
        ("sparsity=0.5", "sparsity is '0.5'", "wanda:0.5"),
        ("sparsity=wanda:1.5", "sparsity is", "2:4"),
        ("sparsity=4:2", "fewer kept", ""),
        ("refit", "nothing to prune", ""),
        ("refit,depth=1,refit", "given twice", ""),
        ("refit=yes,depth=1", "expected KEY=VALUE", "Did you mean refit?"),
        ("vocabulary=a.txt,refit", "none of them go", "Leave refit out"),
        ("depth=1,refit,sparsity=2:4", "fill the zeros", "one of them"),
    ],
)
def test_what_can_not_be_asked(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(text)
    assert hint in (caught.value.hint or "")


def test_nothing_is_no_request() -> None:
    with pytest.raises(UsageError, match="nothing to prune"):
        asked()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ({"depth": 4}, "would leave none", "at most 3"),
        ({"depth": 9}, "would leave none", ""),
        ({"layers": "0,1,2,3"}, "would leave none", ""),
        ({"layers": "4"}, "has no layer 4", ""),
        ({"ffn": 50}, "multiple of 32", "Possible: 32, 64."),
        ({"ffn": 96}, "below the 96", ""),
        ({"ffn": 0}, "multiple of 32", ""),
        ({"kv_heads": 2}, "expected fewer", "Possible: 1."),
        ({"kv_heads": 0}, "at least 1", ""),
        ({"vocabulary": ("nowhere.txt",)}, "no such file", ""),
    ],
)
def test_what_does_not_fit_the_model(words: dict[str, Any], message: str, hint: str, llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    anatomy = find_anatomy(checkpoint)
    with pytest.raises(UsageError, match=message) as caught:
        check(asked(**words), anatomy, sizes_of(checkpoint, anatomy), "model")
    assert hint in (caught.value.hint or "")


def test_wide_models_are_cut_in_superblocks_of_k_quants(llama: Path) -> None:
    anatomy = find_anatomy(open_checkpoint(llama))
    sizes = Sizes(layers=12, ffn=1280, heads=8, kv_heads=4, head=64, vocabulary=8192)
    check(asked(ffn=1024, kv_heads=2), anatomy, sizes, "model")
    with pytest.raises(UsageError, match="multiple of 256") as caught:
        check(asked(ffn=1100), anatomy, sizes, "model")
    assert caught.value.hint == "Possible: 256, 512, 768, 1024."
    with pytest.raises(UsageError, match="rows of 384, expected a multiple of 256") as caught:
        check(asked(kv_heads=3), anatomy, sizes, "model")
    assert caught.value.hint == "Possible: 2."


def test_heads_that_a_family_can_not_lose_are_refused_with_the_reason(tmp_path: Path) -> None:
    for family, reason in (("bert", "hidden_size / heads"), ("phi3", "one tensor"), ("olmo3", "spans all heads")):
        checkpoint = open_checkpoint(make(family, tmp_path / family))
        anatomy = find_anatomy(checkpoint)
        with pytest.raises(UsageError, match=reason):
            check(asked(kv_heads=1), anatomy, sizes_of(checkpoint, anatomy), family)


def test_a_pattern_the_runtime_hard_codes_is_kept(llama: Path) -> None:
    from edgepack.prune.anatomy import ANATOMIES

    sizes = Sizes(layers=12, ffn=96, heads=4, kv_heads=2, head=16, vocabulary=100)
    check(asked(depth=4), ANATOMIES["smollm3"], sizes, "model")
    check(asked(layers="1,2,3,4"), ANATOMIES["smollm3"], sizes, "model")
    for words in ({"depth": 3}, {"layers": "1,2,3,5"}):
        with pytest.raises(UsageError, match=r"every 4th layer"):
            check(asked(**words), ANATOMIES["smollm3"], sizes, "model")


def test_layer_0_of_modernbert_stays(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make("modernbert", tmp_path / "source"))
    anatomy = find_anatomy(checkpoint)
    with pytest.raises(UsageError, match="layer 0 of model can't go"):
        check(asked(layers="0"), anatomy, sizes_of(checkpoint, anatomy), "model")


def rewrite(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def test_experts_are_refused(tmp_path: Path) -> None:
    source = rewrite(make("llama", tmp_path / "source"), num_local_experts=8)
    with pytest.raises(InputRefused, match="mixture of experts"):
        find_anatomy(open_checkpoint(source))


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    source = rewrite(make("llama", tmp_path / "source"), model_type="mamba")
    with pytest.raises(InputRefused, match="mamba can't be pruned; expected one of"):
        find_anatomy(open_checkpoint(source))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers 5, the tensors are of layers 0 to 3"),
        ({"intermediate_size": 128}, "intermediate_size 128"),
        ({"num_key_value_heads": 3}, "not a multiple of 3"),
        ({"vocab_size": None}, "expected a positive number"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(rewrite(make("llama", tmp_path / "source"), **keys))
    with pytest.raises(InputRefused, match=message):
        sizes_of(checkpoint, find_anatomy(checkpoint))


def test_layers_that_depend_on_their_number_are_refused(tmp_path: Path) -> None:
    source = rewrite(make("gpt2", tmp_path / "source"), scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputRefused, match="scale_attn_by_inverse_layer_idx"):
        cut(source, tmp_path / "pruned", layers=(0, 1))
