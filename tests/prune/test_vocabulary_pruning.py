"""Smaller tokenizers: the same tokens where only kept ones are used, every text still whole, run by `tokenizers`."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_models import EXAMPLE, load, make
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgepack.errors import InputRefused
from edgepack.prune.token_ids import named_ids, renumbered, renumbered_tokenizer_config
from edgepack.prune.vocabulary import check_same_tokens, choose_tokens, used_tokens, without_tokens
from edgepack.text import default_calibration_text, default_evaluation_text

Pruned = tuple[Path, dict[str, Any]]
TRAINING = default_calibration_text().read_text("utf-8")[:200_000]
KEPT_TEXT = TRAINING[:8_000]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def example_bpe() -> Tokenizer:
    return Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: characters, bytes for those that are missing."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *BYTES], limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(TRAINING.split("\n"), trainer)
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    document = json.loads(trained.to_str())
    document["added_tokens"] = [entry for entry in document["added_tokens"] if not entry["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(document))


def unigram() -> Tokenizer:
    """Pieces by how often they occur; the trainer of `tokenizers` gives others every time."""
    words = ["▁" + word for word in TRAINING.split()]
    counts = Counter(word[at : at + size] for word in words for size in range(1, 7) for at in range(len(word)))
    pieces = [piece for piece, _ in counts.most_common(900)]
    pieces += sorted({letter for word in words for letter in word} - set(pieces))
    vocabulary = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, math.log(counts[piece] / counts.total())) for piece in pieces]
    found = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    found.add_special_tokens(["<s>", "</s>", "<unk>"])
    return found


def wordpiece() -> Tokenizer:
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained.train_from_iterator(
        TRAINING.split("\n"), trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    )
    trained.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return trained


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": example_bpe,
    "sentencepiece": sentencepiece_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def smaller(tokenizer: Tokenizer, text: str) -> tuple[Tokenizer, tuple[int, ...]]:
    document = json.loads(tokenizer.to_str())
    used = used_tokens(encoder(tokenizer), [text])
    kept = choose_tokens(document, used, rows=tokenizer.get_vocab_size())
    return Tokenizer.from_str(json.dumps(without_tokens(document, kept))), kept


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, Tokenizer, tuple[int, ...]]:
    full = KINDS[request.param]()
    less, kept = smaller(full, KEPT_TEXT)
    return request.param, full, less, kept


def test_it_is_smaller_and_numbered_without_holes(pair: Any) -> None:
    _, full, less, kept = pair
    assert less.get_vocab_size() == len(kept) < full.get_vocab_size()
    assert sorted(less.get_vocab().values()) == list(range(len(kept)))
    names = {number: token for token, number in full.get_vocab().items()}
    assert all(names[kept[number]] == token for token, number in less.get_vocab().items())
    assert len(kept) % 64 == 0


def test_text_within_has_the_tokens_it_had(pair: Any) -> None:
    _, full, less, kept = pair
    assert [kept[number] for number in less.encode(KEPT_TEXT).ids] == full.encode(KEPT_TEXT).ids  # special ones too
    assert check_same_tokens(encoder(full), encoder(less), kept, [KEPT_TEXT]) > 1000


def test_words_of_the_text_in_any_order_have_the_tokens_they_had(pair: Any) -> None:
    _, full, less, kept = pair
    words = KEPT_TEXT.split()
    generator = random.Random(5)
    for _ in range(200):
        text = " ".join(generator.choices(words, k=8))
        ids = full.encode(text).ids
        if set(ids) <= set(kept):
            assert [kept[number] for number in less.encode(text).ids] == ids


def test_text_outside_still_says_what_it_said(pair: Any) -> None:
    kind, full, less, _ = pair
    outside = default_evaluation_text().read_text("utf-8")[:5_000]
    assert less.decode(less.encode(outside).ids) == full.decode(full.encode(outside).ids)
    if kind in ("unigram", "wordpiece"):  # no bytes: what was unknown stays so, nothing else becomes it
        unknown = "<unk>" if kind == "unigram" else "[UNK]"
        assert less.encode(outside).tokens.count(unknown) == full.encode(outside).tokens.count(unknown)


BYTE_PAIR = smaller(example_bpe(), KEPT_TEXT)[0]
SENTENCEPIECE = smaller(sentencepiece_bpe(), KEPT_TEXT)[0]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_unicode_comes_back_whole(text: str) -> None:
    assert BYTE_PAIR.decode(BYTE_PAIR.encode(text).ids, skip_special_tokens=False) == text
    if text and not any(special in text for special in ("<unk>", "<s>", "</s>", "▁")):
        ids = SENTENCEPIECE.encode(text, add_special_tokens=False).ids
        assert SENTENCEPIECE.decode(ids, skip_special_tokens=False) == text


def test_merges_of_kept_tokens_keep_their_order() -> None:
    full, less = json.loads(example_bpe().to_str()), json.loads(BYTE_PAIR.to_str())
    order = [tuple(pair) for pair in full["model"]["merges"]]
    found = [order.index(tuple(pair)) for pair in less["model"]["merges"]]
    assert found == sorted(found) and len(found) < len(order)


def test_a_vocabulary_that_is_all_used_is_refused() -> None:
    document = json.loads(example_bpe().to_str())
    with pytest.raises(InputRefused, match="none can go"):
        choose_tokens(document, range(2048), rows=2048)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(InputRefused, match="expected BPE, WordPiece, Unigram"):
        choose_tokens({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, [0], rows=1)


def test_ids_in_configuration_files_follow_their_tokens() -> None:
    number = {0: 0, 7: 1, 9: 2}
    config = {"eos_token_id": [7, 9], "bos_token_id": 0, "pad_token_id": None, "image_token_id": -1, "hidden_size": 7}
    assert set(named_ids(config)) == {0, 7, 9}
    assert renumbered(config, number) == config | {"eos_token_id": [1, 2]}
    assert renumbered({"suppress_tokens": [5, 9]}, number) == {"suppress_tokens": [2]}
    entries = {"added_tokens_decoder": {"7": {"content": "<a>"}, "8": {"content": "<b>"}}}
    assert renumbered_tokenizer_config(entries, number) == {"added_tokens_decoder": {"1": {"content": "<a>"}}}
    with pytest.raises(InputRefused, match="forced_decoder_ids"):
        list(named_ids({"forced_decoder_ids": [[1, 5]]}))


def test_a_model_with_fewer_tokens_says_the_same_of_those_that_stay(
    run_prune: Callable[..., Pruned], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "corpus.txt"
    text.write_text(KEPT_TEXT)
    source = make("untied", tmp_path / "source")
    folder, report = run_prune(source, vocabulary=(str(text),))
    kept = report["removed"]["vocabulary"]["kept"]
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    sentence = KEPT_TEXT[100:400]
    old, new = before(sentence, return_tensors="pt").input_ids, after(sentence, return_tensors="pt").input_ids
    assert [kept[number] for number in new[0].tolist()] == old[0].tolist()
    with torch.no_grad():
        expected = load(source)(old[:, :100]).logits[..., kept]
        torch.testing.assert_close(load(folder)(new[:, :100]).logits, expected, rtol=0, atol=1e-5)
    assert report["steps"][-1]["mean_kld"] == pytest.approx(0, abs=1e-6)
    assert 0 < report["before"]["probability_of_kept_tokens"] < 1
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(kept)
    assert str(text) not in (folder / "edgepack-prune.json").read_text()
