"""RFC 8785 by its own vectors (appendix B, sections 3.2.2 to 3.2.4), and by what must hold for every value."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.canonical import canonical_json, digest

# RFC 8785 appendix B: IEEE 754 bits and their text.
NUMBERS = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.mark.parametrize(("bits", "text"), NUMBERS.items())
def test_numbers_are_written_as_in_the_appendix_of_the_rfc(bits, text):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical_json(value).decode() == text


@pytest.mark.parametrize("bits", ["7fffffffffffffff", "7ff0000000000000", "fff0000000000000"])
def test_nan_and_infinity_are_refused(bits):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    with pytest.raises(ValueError, match="no JSON form"):
        canonical_json([value])


def test_the_sample_object_of_the_rfc():
    sample = r"""{
      "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"""
    expected = (
        r'{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        r'"string":"€$\u000f\nA' + r"'" + r'B\"\\\\\"/"}'
    )
    assert canonical_json(json.loads(sample)) == expected.encode()


def test_members_are_sorted_by_utf16_code_units():
    names = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    found = list(json.loads(canonical_json(names)).values())
    assert found == [
        "Carriage Return",
        "One",
        "Control",
        "Latin Small Letter O With Diaeresis",
        "Euro Sign",
        "Emoji: Grinning Face",
        "Hebrew Letter Dalet With Dagesh",
    ]


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {2: 3}}, object(), b"bytes", {"a": {1, 2}}])
def test_what_json_has_not_is_a_type_error(value):
    with pytest.raises(TypeError):
        canonical_json(value)


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 10**21, 2**1400, "\ud800", {"\udfff": 1}])
def test_what_other_readers_would_not_keep_is_a_value_error(value):
    with pytest.raises(ValueError, match=r"2\^53|surrogates"):
        canonical_json(value)


def test_largest_integers_are_written_in_full():
    assert canonical_json([2**53 - 1, -(2**53) + 1]) == b"[9007199254740991,-9007199254740991]"


def test_a_large_float_reads_back_as_an_integer_and_is_written_the_same():
    for value in (2.0**53, 3.413626752863103e16, -1e20):
        written = canonical_json(value)
        assert isinstance(json.loads(written), int)
        assert canonical_json(json.loads(written)) == written


def test_order_of_insertion_and_kind_of_sequence_do_not_change_the_digest():
    assert digest({"a": (1, 2), "b": None}) == digest({"b": None, "a": [1, 2]})
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of "{}"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_reads_back_as_itself_and_is_shortest(value):
    text = canonical_json(value).decode()
    assert float(text) == value
    significant = text.lstrip("-").partition("e")[0].replace(".", "").strip("0")
    shortest = repr(value).lstrip("-").partition("e")[0].replace(".", "").strip("0")
    assert significant == shortest


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(_JSON)
def test_every_value_reads_back_as_itself_and_is_stable(value):
    written = canonical_json(value)
    doubles = json.loads(written, parse_int=lambda text: int(text) if abs(int(text)) < 2**53 else float(text))
    assert doubles == value
    assert canonical_json(json.loads(written)) == written
