"""Where two models part: held against naive sums over all logits, and against the text itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgepack.measure.details import WORST_POSITIONS, WORST_WINDOWS, Watch, alone, text_pieces
from edgepack.measure.divergence import Scores, score
from edgepack.measure.fidelity import fidelity, join
from edgepack.measure.token_text import token_bytes
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import default_evaluation_text, read_text

PER, VOCABULARY = 12, 40


def watched(windows: int, together: int, scale: float = 1.0) -> tuple[dict, np.ndarray, np.ndarray, list[list[int]]]:
    """Details of random logits, with those logits `[windows, PER, VOCABULARY]`: reference, candidate."""
    generator = np.random.default_rng(7)
    reference = generator.normal(size=(windows, PER, VOCABULARY)).astype(np.float32) * 3
    noise = generator.normal(size=reference.shape) * generator.uniform(0.1, 2, size=(windows, 1, 1)) * scale
    candidate = (reference + noise).astype(np.float32)
    watch, scores = Watch(PER), []
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, windows, together):
            block = slice(start, start + together)
            c, r = (array[block].reshape(-1, VOCABULARY).copy() for array in (candidate, reference))
            scores.append(score(c, np.zeros(len(c), dtype=np.int64), reference=r, pool=pool))
            watch.see(scores[-1], c, r)
    pieces = [[window * 7 % VOCABULARY] * 5 + list(range(PER)) for window in range(windows)]
    found = watch.details(join(scores), pieces, letters)
    assert found is not None
    return found, reference, candidate, pieces


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def letters(ids: Sequence[int]) -> bytes:
    return "".join(chr(0x41 + token) for token in ids).encode()


@pytest.mark.parametrize("together", [1, 4])
def test_the_worst_windows_are_those_of_all_and_show_what_both_models_expected(together: int) -> None:
    found, reference, candidate, _ = watched(32, together)
    p, q = softmax(reference), softmax(candidate)
    kld = (p * np.log(p / q)).sum(axis=-1)
    assert found["kld_by_window"] == pytest.approx(kld.mean(axis=1), rel=1e-3)
    assert found["kld_by_position"] == pytest.approx(kld.mean(axis=0), rel=1e-3)
    assert [window["window"] for window in found["worst"]] == np.argsort(-kld.mean(axis=1))[:WORST_WINDOWS].tolist()
    for shown in found["worst"]:
        window = shown["window"]
        assert shown["kld"] == pytest.approx(kld[window], rel=1e-3)
        assert shown["mean_kld"] == pytest.approx(kld[window].mean(), rel=1e-3)
        assert [p["at"] for p in shown["positions"]] == np.argsort(-kld[window])[:WORST_POSITIONS].tolist()
        for position in shown["positions"]:
            for name, logits in (("reference", reference), ("candidate", candidate)):
                expected = softmax(logits[window, position["at"]])
                best = np.argsort(-expected)[:3]
                assert [choice["token"] for choice in position[name]] == [chr(0x41 + token) for token in best]
                assert [choice["p"] for choice in position[name]] == pytest.approx(expected[best], rel=1e-3)


def test_tokens_stand_beside_the_divergence_they_were_drawn_at() -> None:
    found, _, _, pieces = watched(6, 2)
    assert (found["window_tokens"], found["first"]) == (5 + PER, 5)
    for shown in found["worst"]:
        assert shown["tokens"] == [chr(0x41 + token) for token in range(PER)]
        assert shown["context"] == chr(0x41 + pieces[shown["window"]][0]) * 5
        assert len(shown["kld"]) == PER


def test_equal_models_part_nowhere() -> None:
    found, *_ = watched(8, 2, scale=0)
    assert set(found["kld_by_window"]) == {0}
    assert [window["window"] for window in found["worst"]] == [0, 1, 2, 3, 4]


def test_nothing_is_said_without_a_reference_or_of_numbers_that_are_none() -> None:
    watch = Watch(3)
    plain = Scores(np.zeros(6))
    watch.see(plain, np.zeros((6, 9), np.float32), np.zeros((6, 9), np.float32))
    assert watch.details(plain, [[1] * 4] * 2, letters) is None
    broken = Scores(np.zeros(6), np.zeros(6), np.array([0, 0, 0, 1, np.nan, 1]), np.zeros(6))
    watch.see(broken, np.ones((6, 9), np.float32), np.ones((6, 9), np.float32))
    assert watch.details(broken, [[1] * 4] * 2, letters) is None


def test_a_letter_spread_over_tokens_stands_with_the_last_of_them() -> None:
    parts = [b"a", *(bytes([byte]) for byte in "€".encode()), b"\xff", b"\xe2\x82"]
    assert text_pieces(range(len(parts)), lambda ids: parts[ids[0]]) == ["a", "", "", "€", "\ufffd", "\ufffd"]
    assert text_pieces([], letters) == []
    assert alone("€".encode()[:2]) == r"\xe2\x82"
    assert alone("€".encode()) == "€"


def test_a_measured_artifact_says_where_it_parts(f32: Path, q4: Path) -> None:
    text = str(default_evaluation_text())
    found = fidelity(reference=str(f32), candidate=str(q4), text=text, windows=6, window_tokens=128, threads=2)
    details = json.loads(json.dumps(found["details"]))
    mean = found["rows"][0]["value"]
    assert np.mean(details["kld_by_window"]) == pytest.approx(mean, rel=1e-3)
    assert np.mean(details["kld_by_position"]) == pytest.approx(mean, rel=1e-3)
    assert (len(details["kld_by_window"]), len(details["kld_by_position"]), details["first"]) == (6, 63, 65)
    with Model(f32, threads=1, vocab_only=True) as model:
        tokens = model.tokenize(read_text(text), add_special=True, parse_special=False)
        for shown in details["worst"]:
            start = shown["window"] * 128
            ids = tokens[start + 65 : start + 128]
            assert "".join(shown["tokens"]) == model.detokenize(ids).decode("utf-8", "replace")
    worst = details["worst"][0]
    assert worst["mean_kld"] == max(details["kld_by_window"])
    assert worst["positions"][0]["kld"] == max(worst["kld"])
    for position in worst["positions"]:
        assert 0 < sum(choice["p"] for choice in position["reference"]) < 1.0001


def test_without_a_reference_there_are_no_details(f32: Path) -> None:
    found = fidelity(
        reference=None, candidate=str(f32), text=str(default_evaluation_text()), windows=2, window_tokens=64, threads=1
    )
    assert "details" not in found


def test_the_sources_tokenizer_says_the_bytes_that_llama_cpp_says(f32: Path, example: Path) -> None:
    decode = token_bytes(example)
    with Model(f32, threads=1, vocab_only=True) as model:
        for token in range(model.vocab_size):
            assert decode([token]) == model.detokenize([token]), token


def test_bytes_are_read_from_names_as_sentencepiece_writes_them(tmp_path: Path) -> None:
    vocabulary = {name: place for place, name in enumerate(["<unk>", "<0x0A>", "▁a", "b", "<s>"])}
    document = {
        "version": "1.0",
        "added_tokens": [_added(0, "<unk>"), _added(4, "<s>")],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "byte_fallback": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert [token_bytes(tmp_path)([token]) for token in (1, 2, 3, 4)] == [b"\n", b" a", b"b", b"<s>"]
    assert token_bytes(tmp_path)([2, 1, 3, 999]) == b" a\nb"


def _added(token: int, content: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": True, **flags}
