from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import text
from edgepack.errors import InputRefused


def test_windows_are_consecutive_and_start_at_the_beginning() -> None:
    assert text.windows(list(range(23)), 5) == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]


def test_limit_takes_the_first_windows() -> None:
    assert text.windows(list(range(23)), 5, limit=2) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@given(count=st.integers(16, 200), size=st.integers(2, 8), limit=st.integers(1, 50))
def test_windows_never_overlap_and_never_run_short(count: int, size: int, limit: int) -> None:
    found = text.windows(list(range(count)), size, limit)
    assert [token for window in found for token in window] == list(range(len(found) * size))
    assert len(found) == min(limit, count // size)


def test_fewer_than_two_windows_are_refused_with_the_numbers() -> None:
    with pytest.raises(InputRefused, match="1023 tokens, expected at least 1024: two windows of 512"):
        text.windows(list(range(1023)))
    assert len(text.windows(list(range(1024)))) == 2


def test_text_is_read_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("a\r\nb\rc\n\ufeffé".encode())
    assert text.read_text(path) == "a\r\nb\rc\n\ufeffé"
    assert text.text_sha256(text.read_text(path)) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n\t \n", "empty"),
        (b"words\0more", "NUL byte at offset 5"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3 is not UTF-8"),
        (b"\xff\xfea\0b\0", "NUL byte"),
        (b"GGUF\x03\x00\x00\x00", "NUL byte"),
    ],
)
def test_what_is_not_text_is_refused_with_the_place(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match=reason):
        text.read_text(path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(InputRefused, match="not a file"):
            text.read_text(path)


def test_a_huge_text_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(text.MAX_BYTES + 1)
    with pytest.raises(InputRefused, match=f"{text.MAX_BYTES + 1} bytes"):
        text.read_text(path)


def test_the_texts_that_ship_share_no_paragraph() -> None:
    paragraphs = [
        {part for part in text.read_text(path).split("\n\n") if len(part) > 200}
        for path in (text.default_evaluation_text(), text.default_calibration_text())
    ]
    assert all(len(part) > 100 for part in paragraphs)
    assert not paragraphs[0] & paragraphs[1]


def test_the_texts_that_ship_carry_their_attribution() -> None:
    readme = text.default_evaluation_text().with_name("README.md").read_text()
    for words in ("OpenStax", "CC BY 4.0", "Python Enhancement Proposals", "Microsoft PowerShell"):
        assert words in readme


def test_sentences_are_different_and_of_ordinary_length() -> None:
    found = text.sentences(text.read_text(text.default_evaluation_text()), 500)
    assert len(found) == len(set(found)) == 500
    assert all(20 <= len(one) <= 400 and "\n" not in one for one in found)


def test_sentences_end_at_full_stops_and_blank_lines() -> None:
    content = (
        "A first sentence stands here. A second one follows it!\n\nA heading without a stop\n\nShort. " + "x" * 401
    )
    assert text.sentences(content, 9) == [
        "A first sentence stands here.",
        "A second one follows it!",
        "A heading without a stop",
    ]


def test_a_text_without_sentences_is_refused() -> None:
    with pytest.raises(InputRefused, match="0 sentences of 20 to 400 characters"):
        text.sentences("1 2 3", 10)
