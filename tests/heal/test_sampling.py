"""Text that a model writes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from talker import Talker

from edgepack.errors import StepError
from edgepack.heal import sampling
from edgepack.heal.sampling import sampled


def test_sampled_text_is_drawn_from_the_model_and_the_same_again() -> None:
    found = sampled(Talker(), torch.tensor([4]), 40, 200)
    steps = (found[:, 1:] - found[:, :-1]) % 50
    assert found.shape == (40, 200) and (found[:, 0] == 4).all()
    assert set(steps.unique().tolist()) == {1, 2}
    assert float((steps == 2).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(found, sampled(Talker(), torch.tensor([4]), 40, 200))


def models() -> dict[str, Any]:
    """Attention to everything, to a few tokens, and to both in turns."""
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(5)
    return {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval(),
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=5)).eval(),
        "gemma2": transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, sliding_window=5)).eval(),
    }


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_model_of_transformers_writes_what_it_would_without_its_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models()[name]
    monkeypatch.setattr(sampling, "drawn", lambda logits, generator: logits.argmax(-1, keepdim=True))
    found = sampled(model, torch.tensor([3, 9]), 2, 12)
    for row in found:
        for place in range(1, 12):
            with torch.no_grad():
                assert int(model(row[None, :place]).logits[0, -1].argmax()) == int(row[place])


def test_keys_and_values_stay_where_they_are_while_a_window_is_written() -> None:
    model = models()["llama"]
    places = []
    model.register_forward_hook(lambda *call: places.append(call[-1].past_key_values.layers[0].keys.data_ptr()))
    sampled(model, torch.tensor([3]), 1, 30)
    # The first is asked how much it keeps; the second token's has moved to where there is room.
    assert len(places) == 30 and len(set(places[2:])) == 1


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    found = sampling.drawn(likely.log().expand(40_000, -1), torch.Generator().manual_seed(1))
    shares = torch.bincount(found[:, 0], minlength=7) / 40_000
    assert found.shape == (40_000, 1)
    assert shares.tolist() == pytest.approx(likely.tolist(), abs=0.01)
    assert (shares[likely == 0] == 0).all()


def test_logits_that_are_no_numbers_end_it() -> None:
    with pytest.raises(StepError, match="NaN or infinite logits"):
        sampling.drawn(torch.tensor([[0.0, float("nan")]]), torch.Generator())
