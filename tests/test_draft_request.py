from __future__ import annotations

from dataclasses import replace

import pytest

from edgepack.draft_request import HEAL_TOKENS, LONGEST, QUANTIZE, DraftRequest, parse
from edgepack.errors import UsageError
from edgepack.prune.anatomy import ANATOMIES, Sizes
from edgepack.prune.request import Request

LLAMA = ANATOMIES["llama"]
SIZES = Sizes(layers=7, ffn=768, heads=4, kv_heads=2, head=64, vocabulary=2048)


def test_nothing_said_asks_for_the_defaults() -> None:
    assert parse("") == DraftRequest(None, HEAL_TOKENS, QUANTIZE, None)


def test_every_key_is_read() -> None:
    found = parse("depth=4, ffn=512,kv_heads=1,method=influence,heal=200k,quantize=q4_k,length=4")
    assert found.prune == Request(depth=4, method="influence", ffn=512, kv_heads=1)
    assert (found.heal, found.quantize, found.length) == (200_000, "Q4_K_M", 4)
    assert found.as_json() == {"heal": 200_000, "quantize": "Q4_K_M", "length": 4}


def test_layers_may_be_named() -> None:
    assert parse("layers=3+5").prune == Request(layers=(3, 5))


def test_healing_can_be_left_out() -> None:
    assert parse("heal=none").heal == parse("heal=0").heal == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocabulary=de.txt", "vocabulary is not for drafts: token ids go from draft to artifact"),
        ("sparsity=2:4", "sparsity is not for drafts: zeros make no draft faster"),
        ("deepth=3", "'deepth=3': expected KEY=VALUE"),
        ("depth", "'depth': expected KEY=VALUE"),
        ("depth=", "'depth=': expected KEY=VALUE"),
        ("depth=2,depth=3", "depth is given twice"),
        ("depth=x", "depth is 'x', expected a whole number"),
        ("heal=much", "heal= much: not a number of tokens"),
        ("quantize=Q9", "unknown quantization 'Q9'"),
        ("length=0", f"expected 1 to {LONGEST}"),
        ("length=17", f"expected 1 to {LONGEST}"),
        ("length=four", f"expected 1 to {LONGEST}"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("+", r"\+")):
        parse(text)


def test_a_misspelt_key_is_corrected() -> None:
    with pytest.raises(UsageError) as caught:
        parse("quantise=Q4_0")
    assert caught.value.hint == "Did you mean quantize?"


def test_half_of_the_layers_go_by_default() -> None:
    assert DraftRequest().cut(LLAMA, SIZES) == Request(depth=3)


def test_layers_of_a_hard_coded_pattern_go_in_whole_runs() -> None:
    smollm3 = ANATOMIES["smollm3"]
    assert DraftRequest().cut(smollm3, replace(SIZES, layers=36)) == Request(depth=16)
    with pytest.raises(UsageError, match="a model of 7 layers"):
        DraftRequest().cut(smollm3, SIZES)


def test_what_is_asked_for_comes_before_the_default() -> None:
    assert parse("ffn=512").cut(LLAMA, SIZES) == Request(ffn=512)
