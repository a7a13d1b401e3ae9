"""The warning about text that looks unlike, on English prose, code, and other languages."""

from __future__ import annotations

import email
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgepack.calibrate.likeness import divergence, unlike
from edgepack.text import default_calibration_text, default_evaluation_text, read_text

GERMAN = """\
Am frühen Morgen lag dichter Nebel über dem Fluss, und die Fischer warteten am Ufer, bis die Sonne stieg. Einer von
ihnen erzählte, dass sein Großvater noch mit der Hand gerudert habe, als es keine Motoren gab. Damals, sagte er, sei
das Wasser so klar gewesen, dass man die Steine auf dem Grund zählen konnte. Die Jüngeren lachten und glaubten ihm
nicht, doch keiner widersprach. Später kam der Händler aus der Stadt, kaufte zwei Körbe voll Forellen und bezahlte
mit neuen Scheinen. Er wollte wissen, wie das Wetter in der nächsten Woche werde, denn auf dem Markt fragten alle
danach. Niemand wusste es genau, aber der Alte schaute zu den Bergen hinüber und meinte, es werde wohl bald regnen.
So packten sie ihre Netze zusammen, banden die Boote fest und gingen schweigend nach Hause. In der Küche roch es
nach Brot und Kaffee, und die Kinder saßen bereits am Tisch. Nach dem Frühstück setzte sich der Vater ans Fenster
und schrieb einen langen Brief an seinen Bruder, der vor vielen Jahren ausgewandert war. Er berichtete von der
Ernte, von den Nachbarn und von der kleinen Schule, die im Herbst geschlossen werden sollte, weil es im Dorf zu
wenige Schüler gab. Am Ende fragte er, ob der Bruder nicht einmal zu Besuch kommen wolle, bevor der Winter die
Straßen wieder unpassierbar mache."""
RUSSIAN = """\
Ранним утром над рекой стоял густой туман, и рыбаки ждали на берегу, пока поднимется солнце. Один из них
рассказывал, что его дед ещё грёб руками, когда не было моторов. Тогда, говорил он, вода была такой прозрачной, что
можно было сосчитать камни на дне. Молодые смеялись и не верили ему, но никто не спорил. Позже приехал торговец из
города, купил две корзины форели и заплатил новыми деньгами."""
CHINESE = """\
清晨，河面上笼罩着浓雾，渔民们在岸边等待太阳升起。其中一个人说，他的祖父那时还用手划船，因为没有发动机。他说，
当时的水非常清澈，可以数清水底的石头。年轻人笑了，不相信他的话，但是没有人反驳。后来城里的商人来了，买了两筐鳟
鱼，用新钞票付了钱。他想知道下个星期的天气怎么样，因为市场上的人都在问。没有人确切知道，可是老人望着远处的山，
说大概很快就要下雨了。"""


@pytest.fixture(scope="module")
def encode(example: Path) -> object:
    tokenizer = Tokenizer.from_file(str(example / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def evaluation(encode: object) -> list[int]:
    return encode(read_text(default_evaluation_text()))


def code() -> str:
    return "".join(path.read_text("utf-8") for path in sorted(Path(email.__file__).parent.glob("*.py")))


def test_the_texts_that_ship_look_alike(encode: object, evaluation: list[int]) -> None:
    calibration = encode(read_text(default_calibration_text()))
    assert unlike(calibration, evaluation) is None
    assert unlike(calibration[:50_000], evaluation) is None
    assert unlike(evaluation[:50_000], evaluation[60_000:]) is None


def test_manuals_for_programmers_pass_for_prose(encode: object, evaluation: list[int]) -> None:
    documents = read_text(default_calibration_text()).split("\n\n\n")
    manuals = [one for one in documents if "PEP " in one or "PowerShell" in one]
    assert len(manuals) > 20
    assert unlike(encode("\n\n\n".join(manuals)), evaluation) is None


@pytest.mark.parametrize("text", [GERMAN, RUSSIAN, CHINESE], ids=["German", "Russian", "Chinese"])
def test_another_language_is_warned_of(text: str, encode: object, evaluation: list[int]) -> None:
    ids = encode(text)
    assert len(ids) >= 512
    warning = unlike(ids, evaluation)
    assert warning is not None and "looks unlike the evaluation text" in warning
    assert "\n" not in warning


def test_code_is_warned_of_and_the_sentence_says_how_far_apart(encode: object, evaluation: list[int]) -> None:
    source = encode(code())
    assert len(source) > 20_000
    warning = unlike(source, evaluation)
    assert warning is not None
    numbers = [float(word.rstrip(",;")) for word in warning.split() if word[0].isdigit() and "." in word]
    assert len(numbers) == 2 and numbers[0] > numbers[1] + 0.2
    assert unlike(source, source) is None
    assert unlike(evaluation, source) is not None


def test_a_few_tokens_say_nothing() -> None:
    assert unlike([1] * 511, [2] * 100_000) is None
    assert unlike([1] * 100_000, [2] * 1000) is None
    assert unlike([], []) is None
    assert unlike([1] * 512, [2] * 1024) is not None


@given(
    one=st.lists(st.integers(0, 20), min_size=1, max_size=50),
    other=st.lists(st.integers(0, 20), min_size=1, max_size=50),
)
def test_the_divergence_is_that_of_the_definition(one: list[int], other: list[int]) -> None:
    p, q = Counter(one), Counter(other)
    expected = 0.0
    for token in p | q:
        a, b = p[token] / len(one), q[token] / len(other)
        expected += sum(x / 2 * math.log2(2 * x / (a + b)) for x in (a, b) if x)
    assert divergence(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-12)
    assert divergence(np.array(one), np.array(one)) == 0
    assert divergence(np.array(one), np.array(other) + 21) == pytest.approx(1)
