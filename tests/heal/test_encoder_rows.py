from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from pico_teachers import SIZES, SPECIAL, write_tokenizer
from tokenizers import Tokenizer

from edgepack.checkpoint import open_checkpoint
from edgepack.errors import InputRefused
from edgepack.heal import encoder_rows as module
from edgepack.heal.encoder_rows import encoder_rows, pack, split, unpack
from edgepack.text import default_calibration_text, sentences


@pytest.fixture(scope="module")
def text() -> str:
    return default_calibration_text().read_text("utf-8")[:20_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pico_teachers import teacher

    return teacher(tmp_path_factory.mktemp("rows") / "model")


def words(folder: Path, row: torch.Tensor) -> str:
    engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return engine.decode([token % module._TYPE for token in row.tolist() if token != module.PADDING])


def test_a_row_comes_back_as_the_tokenizer_gave_it_and_padding_is_hidden() -> None:
    rows = pack([[2, 7, 8, 3], [2, 9, 3, *(token + module._TYPE for token in (10, 3))], [2, 3]])
    batch = unpack(rows, padding=0, types=True)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 3, 0], [2, 9, 3, 10, 3], [2, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0] * 5, [0, 0, 0, 1, 1], [0] * 5]
    assert set(unpack(rows[2:], padding=5, types=False)) == {"input_ids", "attention_mask"}
    assert unpack(rows[2:], padding=5, types=False)["input_ids"].tolist() == [[2, 3]]  # no column of padding alone


def test_no_held_out_sentence_is_trained_on_in_any_pass(folder: Path, text: str) -> None:
    found = sentences(text, 10_000)
    training, held_out, _ = split(found)
    assert not set(training) & set(held_out) and len(held_out) == len(found) // 10
    places = [found.index(sentence) for sentence in held_out]
    assert min(places) < len(found) // 4 and max(places) > 3 * len(found) // 4  # from all over the text
    rows = encoder_rows(open_checkpoint(folder), text, "feature-extraction", 20_000)
    judged = [words(folder, row) for row in rows.held_out]
    assert len(judged) == len(held_out) and rows.passes > 2
    taught = [words(folder, row) for row in rows.training]
    assert not [sentence for sentence in judged if any(sentence in row for row in taught)]


def test_a_sentence_that_repeats_held_out_words_is_left_out() -> None:
    found = [
        f"sentence {number} has the words " + " ".join(f"w{number}x{i}" for i in range(15)) for number in range(40)
    ]
    training, held_out, left_out = split(found)
    assert left_out == 0
    copied = f"Something else, and then {held_out[0]}"
    place = found.index(training[0])
    again, same, left_out = split([*found[:place], copied, *found[place + 1 :]])
    assert same == held_out and left_out == 1 and copied not in again


def test_a_text_that_repeats_itself_is_refused() -> None:
    with pytest.raises(InputRefused, match="repeats itself"):
        split(["The very same sentence once more."] * 20)


def test_every_pass_cuts_the_text_at_other_places(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)

    def rows(passes: int) -> list[tuple[int, ...]]:
        monkeypatch.setattr(module, "MOST_PASSES", passes)
        return [tuple(row.tolist()) for row in encoder_rows(checkpoint, text, "feature-extraction", 10**9).training]

    first, three = rows(1), rows(3)
    assert len(set(three)) > 0.8 * len(three)
    assert len(first) == len(split(sentences(text, 10_000))[0])  # the first pass reads sentence by sentence
    assert [row[: len(first[0])] for row in three[: len(first)]] == first
    lengths = [sum(token >= 0 for token in row) for row in three]
    assert max(lengths[len(first) :]) > 1.5 * sum(lengths[: len(first)]) / len(first)
    assert three == rows(3)


def test_no_row_is_longer_than_asked_and_all_begin_and_end_alike(folder: Path, text: str) -> None:
    rows = encoder_rows(open_checkpoint(folder), text, "feature-extraction", 10_000, longest=24).training
    engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cls, sep = engine.token_to_id("[CLS]"), engine.token_to_id("[SEP]")
    assert rows.shape[1] == 24
    for row in rows:
        real = row[row >= 0].tolist()
        assert real[0] == cls and real[-1] == sep


def test_rerankers_and_questions_read_pairs_masked_words_are_hidden(folder: Path, text: str) -> None:
    checkpoint = open_checkpoint(folder)
    for task, pairs in (("text-classification", True), ("question-answering", False)):
        rows = encoder_rows(checkpoint, text, task, 5_000, pairs=pairs).training
        types = unpack(rows, padding=0, types=True)["token_type_ids"]
        assert (types.max(dim=1).values == 1).all()
    batch = unpack(encoder_rows(checkpoint, text, "fill-mask", 5_000).training, padding=0, types=False)
    hidden = (batch["input_ids"] == SPECIAL.index("[MASK]")).sum() / batch["attention_mask"].sum()
    assert 0.1 < float(hidden) < 0.16


def test_a_model_without_tokenizer_json_is_refused(folder: Path, text: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputRefused, match=r"tokenizer\.json"):
        encoder_rows(open_checkpoint(tmp_path / "model"), text, "feature-extraction", 5_000)
    write_tokenizer(tmp_path / "model", SIZES["vocab_size"])
    assert len(encoder_rows(open_checkpoint(tmp_path / "model"), text, "feature-extraction", 5_000).training)


def test_later_passes_put_distant_sentences_together_and_other_tokens_in(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = split(sentences(text, 10_000))[0]
    place = {
        word: {number for number, other in enumerate(found) if word in other.split()} for word in set(text.split())
    }

    def near(words: list[str]) -> bool:
        """Whether some four neighbours have all of these words."""
        return any(
            all(place[word] & set(range(start, start + module.MOST_JOINED)) for word in words)
            for start in range(len(found))
        )

    joined = [" ".join(parts).split() for parts in module._joined(found, random.Random(1), alone=False)]
    distant = sum(not near(words) for words in joined) / len(joined)
    assert 0.15 < distant < 0.4
    monkeypatch.setattr(module, "MOST_PASSES", 8)
    checkpoint = open_checkpoint(folder)
    made = encoder_rows(checkpoint, text, "feature-extraction", 10**9).training
    monkeypatch.setattr(module, "_REPLACED", 0.0)
    plain = encoder_rows(checkpoint, text, "feature-extraction", 10**9).training
    known = set(plain.unique().tolist())
    foreign = sum(token not in known for token in made.unique().tolist())
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert foreign > 0.4 * (vocabulary - len(known))
    assert not set(range(len(SPECIAL))) & set(module._Cutter(checkpoint, "feature-extraction", False, 64)._ordinary)
