"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgepack import target_checks
from edgepack.errors import EdgepackError, ProfileError, UsageError
from edgepack.gguf.presets import ALIASES, PRESETS
from edgepack.gguf.size import is_size, parse_size
from edgepack.targets import load_target, with_overrides

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DIGITS = st.integers(1, 10**7).map(str) | st.decimals("0.001", "99999", places=3).map(str)
# Near misses: what a regular expression takes for a digit, a letter or a space and a person does not.
_WORD = st.text("0123456789.bBpPwWkKmMgGiI \t\n+-e_,\u0663\u212a\u00b2", max_size=12)


@pytest.mark.parametrize(
    ("text", "total"),
    [("2.0GB", 2_000_000_000), ("600MiB", 629_145_600), ("600 mib", 629_145_600), ("23570112B", 23_570_112),
     ("2.01GB", 2_010_000_000), ("12345678901B", 12_345_678_901), ("1.5KiB", 1536), ("0.5GB", 500_000_000)],
)  # fmt: skip
def test_sizes_are_exact_bytes(text: str, total: int) -> None:
    assert parse_size(text).total_bytes == total


@given(_DIGITS, st.sampled_from(sorted(UNITS)))
def test_any_size_is_the_number_times_its_unit_rounded_down(digits: str, unit: str) -> None:
    expected = int(Fraction(digits) * UNITS[unit])
    if expected:
        assert parse_size(f"{digits}{unit}").total_bytes == expected


@given(_DIGITS, st.sampled_from([*UNITS, "bpw"]))
@example("12345678901", "B")  # not 1.23456789e+10B
@example("4.456", "bpw")  # not 4.46bpw: more than was asked
@example("0.001", "bpw")
def test_the_name_of_a_size_reads_back_as_the_same_size(digits: str, unit: str) -> None:
    try:
        size = parse_size(f"{digits}{unit}")
    except UsageError:
        assert Fraction(digits) * UNITS.get(unit, 1) < 1
        return
    assert parse_size(size.name) == size


@pytest.mark.parametrize("text", ["4.5bpw", "4.50 BPW", " 4.5bpw ", "4.500bpw"])
def test_bits_have_one_spelling(text: str) -> None:
    size = parse_size(text)
    assert (size.name, size.bits_per_weight, size.total_bytes) == ("4.50bpw", 4.5, None)


@pytest.mark.parametrize(
    "text", ["", "GB", "bpw", "-1GB", "1e3MB", "1,5GB", "1..5GB", "2TB", "0GB", "0.0bpw", "0.4B", "nan", "infbpw",
             "4.5bpww", "\u0664bpw", "4\u212aB", "4.5\nGB x", "Q4_K_M"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="expected a number") as refused:
        parse_size(text)
    assert "4.5bpw" in str(refused.value.hint)


@given(_WORD)
@example("4.5bpw")
@example("4\u212aB")
@example("\u0664bpw")
@example("0.1")
@example("0.0001KiB")
@example("0bpw")
def test_a_word_is_a_size_exactly_when_it_can_be_read_as_one_but_for_zero(text: str) -> None:
    try:
        parse_size(text)
        read = True
    except UsageError:
        read = False
    assert is_size(text) or not read
    if is_size(text) and not read:
        number, unit = re.fullmatch(r"([0-9.]+)\s*(\w*)", text.strip()).groups()
        power = "BKMG".find((unit.upper() + "B")[0])
        base = 1024 if "I" in unit.upper() else 1000
        assert Fraction(number) * base**power < 1  # nothing, or less than a byte


def test_no_preset_is_taken_for_a_size() -> None:
    assert not [name for name in (*PRESETS, *ALIASES) if is_size(name)]


@given(_WORD | st.tuples(_DIGITS, st.sampled_from([*UNITS, "bpw", ""])).map("".join))
@example("4.5bpw")
@example("4.5 bpw")
@example("4\u212aB")
@example("0bpw")
@example("23570112")
def test_a_profile_takes_as_default_what_is_read_as_a_size(text: str) -> None:
    # A bare number is a size on the command line only (`--size 23570112`); in a profile it needs its unit.
    taken = target_checks._SIZE.fullmatch(text) is not None
    bare = text.strip().replace(".", "", 1).isdigit()
    assert taken == (is_size(text) and not bare and text == text.strip())


@pytest.mark.parametrize("default", ["4.5bpw", "2.0GB", "600 MiB"])
def test_a_profile_may_ask_for_a_size(default: str) -> None:
    assert with_overrides(load_target("laptop"), [f"quantize.default={default}"]).quantize.default == default


@pytest.mark.parametrize("default", ["4.5", "4.5bpx", "1TB", "-4bpw"])
def test_a_profile_whose_default_is_no_size_and_no_preset_is_refused(default: str) -> None:
    with pytest.raises(ProfileError, match="expected 'auto', a preset or a size"):
        with_overrides(load_target("laptop"), [f"quantize.default={default}"])


def test_every_refusal_is_one_of_edgepack() -> None:
    with pytest.raises(EdgepackError):
        parse_size("\x00" * 1000)
