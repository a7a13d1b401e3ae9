"""Drafted answers against plain ones and against a loop without caches; the figures made of them against arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack import worker
from edgepack.errors import InputRefused
from edgepack.gguf.file import read_gguf
from edgepack.measure import speculative as module
from edgepack.measure.draft_worth import Elsewhere
from edgepack.measure.drafted_answer import Answer, alone, together
from edgepack.measure.speculative import Pair, summary
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import default_evaluation_text

PROMPTS = (
    "The purpose of a test is to find out whether",
    "def main(arguments):\n    ",
    "In 2024 there were 365 days and",
)
TOKENS, LENGTH = 24, 3
SETTINGS: dict[str, Any] = {
    "text": str(default_evaluation_text()),
    "prompts": 3,
    "tuning_prompts": 2,
    "prompt_tokens": 24,
    "tokens": 16,
    "threads": 1,
    "gpu_layers": 0,
}


def scrambled(path: Path, to: Path) -> Path:
    """A copy of a float32 GGUF with random matrices of the same spread."""
    header = read_gguf(path)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(5)
    for entry in header.tensors.values():
        if len(entry.shape) > 1:
            place = header.data_offset + entry.offset
            weights = np.frombuffer(bytes(data[place : place + entry.nbytes]), dtype=np.float32)
            data[place : place + entry.nbytes] = (
                generator.normal(0, weights.std(), weights.size).astype(np.float32).tobytes()
            )
    to.write_bytes(bytes(data))
    return to


@pytest.fixture(scope="module")
def noise(f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same vocabulary that knows nothing."""
    return scrambled(f32, tmp_path_factory.mktemp("noise") / "noise.gguf")


def exactly(path: Path) -> Model:
    """A model whose logits do not depend on how many tokens are read at once, but for the last bits."""
    return Model(path, context=96, threads=1, kv_type="f32", flash_attention=False)


@pytest.fixture(scope="module")
def artifact(f32: Path) -> Iterator[Model]:
    with exactly(f32) as model:
        yield model


@pytest.fixture(scope="module", params=["itself", "quantized", "noise"])
def draft(request: pytest.FixtureRequest, f32: Path, q4: Path, noise: Path) -> Iterator[Model]:
    with exactly({"itself": f32, "quantized": q4, "noise": noise}[request.param]) as model:
        yield model


def likeliest(model: Model, ids: Sequence[int]) -> int:
    """The next token, the whole text read anew."""
    return int(model.logits([list(ids)], len(ids) - 1)[0, 0].argmax())


