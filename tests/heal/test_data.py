from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepack.errors import InputRefused, UsageError
from edgepack.heal import data
from edgepack.heal.budget import parse_tokens
from edgepack.heal.schedule import learning_rate


def pieces(windows: int, tokens: int = 96, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 500, (windows, tokens)).tolist()


def test_no_window_is_trained_on_and_held_out() -> None:
    given = pieces(130)
    training, held_out, left_out = data.split(given)
    assert (len(training), len(held_out), left_out) == (117, 13, 0)
    assert sorted(map(tuple, [*training.tolist(), *held_out.tolist()])) == sorted(map(tuple, given))
    places = [given.index(window) for window in held_out.tolist()]
    assert max(places) > 100 and min(places) < 30  # from all over the text


def test_windows_that_repeat_held_out_text_are_left_out() -> None:
    given = pieces(60)
    first = given.index(data.split(given)[1].tolist()[0])
    copied = given[first]
    other = 0 if first > 5 else 59
    given[other] = [1, 2, 3, *copied[: data.SHARED_TOKENS + 4], *given[other][data.SHARED_TOKENS + 7 :]]
    training, held_out, left_out = data.split(given)
    assert left_out == 1
    assert given[other] not in training.tolist() and given[other] not in held_out.tolist()


def test_a_text_of_three_windows_or_of_one_repeated_is_refused() -> None:
    with pytest.raises(InputRefused, match="3 windows of 96 tokens, expected at least 4"):
        data.split(pieces(3))
    with pytest.raises(InputRefused, match="repeats itself"):
        data.split(pieces(1) * 40)


class Talker(torch.nn.Module):
    """A model of transformers as far as `sampled` looks: token n is followed by n + 1 or, one time in four, n + 2."""

    def __init__(self, vocabulary: int = 50) -> None:
        super().__init__()
        ids = torch.arange(vocabulary)
        rows = torch.full((vocabulary, vocabulary), -torch.inf)
        rows[ids, (ids + 1) % vocabulary], rows[ids, (ids + 2) % vocabulary] = float(np.log(3)), 0.0
        self.rows = torch.nn.Parameter(rows)
        self.calls = 0

    def forward(self, ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.calls += 1

        class Output:
            logits = self.rows[ids]

        Output.past_key_values = past_key_values  # type: ignore[attr-defined]
        return Output


def test_sampled_text_is_drawn_from_the_model_and_the_same_again() -> None:
    found = data.sampled(Talker(), torch.tensor([4]), 40, 200)
    steps = (found[:, 1:] - found[:, :-1]) % 50
    assert found.shape == (40, 200) and (found[:, 0] == 4).all()
    assert set(steps.unique().tolist()) == {1, 2}
    assert float((steps == 2).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(found, data.sampled(Talker(), torch.tensor([4]), 40, 200))


def test_a_model_of_transformers_writes_what_it_would_without_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(torch, "multinomial", lambda likely, count, generator: likely.argmax(-1, keepdim=True))
    found = data.sampled(model, torch.tensor([3, 9]), 2, 12)
    for row in found:
        for place in range(1, 12):
            with torch.no_grad():
                assert int(model(row[None, :place]).logits[0, -1].argmax()) == int(row[place])


def test_what_two_passes_do_not_cover_is_sampled_once_and_kept(tmp_path: Path) -> None:
    given, talker = [[token % 50 for token in window] for window in pieces(40)], Talker()
    enough = data.training_text(talker, given, 72 * 96, journal=tmp_path)
    assert (len(enough.training), enough.sampled, talker.calls) == (36, 0, 0)
    more = data.training_text(talker, given, 100 * 96, journal=tmp_path)
    assert (len(more.training), more.sampled) == (50, 14) and talker.calls > 0
    talker.calls = 0
    again = data.training_text(talker, given, 100 * 96, journal=tmp_path)
    assert talker.calls == 0 and torch.equal(again.training, more.training)
    assert data.training_text(talker, given, 100 * 96, journal=tmp_path, sample=False).sampled == 0


@pytest.mark.parametrize(
    ("text", "tokens"), [("200k", 200_000), ("2M", 2_000_000), ("1.5m", 1_500_000), ("4096", 4096)]
)
def test_tokens_are_read_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--refine") == tokens


@pytest.mark.parametrize("text", ["", "many", "-5k", "2MB", "1e6", "nan", "0", "1k", "9" * 40])
def test_what_is_no_number_of_tokens_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--refine"):
        parse_tokens(text, "--refine")


def test_the_rate_rises_to_its_peak_and_falls_to_its_share() -> None:
    for decay in ("cosine", "linear"):
        rates = [
            learning_rate(step, 100, peak=1.0, warmup=10, decay=decay, final=0.05)  # type: ignore[arg-type]
            for step in range(101)
        ]
        assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
        assert max(rates) == rates[10] == 1.0 and rates[100] == pytest.approx(0.05)
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))
        assert rates[55] == pytest.approx(0.525)
