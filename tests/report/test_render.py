"""The page as a whole: what is in it, that nothing gets out of it, and that hostile text stays text."""

from __future__ import annotations

import copy
import re

import pytest
from documents import HOSTILE, details, measurement, whole
from pages import Page, drawings

from edgepack.report import render
from edgepack.report.markup import escaped

KNOWN_ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3", "p"),
    *("dl", "div", "dt", "dd", "b", "i", "a", "span", "mark", "sup", "code", "small", "ul", "ol", "li"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure"),
    *("svg", "desc", "g", "line", "rect", "circle", "polyline", "text"),
}


def test_a_whole_document_shows_every_section() -> None:
    page = Page(render(whole()))
    assert page.sections() == {"waterfall", "choice", "frontier", "bits", "spread", "worst"}
    assert len(page.ids) == len(set(page.ids))
    assert "this package" in page.text and "title word" in page.text


@pytest.mark.parametrize(
    ("part", "section"),
    [
        ("points", "frontier"),
        ("tensors", "bits"),
        ("waterfall", "waterfall"),
        ("choice", "choice"),
    ],
)
def test_a_section_stands_only_where_its_data_does(part: str, section: str) -> None:
    document = whole()
    everything = Page(render(document)).sections()
    for nothing in (None, []):
        assert Page(render(document | {part: nothing})).sections() == everything - {section}
    del document[part]
    assert Page(render(document)).sections() == everything - {section}


def test_without_details_there_is_no_spread_and_no_text() -> None:
    assert Page(render(whole() | {"details": None})).sections() == {"waterfall", "choice", "frontier", "bits"}
    one = details() | {"kld_by_window": [0.1], "kld_by_position": []}
    assert "spread" not in Page(render({"title": "t", "details": one})).sections()


def test_a_title_alone_is_a_page() -> None:
    page = Page(render({"title": "only this"}))
    assert page.sections() == set()
    assert page.text.strip() == "only this" * 2  # the window's title and the heading


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    plain, page = render(whole("word")), render(whole(text))
    page.encode("utf-8")
    found = Page(page)
    assert {tag for tag, _ in found.elements} <= KNOWN_ELEMENTS
    # The same elements with the same attributes as with a harmless word (lengths of bars and places of labels aside).
    names = [[(tag, sorted(attributes)) for tag, attributes in Page(text).elements] for text in (plain, page)]
    assert sorted(map(str, names[0])) == sorted(map(str, names[1]))
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", page)
    shown = re.sub(r"&.*", "", str(escaped(text))) or "&"
    assert shown in page
    for drawing in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        assert drawing.isprintable() or "\n" in drawing


def test_a_string_that_says_it_is_markup_is_escaped() -> None:
    assert escaped("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert escaped(escaped("<b>")) == "&lt;b&gt;"
    assert escaped("tab\tline\n") == "tab\tline\n"
    assert escaped("\0\x1b") == "␀␛"
    assert escaped("\u202e") == "⟨U+202E⟩"
    assert escaped("👩\u200d🔬 नमस्ते") == "👩\u200d🔬 नमस्ते"


def test_nothing_is_fetched_run_or_sent() -> None:
    page = render(whole())
    found = Page(page)
    assert not {tag for tag, _ in found.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    }
    for _, attributes in found.elements:
        assert not set(attributes) & {"src", "srcset", "action", "xlink:href", "data", "ping", "background"}
        assert str(attributes.get("href", "#")).startswith("#")
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    policy = next(a["content"] for tag, a in found.elements if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy


def test_every_inner_link_has_its_place() -> None:
    found = Page(render(whole()))
    targets = {str(attributes["href"])[1:] for tag, attributes in found.elements if tag == "a"}
    assert targets and targets <= set(found.ids)


def test_every_drawing_has_a_title_and_a_description_that_it_names() -> None:
    page = render(whole())
    names = {"Size against KL divergence", "Bytes and divergence after each step"}
    names |= {"Divergence of each window", "Divergence by position"}
    for name in names:
        wide, narrow = drawings(page, name)
        assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
        for drawing in (wide, narrow):
            ids = [element.get("id") for element in drawing if element.tag in ("title", "desc")]
            assert drawing.get("aria-labelledby") == " ".join(map(str, ids))
            assert drawing.findtext("desc")


def test_the_same_document_gives_the_same_bytes_and_is_left_alone() -> None:
    document = whole()
    before = copy.deepcopy(document)
    assert render(document) == render(copy.deepcopy(document))
    assert document == before


def test_the_verdict_names_what_was_missed_and_what_was_not_measured() -> None:
    text = Page(render(whole())).text
    assert "✗ fail Missed: KL divergence from the source, mean. 0 of 2 budgets measured and met." in text
    assert "Not measured: Time to first token, 90 % quantile." in text
    assert "167 %" in text  # 0.05 of at most 0.03


def test_a_minimum_that_is_reached_is_measured_against_itself() -> None:
    row = measurement("top1_agreement", 0.93, verdict="pass", budget={"min": 0.9})
    page = render({"title": "t", "verdict": "pass", "measurements": [row]})
    assert "≥ 90.00 %" in page and " 103 %" in page and "1 of 1 budgets measured and met" in page


@pytest.mark.parametrize("budget", [{"max": 0}, {"min": -1.0}, {}])
def test_a_limit_that_nothing_can_be_a_share_of_draws_no_gauge(budget: dict[str, float]) -> None:
    row = measurement("mean_kld", 0.0, verdict="pass", budget=budget)
    assert 'class="gauge"' not in render({"title": "t", "verdict": "pass", "measurements": [row]})


def test_a_profile_without_budgets_says_so_and_unfolds_the_measurements() -> None:
    page = Page(render({"title": "t", "verdict": "pass", "measurements": [measurement("perplexity", 11.5)]}))
    assert "The profile sets no budgets." in page.text
    assert "details" not in {tag for tag, _ in page.elements}
