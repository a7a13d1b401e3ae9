from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import exported, with_weight

from edgepack.errors import ConformanceError, InputRefused, StepError, UsageError
from edgepack.measure import fidelity as module
from edgepack.measure.fidelity import fidelity, scored_windows
from edgepack.runtimes.llama_cpp import Model
from edgepack.text import default_evaluation_text, read_text

Measure = Callable[..., dict[str, dict[str, Any]]]
TEXT = str(default_evaluation_text())
NAMES = ["mean_kld", "median_kld", "kld_p99", "top1_agreement", "source_perplexity", "perplexity"]


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The beginning of the evaluation text: tokenizing all of it takes longer than measuring six windows."""
    path = tmp_path_factory.mktemp("text") / "excerpt.txt"
    path.write_text(read_text(TEXT)[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def measure(excerpt: str) -> Measure:
    """Rows by name, on six windows of 128 tokens unless told otherwise."""

    def rows(candidate: Path, reference: Path | None, **changes: Any) -> dict[str, dict[str, Any]]:
        settings = {"text": excerpt, "windows": 6, "window_tokens": 128, "threads": 2} | changes
        found = fidelity(reference=str(reference) if reference else None, candidate=str(candidate), **settings)
        return {row["name"]: row for row in found["rows"]}

    return rows


def test_rows_are_those_of_the_definition_on_each_models_logits(f32: Path, q4: Path, measure: Measure) -> None:
    content, kld, top, nll = read_text(TEXT), [], [], []
    with Model(f32, context=128, threads=2) as source, Model(q4, context=128, threads=2) as artifact:
        tokens = source.tokenize(content, add_special=True, parse_special=False)
        for start in range(0, 6 * 128, 128):
            ids = tokens[start : start + 128]
            p, q = (model.logits([ids])[0][64:127].astype(np.float64) for model in (source, artifact))
            p, q = (
                x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
                for x in (p, q)
            )
            kld.append((np.exp(p) * (p - q)).sum(1))
            top.append(p.argmax(1) == q.argmax(1))
            nll.append(-q[np.arange(63), ids[65:128]])
    rows = measure(q4, f32)
    assert list(rows) == NAMES
    assert all(row["n"] == 6 * 63 for row in rows.values())
    assert rows["mean_kld"]["value"] == pytest.approx(np.mean(kld), rel=1e-3)
    assert rows["median_kld"]["value"] == pytest.approx(np.median(kld), rel=1e-3)
    assert rows["kld_p99"]["value"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-3)
    assert rows["top1_agreement"]["value"] == pytest.approx(np.mean(top), abs=2.1 / (6 * 63))
    assert rows["perplexity"]["value"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert rows["mean_kld"]["ci95"][0] < rows["mean_kld"]["value"] < rows["mean_kld"]["ci95"][1]
    assert rows["mean_kld"]["standard_error"] > 0


def test_source_perplexity_is_what_transformers_computes(f32: Path, q4: Path, example: Path, measure: Measure) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(example)(read_text(TEXT)[:6000])["input_ids"]
    windows = torch.tensor(ids[: 4 * 256]).reshape(4, 256)
    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(windows).logits[:, 128:255].float()
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 129:].reshape(-1))
    rows = measure(q4, f32, windows=4, window_tokens=256)
    assert rows["source_perplexity"]["value"] == pytest.approx(float(nll.exp()), rel=2e-4)


def test_an_artifact_compared_with_itself_is_exactly_itself(f32: Path, measure: Measure) -> None:
    rows = measure(f32, f32)
    assert rows["mean_kld"]["value"] == rows["kld_p99"]["value"] == 0
    assert rows["mean_kld"]["ci95"] == [0, 0]
    assert rows["top1_agreement"]["value"] == 1
    assert rows["perplexity"]["value"] == rows["source_perplexity"]["value"]


def test_more_bits_keep_more_of_the_model(f32: Path, q4: Path, example: Path, tmp_path: Path, measure: Measure) -> None:
    found = [
        measure(path, f32)["mean_kld"]["value"]
        for path in (exported(example, "Q8_0", tmp_path), q4, exported(example, "Q2_K", tmp_path))
    ]
    assert found[0] < found[1] / 3 < found[2] / 9


def test_without_a_reference_there_is_perplexity_alone(f32: Path, measure: Measure) -> None:
    rows = measure(f32, None)
    assert list(rows) == ["perplexity"]
    assert rows["perplexity"]["value"] == pytest.approx(measure(f32, f32)["perplexity"]["value"], rel=1e-9)


class Recorder:
    """A model that remembers what it was fed and predicts nothing."""

    def __init__(self, add_bos: bool, sequences: int = 1, tokens: int = 40, vocab_size: int = 50) -> None:
        self.add_bos, self.bos, self.sequences, self.vocab_size = add_bos, 49, sequences, vocab_size
        self.tokens, self.fed, self.path = list(range(1, tokens + 1)), [], Path("recorder.gguf")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert add_special
        return list(self.tokens)

    def logits(self, sequences: list[list[int]], first: int, *, stop: int) -> np.ndarray:
        self.fed += sequences
        assert (first, stop) == (4, 7)
        return np.zeros((len(sequences), stop - first, self.vocab_size), dtype=np.float32)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_takes_the_first_place_of_a_window_and_no_place_among_the_targets(add_bos: bool, sequences: int) -> None:
    model = Recorder(add_bos, sequences)
    targets = [part[3].tolist() for part in scored_windows([model], "", 9, 8)]  # type: ignore[list-item]
    starts = range(1, 41, 8)
    assert model.fed == [[49 if add_bos else start, *range(start + 1, start + 8)] for start in starts]
    assert [token for part in targets for token in part] == [start + place for start in starts for place in (5, 6, 7)]


def test_artifacts_that_tokenize_differently_are_refused_with_the_place() -> None:
    one, other = Recorder(False), Recorder(False)
    other.tokens[11] = 0
    with pytest.raises(
        ConformanceError, match=r"differently from token 11 on: \[12, 13, 14, 15\] and \[0, 13, 14, 15\]"
    ):
        next(scored_windows([one, other], "", 9, 8))  # type: ignore[list-item]
    with pytest.raises(ConformanceError, match=r"vocabulary of 50 tokens, .* one of 51"):
        next(scored_windows([one, Recorder(False, vocab_size=51)], "", 9, 8))  # type: ignore[list-item]


def test_an_artifact_that_computes_nan_is_refused(f32: Path, tmp_path: Path, measure: Measure) -> None:
    broken = with_weight(f32, "blk.2.ffn_down.weight", float("nan"), tmp_path / "nan.gguf")
    with pytest.raises(
        ConformanceError, match=r"NaN or infinite logits at 378 of 378 scored positions, first in window 0"
    ):
        measure(broken, f32)
    with pytest.raises(ConformanceError, match="NaN or infinite"):
        measure(broken, None)


def test_a_source_that_computes_nan_leaves_rows_without_values(f32: Path, tmp_path: Path, measure: Measure) -> None:
    broken = with_weight(f32, "blk.2.ffn_down.weight", float("nan"), tmp_path / "nan.gguf")
    rows = measure(broken, broken)
    assert sorted(rows) == sorted(NAMES)
    for row in rows.values():
        assert row["value"] is None and "the source model gives NaN" in row["note"]


def test_a_text_of_less_than_two_windows_is_refused_with_the_numbers(
    f32: Path, tmp_path: Path, measure: Measure
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one two three four five")
    with pytest.raises(InputRefused, match=r"the text has \d+ tokens, expected at least 256: two windows of 128"):
        measure(f32, f32, text=str(short))


def test_windows_longer_than_the_models_context_are_refused(f32: Path, measure: Measure) -> None:
    with pytest.raises(UsageError, match=r"window_tokens is 1024, but the model's context is 512") as caught:
        measure(f32, f32, window_tokens=1024)
    assert caught.value.hint is not None and "measure.window_tokens=512" in caught.value.hint


def test_a_file_llama_cpp_refuses_is_named(f32: Path, tmp_path: Path, measure: Measure) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(f32.read_bytes()[:4_000_000])
    with pytest.raises(StepError, match=r"damaged.gguf: llama.cpp can't load it: .*not within the file bounds"):
        measure(damaged, f32)


def test_progress_counts_windows(f32: Path, measure: Measure) -> None:
    seen: list[tuple[int, int]] = []
    measure(f32, None, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_evidence_names_text_and_reference(f32: Path, q4: Path) -> None:
    import hashlib

    found = fidelity(reference=str(f32), candidate=str(q4), text=TEXT, windows=2, window_tokens=64, threads=1)
    assert found["text_sha256"] == hashlib.sha256(Path(TEXT).read_bytes()).hexdigest()
    assert found["reference_type"] == "F32"
    assert (found["windows"], found["tokens"]) == (2, 62)
    assert "against the F32 source" in found["rows"][0]["note"]


def test_embedders_are_measured_by_cosines(bert: Path, tmp_path: Path, measure: Measure) -> None:
    source, artifact = exported(bert, "F32", tmp_path), exported(bert, "Q4_0", tmp_path)
    same = measure(source, source, windows=8, window_tokens=64)
    assert list(same) == ["cosine_mean", "cosine_p01", "neighbour_agreement"]
    assert [row["value"] for row in same.values()] == pytest.approx([1, 1, 1], abs=1e-6)
    rows = measure(artifact, source, windows=8, window_tokens=64)
    assert all(row["n"] == 40 for row in rows.values())
    assert 0.9 < rows["cosine_p01"]["value"] < rows["cosine_mean"]["value"] < 0.99999


def test_windows_fill_a_micro_batch(f32: Path) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        assert module.open_model(stack, str(f32), 512, 1).sequences == 1
        assert module.open_model(stack, str(f32), 128, 1).sequences == 4
