"""Calibration text against evaluation text: what is refused, what passes, both sides of each limit."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.calibrate import overlap
from edgepack.calibrate.overlap import refuse_overlap
from edgepack.errors import InputRefused
from edgepack.text import default_calibration_text, default_evaluation_text, read_text

APACHE = """
 Licensed under the Apache License, Version 2.0 (the "License");
 you may not use this file except in compliance with the License.
 You may obtain a copy of the License at

     http://www.apache.org/licenses/LICENSE-2.0

 Unless required by applicable law or agreed to in writing, software
 distributed under the License is distributed on an "AS IS" BASIS,
 WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
 See the License for the specific language governing permissions and
 limitations under the License.
"""


def prose(words: int, seed: int) -> str:
    """Words in no order that two seeds share."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5000)}" + draw.choice(["", "", "", ",", ".\n"]) for _ in range(words))


@pytest.fixture(scope="module")
def evaluation() -> str:
    return read_text(default_evaluation_text())


@pytest.fixture(scope="module")
def calibration() -> str:
    return read_text(default_calibration_text())


def test_the_texts_that_ship_may_be_used_together(calibration: str, evaluation: str) -> None:
    refuse_overlap(calibration, evaluation)
    refuse_overlap(evaluation, calibration)


def test_documents_of_the_same_books_may_be_used_together(evaluation: str) -> None:
    documents = evaluation.split("\n\n\n")
    refuse_overlap("\n\n\n".join(documents[::2]), "\n\n\n".join(documents[1::2]))


def test_the_evaluation_text_itself_is_refused(evaluation: str) -> None:
    with pytest.raises(InputRefused, match="is the evaluation text") as caught:
        refuse_overlap(evaluation, evaluation)
    assert caught.value.exit_code == 5
    assert caught.value.hint is not None and "--calibration" in caught.value.hint


def test_half_of_the_evaluation_text_inside_is_refused(calibration: str, evaluation: str) -> None:
    half = evaluation[: len(evaluation) // 2]
    with pytest.raises(InputRefused, match=r"of the 106,037 words .* beginning '") as caught:
        refuse_overlap(calibration + half, evaluation)
    assert "\n" not in caught.value.message


def test_one_window_is_refused_however_it_is_wrapped_and_capitalised(calibration: str, evaluation: str) -> None:
    words = evaluation.split()
    window = "\n> ".join(words[40_000:40_380]).upper().replace(",", " ")
    with pytest.raises(InputRefused, match="the longest run"):
        refuse_overlap(calibration[:100_000] + "\n" + window + calibration[100_000:], evaluation)
    with pytest.raises(InputRefused, match="the longest run"):
        refuse_overlap(window, evaluation)


def test_runs_are_refused_from_the_limit_on() -> None:
    text = prose(20_000, 1)
    words = text.split()
    refuse_overlap(prose(5000, 2) + " " + " ".join(words[700:955]), text)
    with pytest.raises(InputRefused, match=r"holds 256 of the 20,000 words .* run 256 words, beginning 'w"):
        refuse_overlap(prose(5000, 2) + " " + " ".join(words[700:956]), text)


def test_a_licence_notice_in_every_file_of_both_passes() -> None:
    ours = "".join(APACHE + prose(300, seed) for seed in range(30))
    theirs = "".join(APACHE + prose(300, seed) for seed in range(100, 130))
    refuse_overlap(ours, theirs)
    refuse_overlap(APACHE + prose(2000, 1), APACHE + prose(700, 2))


def test_tables_of_zeros_in_both_pass() -> None:
    zeros = "0.0, " * 500
    refuse_overlap(prose(2000, 1) + zeros, zeros + prose(2000, 2))


def test_scattered_sentences_are_refused_when_they_add_up() -> None:
    draw = random.Random(0)
    sentences = [" ".join(f"w{draw.randrange(5000)}" for _ in range(20)) for _ in range(1000)]
    filler = [" ".join(f"v{draw.randrange(5000)}" for _ in range(20)) for _ in range(1000)]
    for share, refused in ((0.03, False), (0.08, True)):
        count = int(share * len(sentences))
        mixed = [*filler, *sentences[:count]]
        draw.shuffle(mixed)
        if refused:
            with pytest.raises(InputRefused, match=r"holds 1,600 of the 20,000 words"):
                refuse_overlap(". ".join(mixed), ". ".join(sentences))
        else:
            refuse_overlap(". ".join(mixed), ". ".join(sentences))


def test_languages_without_spaces_are_compared_by_character() -> None:
    draw = random.Random(1)
    text = "".join(chr(0x4E00 + draw.randrange(3000)) + ("。" if draw.random() < 0.1 else "") for _ in range(5000))
    other = "".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(5000))
    refuse_overlap(other, text)
    with pytest.raises(InputRefused, match="the longest run"):
        refuse_overlap(other + text[1000:1600].replace("。", "，\n"), text)


def test_texts_shorter_than_a_shingle_pass() -> None:
    refuse_overlap("a few words", "a few words more")
    refuse_overlap("... --- ...", "a few words more")


def naive(text: str, known: list[str]) -> list[bool]:
    """Which runs of 13 words of `known` are in `text`, by sets of tuples."""
    size = overlap.SHINGLE_WORDS
    words = text.lower().split()
    there = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    return [tuple(known[i : i + size]) in there for i in range(len(known) - size + 1)]


@given(data=st.data(), piece=st.integers(1, 200))
def test_hashes_find_what_sets_of_words_find(data: st.DataObject, piece: int) -> None:
    words = data.draw(st.lists(st.sampled_from("abcd"), min_size=13, max_size=60))
    others = data.draw(st.lists(st.sampled_from("abcdE"), max_size=40))
    start = data.draw(st.integers(0, len(words) - 1))
    text = " ".join([*others, *words[start:], *others])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_PIECE_CHARACTERS", piece)  # borders fall everywhere
        hashes = np.concatenate(list(overlap._word_hashes(" ".join(words))))
        shingles = overlap._shingles(hashes)
        found = overlap._found(shingles, text)
    expected = naive(text, words)
    assert found.tolist() == expected
    if any(expected):
        length, first = overlap._longest_run(found, shingles)
        size = overlap.SHINGLE_WORDS
        assert expected[first] and (first == 0 or not expected[first - 1])
        end = next((i for i in range(first, len(expected)) if not expected[i]), len(expected))
        assert length == len({tuple(words[i : i + size]) for i in range(first, end)}) + size - 1