def naively(artifact: Model, draft: Model, prompt: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Tokens, drafted and accepted ones a pass: by the definition, without a cache, token by token."""
    text = [*prompt, likeliest(artifact, prompt)]
    end = len(prompt) + TOKENS
    drafted, accepted = [], []
    while len(text) < end:
        proposed: list[int] = []
        while len(proposed) < min(LENGTH, end - len(text) - 1):
            proposed.append(likeliest(draft, text + proposed))
        kept = 0
        while kept < len(proposed) and likeliest(artifact, text) == proposed[kept]:
            text.append(proposed[kept])
            kept += 1
        text.append(likeliest(artifact, text))
        drafted.append(len(proposed))
        accepted.append(kept)
    return text[len(prompt) :], drafted, accepted


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_loop_is_the_definition_without_caches(artifact: Model, draft: Model, prompt: str) -> None:
    ids = artifact.tokenize(prompt, add_special=True, parse_special=False)
    expected, drafted, accepted = naively(artifact, draft, ids)
    answer = together(artifact, draft, ids, TOKENS, LENGTH)
    assert list(answer.ids) == expected
    assert list(answer.drafted) == drafted
    assert list(answer.accepted) == accepted


@pytest.mark.parametrize("prompt", PROMPTS)
def test_whatever_is_proposed_the_answer_is_the_artifacts(artifact: Model, draft: Model, prompt: str) -> None:
    ids = artifact.tokenize(prompt, add_special=True, parse_special=False)
    assert together(artifact, draft, ids, TOKENS, LENGTH).ids == alone(artifact, ids, TOKENS).ids


def test_plain_answers_are_those_of_transformers(artifact: Model, example: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = artifact.tokenize(PROMPTS[0], add_special=True, parse_special=False)
    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    text = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(TOKENS):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert alone(artifact, ids, TOKENS).ids == tuple(text[0, len(ids) :].tolist())


def measure(artifact: Path, draft: Path, **changes: Any) -> dict[str, Any]:
    """As a build does it, in a worker."""
    arguments = SETTINGS | {"artifact": str(artifact), "draft": str(draft), "lengths": [3]} | changes
    return dict(worker.run("edgepack.measure.speculative:speculative", arguments, what="drafting"))


@pytest.fixture(scope="module")
def of_itself(f32: Path) -> dict[str, Any]:
    return measure(f32, f32)


def test_a_draft_equal_to_the_artifact_has_everything_accepted(of_itself: dict[str, Any]) -> None:
    assert of_itself["acceptance"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert of_itself["token_acceptance"] == 1
    assert of_itself["tokens_per_pass"] == pytest.approx(15 / 4, abs=1e-3)  # 15 tokens after the first: 4 + 4 + 4 + 3
    assert of_itself["drafted"] == 3 * 11
    assert of_itself["identical"] == of_itself["n"] == 3
    assert of_itself["differences"] == []


def test_the_speed_up_follows_from_the_costs_it_is_stated_with(of_itself: dict[str, Any]) -> None:
    per_pass = of_itself["drafted"] / (3 * 4)
    cost = of_itself["pass_cost"] + of_itself["draft_cost"] * (per_pass + of_itself["pass_cost"])
    assert of_itself["tokens_per_pass"] / cost == pytest.approx(of_itself["speed_up"]["value"], rel=1e-2)
    speeds = of_itself["together_tokens_per_s"] / of_itself["alone_tokens_per_s"]
    assert speeds == pytest.approx(of_itself["speed_up"]["value"], rel=1e-3)
    # two equal models, one of them more work: no honest clock says that this is faster than one
    assert of_itself["speed_up"]["value"] < 1.1


def test_a_draft_of_noise_is_hardly_ever_right(f32: Path, noise: Path) -> None:
    found = measure(f32, noise)
    assert found["acceptance"]["value"] < 0.03
    assert found["tokens_per_pass"] < 1.1
    assert found["speed_up"]["ci95"][1] < 1


def test_a_quantized_answer_parts_only_where_two_tokens_were_close(q4: Path) -> None:
    found = measure(q4, q4, lengths=[8], prompts=6)
    assert found["identical"] + len(found["differences"]) == 6
    assert found["acceptance"]["value"] > 0.9
    # llama.cpp's kernels for five tokens and more round Q4_K otherwise: up to 0.3 in a logit of this model
    assert all(0 <= difference["margin"] < 1 for difference in found["differences"])


def test_the_length_is_chosen_on_prompts_that_nothing_else_is_measured_on(q4: Path, f32: Path) -> None:
    found = measure(f32, q4, lengths=[1, 4], elsewhere={"draft_cost": 1e-3, "on_cpu": False})
    assert [row["length"] for row in found["tried"]] == [1, 4]
    assert all(row["n"] == 2 for row in found["tried"])
    assert found["n"] == 3
    assert found["length"] == 4  # a draft that costs nothing is asked for as much as it can give
    assert found["settings"]["tuning_prompts"] == 2


def row(length: int, tokens: float, gain: float, pass_cost: float) -> dict[str, Any]:
    return {"length": length, "tokens_per_pass": tokens, "speed_up": {"value": gain}, "pass_cost": pass_cost}


def test_the_clock_decides_here_and_the_formula_elsewhere() -> None:
    tried = [row(2, 2.5, 1.4, 1.1), row(4, 3.5, 1.2, 2.0), row(8, 4.0, 0.9, 4.0)]
    assert module._best(tried, None) == 2
    assert module._best(tried, Elsewhere(0.1, False)) == 4
    assert module._best(tried, Elsewhere(0.1, True)) == 2
    assert module._best(tried, Elsewhere(None, True)) == 8


def answer(
    ids: int, ms: float, drafted: tuple[int, ...] = (), accepted: tuple[int, ...] = (), passes: float = 0.0
) -> Answer:
    return Answer(tuple(range(ids)), 5.0, ms, drafted, accepted, passes)


def test_figures_are_those_of_a_hand_calculation() -> None:
    first = Pair((1, 2), answer(7, 60.0), answer(7, 40.0, (3, 2), (2, 2), 24.0))  # 3 + 3 tokens in two passes
    second = Pair((3, 4), answer(7, 60.0), answer(7, 80.0, (3, 3, 3, 0), (0, 0, 2, 0), 48.0))
    found = summary([first, second], 3)
    assert found["acceptance"]["value"] == pytest.approx(6 / 14, rel=1e-4)
    # judged: 2 accepted and 1 rejected, 2; 1 rejected, 1 rejected, 2 accepted and 1 rejected
    assert found["token_acceptance"] == pytest.approx(6 / 10)
    assert found["tokens_per_pass"] == 12 / 6
    assert found["speed_up"]["value"] == 1
    assert found["speed_up"]["ci95"] == [60 / 80, 60 / 40]
    assert found["alone_tokens_per_s"] == 100  # 12 tokens in 120 ms
    assert found["pass_cost"] == pytest.approx(72 / 6 / 10)
    # 48 ms of draft: 14 drafted tokens and 6 passes read once more, each at 1.2
    assert found["draft_cost"] == pytest.approx(48 / (14 + 6 * 1.2) / 10, rel=1e-4)


def test_answers_that_part_say_where_and_how_close_it_was(artifact: Model) -> None:
    ids = tuple(artifact.tokenize(PROMPTS[0], add_special=True, parse_special=False))
    plain = alone(artifact, ids, 6)
    other = Answer((*plain.ids[:4], 7, 8), 1.0, 1.0)
    (found,) = module._differences(artifact, [Pair(ids, plain, other)])
    logits = np.sort(artifact.logits([[*ids, *plain.ids[:4]]], len(ids) + 3)[0, 0])
    assert (found["prompt"], found["token"], found["ids"]) == (0, 4, [plain.ids[4], 7])
    assert found["margin"] == pytest.approx(float(logits[-1] - logits[-2]), rel=1e-3)


def test_another_vocabulary_is_refused_with_the_token_that_differs(f32: Path, tmp_path: Path) -> None:
    data = f32.read_bytes()
    with Model(f32, threads=1, vocab_only=True) as model:
        token = next(i for i in range(300, model.vocab_size) if model.detokenize([i]).strip().isalpha())
        text = model.detokenize([token]).replace(b" ", "Ġ".encode())
    field = len(text).to_bytes(8, "little") + text
    assert field in data
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(field, len(text).to_bytes(8, "little") + text[:-1] + b"~", 1))
    with pytest.raises(InputRefused, match=rf"other\.gguf can't draft for .*: token {token} is .*~"):
        measure(f32, other)


def test_a_text_too_short_for_the_prompts_is_refused(f32: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("One sentence, and then another one. " * 6)
    with pytest.raises(InputRefused, match=r"expected 5 prompts|expected at least"):
        measure(f32, f32, text=str(text), lengths=[1, 2])
