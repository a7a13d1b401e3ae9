"""What is drawn stands where its numbers say: coordinates are read back and held against the ticks of the axes."""

from __future__ import annotations

import math
import re
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from documents import choice, details, point, whole
from hypothesis import given
from hypothesis import strategies as st
from pages import Page, axis, drawings

from edgepack.gguf.types import TYPES
from edgepack.report import render
from edgepack.report.bits import section as bits_section
from edgepack.report.colours import of_bits
from edgepack.report.scales import Scale, spanning
from edgepack.report.spread import grouped, running
from edgepack.report.worst import STEPS, step

FRONTIER = "Size against KL divergence"


def frontier(points: list[dict], which: int = 0) -> Element:
    return drawings(render({"title": "t", "points": points}), FRONTIER)[which]


def straight(drawing: Element, which: str, *, logarithmic: bool = False):
    """The axis as its own ticks tell it: value -> coordinate, by least squares."""
    values, places = map(np.array, zip(*axis(drawing, which), strict=True))
    slope, start = np.polyfit(np.log(values) if logarithmic else values, places, 1)
    return lambda value: slope * (math.log(value) if logarithmic else value) + start


@pytest.mark.parametrize("which", [0, 1])
def test_points_and_intervals_stand_where_the_axes_say(which: int) -> None:
    points = whole()["points"]
    drawing = frontier(points, which)
    x, y = straight(drawing, "x"), straight(drawing, "y", logarithmic=True)
    groups = [group for group in drawing.iter("g") if "point" in str(group.get("class"))]
    assert [int(str(group.get("data-bytes"))) for group in groups] == sorted(p["bytes"] for p in points)
    for group in groups:
        given = next(p for p in points if p["bytes"] == int(str(group.get("data-bytes"))))
        assert float(str(group.get("data-kld"))) == given["mean_kld"]
        mark = next(shape for shape in group if shape.get("class") == "mark")
        half = float(mark.get("width", 0)) / 2
        place = [float(mark.get(name) or float(str(mark.get(name[1]))) + half) for name in ("cx", "cy")]
        assert place == pytest.approx([x(given["bytes"] / 1e6), y(given["mean_kld"])], abs=0.5)
        whisker = next(line for line in group.iter("line"))
        ends = [float(str(whisker.get(name))) for name in ("y1", "y2")]
        assert ends == pytest.approx([y(value) for value in given["ci95"]], abs=0.5)
        assert (group.find("circle[@class='chosen']") is not None) == given["chosen"]
        assert ("preset" in str(group.get("class"))) == (given["kind"] == "preset")


def test_the_prediction_is_a_line_through_the_allocated_points() -> None:
    points = whole()["points"]
    drawing = frontier(points)
    x, y = straight(drawing, "x"), straight(drawing, "y", logarithmic=True)
    (line,) = drawing.iter("polyline")
    places = [float(value) for pair in str(line.get("points")).split() for value in pair.split(",")]
    wanted = [(x(p["bytes"] / 1e6), y(p["predicted_kld"])) for p in points if p["kind"] == "allocated"]
    assert places == pytest.approx([value for pair in wanted for value in pair], abs=0.5)


def test_what_is_won_at_the_bytes_of_each_preset_is_said() -> None:
    text = Page(render(whole())).text
    assert "the divergence is 0.45 to 0.58 times the preset's" in text
    far = [point("Q4_K_M", "preset", 100, 0.5), point("a", "allocated", 50, 0.1), point("b", "allocated", 101, 0.1)]
    assert "times the preset's" not in Page(render({"title": "t", "points": far})).text


@pytest.mark.parametrize(
    "points",
    [
        [point("one", "preset", 1_000_000, 0.02)],
        [point("exact", "allocated", 1, 0.0), point("b", "preset", 2, 0.0, ci95=[0.0, 0.0])],
        [point("only predicted", "allocated", 5_000_000, None, predicted_kld=0.3)],
        [point("same", "allocated", 10, 0.5), point("same", "preset", 10, 0.5)],
        [point("wide", "allocated", 10**13, 1e-12, ci95=[0.0, 1e3])],
        [point("not a number", "allocated", 10, math.nan), point("b", "allocated", 20, 0.1)],
    ],
)
def test_few_odd_or_equal_points_are_drawn_inside_the_frame(points: list[dict]) -> None:
    for drawing in drawings(render({"title": "t", "points": points}), FRONTIER):
        width, height = (float(value) for value in str(drawing.get("viewBox")).split()[2:])
        for shape in drawing.iter():
            for name in ("cx", "x", "x1", "x2"):
                assert 0 <= float(shape.get(name, 0)) <= width
            for name in ("cy", "y", "y1", "y2"):
                assert 0 <= float(shape.get(name, 0)) <= height
        assert len(axis(drawing, "x")) >= 1


def test_points_without_any_divergence_are_no_picture() -> None:
    assert Page(render({"title": "t", "points": [point("a", "preset", 10, None)]})).sections() == set()


def test_labels_cover_neither_points_nor_each_other() -> None:
    crowd = [
        point(f"point {i}", "allocated" if i % 2 else "preset", 10**7 + 40_000 * i, 0.1 - i / 500) for i in range(30)
    ]
    drawing = frontier(crowd)
    boxes = []
    for text in (text for text in drawing.iter("text") if str(text.get("class")).startswith("name")):
        left, base, width = float(str(text.get("x"))), float(str(text.get("y"))), 7.5 * len(str(text.text))
        left -= width if text.get("text-anchor") == "end" else 0
        boxes.append((left, base - 11, left + width, base + 3))
    assert 2 <= len(boxes) < 30
    for index, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:index])


def test_every_window_is_a_bar_of_its_height_and_the_worst_lead_to_their_text() -> None:
    found = details(windows=8)
    drawing = drawings(render({"title": "t", "details": found}), "Divergence of each window")[0]
    x, y = straight(drawing, "x"), straight(drawing, "y")
    bars = list(drawing.iter("rect"))
    assert len(bars) == 8
    for window, (bar, value) in enumerate(zip(bars, found["kld_by_window"], strict=True)):
        left, width = float(str(bar.get("x"))), float(str(bar.get("width")))
        assert left + width / 2 == pytest.approx(x(window), abs=1)
        assert float(str(bar.get("y"))) == pytest.approx(y(value), abs=0.5)
        assert float(str(bar.get("y"))) + float(str(bar.get("height"))) == pytest.approx(y(0), abs=0.5)
        assert (bar.get("class") == "bar worst") == (window == 3)
    (link,) = drawing.iter("a")
    assert link.get("href") == "#window-3"


def test_thousands_of_windows_and_positions_are_drawn_in_groups() -> None:
    found = details() | {"kld_by_window": [0.1] * 100_000, "kld_by_position": [0.2] * 65_535}
    page = render({"title": "t", "details": found | {"worst": []}})
    drawing = drawings(page, "Divergence of each window")[0]
    assert 100 < len(list(drawing.iter("rect"))) <= 240
    assert "417 windows to a bar" in page


def test_windows_without_any_divergence_are_a_flat_picture() -> None:
    found = details() | {"kld_by_window": [0.0, 0.0], "kld_by_position": [0.0] * 4, "worst": []}
    assert "exactly the source" in Page(render({"title": "t", "details": found})).text


def test_tokens_are_coloured_by_the_step_they_reach_and_the_worst_are_numbered() -> None:
    assert [step(value) for value in (0.0, 0.0099, 0.01, 0.029, 0.3, 99.0)] == [0, 0, 1, 1, 4, len(STEPS)]
    page = Page(render({"title": "t", "details": details()}))
    tokens = [(tag, attributes) for tag, attributes in page.elements if attributes.get("title", "").endswith(" nats")]
    klds = [0.004 * 2**place for place in range(20)]
    assert [attributes["class"] for _, attributes in tokens] == [f"k{step(kld)}" for kld in klds]
    assert [tag for tag, _ in tokens] == ["span"] * 19 + ["mark"]
    assert "before word word0word1word2" in page.text
    assert "word191" in page.text  # token 19, with its number
    assert "75.0 %" in page.text and "0.0 %" in page.text


def test_the_grid_has_a_row_for_each_layer_in_order_and_counts_what_it_leaves_out() -> None:
    names = [f"blk.{layer}.{kind}.weight" for layer in (10, 2, 0) for kind in ("ffn_down", "attn_q", "attn_k")]
    tensors = [{"name": name, "type": "Q4_K", "bits": 4.5} for name in names]
    tensors += [{"name": f"blk.{layer}.attn_norm.weight", "type": "F32", "bits": 32.0} for layer in range(3)]
    tensors += [{"name": "blk.0.attn_q.bias", "type": "F32", "bits": 32.0}]
    markup = bits_section(tensors)
    assert markup is not None
    heads = re.findall(r'<th scope="(\w+)">(\w+)</th>', markup)
    assert [name for scope, name in heads if scope == "col"] == ["layer", "attn_q", "attn_k", "ffn_down"]
    assert [name for scope, name in heads if scope == "row"] == ["0", "2", "10"]
    assert "Not shown: 4 in full precision" in markup and markup.count("<td ") == 9


def test_names_of_other_formats_find_their_layers_too() -> None:
    names = ["/model/layers.3/attn/q_proj/MatMul", "model.layers.12.mlp.down_proj.weight", "lm_head"]
    markup = bits_section([{"name": name, "type": "int4", "bits": 4.5} for name in names])
    assert markup is not None
    assert re.findall(r'<th scope="row">(\d+)</th>', markup) == ["3", "12"]
    assert "attn/q_proj/MatMul" in markup and "mlp.down_proj" in markup and "lm_head" in markup


def test_hundreds_of_layers_are_one_table() -> None:
    tensors = [{"name": f"blk.{i}.ffn_up.weight", "type": "Q2_K", "bits": 2.625} for i in range(500)]
    markup = bits_section(tensors)
    assert markup is not None and markup.count('<th scope="row">') == 500 and "dense" in markup


def test_letters_on_a_colour_can_be_read_and_more_bits_are_lighter() -> None:
    def luminance(colour: str) -> float:
        short = colour.lstrip("#")
        channels = [int(c * 2, 16) for c in short] if len(short) == 3 else list(bytes.fromhex(short))
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    before = -1.0
    for kind in sorted(TYPES.values(), key=lambda kind: kind.bits_per_weight):
        paper, letters = (luminance(colour) for colour in of_bits(kind.bits_per_weight))
        assert (max(paper, letters) + 0.05) / (min(paper, letters) + 0.05) > 4.5  # WCAG 2.2, level AA
        if kind.bits_per_weight <= 8.5:
            assert paper >= before
            before = paper


def test_a_step_that_adds_bytes_is_drawn_as_one() -> None:
    steps = [{"step": name, "bytes": size} for name, size in (("a", 10), ("b", 4), ("c", 6))]
    drawing = drawings(render({"title": "t", "waterfall": steps}), "Bytes and divergence after each step")[0]
    bars = [{str(bar.get("class")): bar for bar in group.iter("rect")} for group in drawing.iter("g")]
    full = float(str(bars[0]["kept"].get("width")))
    assert [float(str(bar["kept"].get("width"))) / full for bar in bars] == pytest.approx([1, 0.4, 0.4], abs=1e-3)
    assert float(str(bars[1]["taken"].get("width"))) / full == pytest.approx(0.6, abs=1e-3)
    assert float(str(bars[2]["added"].get("width"))) / full == pytest.approx(0.2, abs=1e-3)


def test_a_candidate_is_drawn_from_its_best_to_its_expected_divergence_and_the_chosen_one_is_ringed() -> None:
    page = render({"title": "t", "choice": choice()})
    drawing = drawings(page, "Divergence of every candidate within the same budgets")[0]
    groups = [group for group in drawing.iter("g") if group.get("class") == "candidate"]
    assert [len(list(group.iter("rect"))) for group in groups] == [0, 1, 0]
    bar = next(groups[1].iter("rect"))
    dot, ring = groups[1].iter("circle")
    left, width = float(str(bar.get("x"))), float(str(bar.get("width")))
    # 0.15 lies at log(1.5) / log(2) of the way from 0.1 to 0.2
    assert float(str(dot.get("cx"))) == pytest.approx(left + 0.585 * width, abs=0.5)
    assert ring.get("class") == "chosen"
    assert "".join(groups[2].itertext()).endswith("fits no budget")


finite = st.floats(min_value=1e-12, max_value=1e12)


@given(st.lists(finite, max_size=20), st.booleans())
def test_an_axis_holds_its_values_and_has_few_round_ticks(values: list[float], logarithmic: bool) -> None:
    low, high = spanning(values, logarithmic=logarithmic)
    assert low < high and all(low <= value <= high for value in values)
    scale = Scale(low, high, 0.0, 100.0, logarithmic)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    ticks = scale.ticks(7)
    assert len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert all(low * (1 - 1e-6) - 1e-9 <= tick <= high * (1 + 1e-6) for tick in ticks)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300), st.integers(1, 50))
def test_groups_and_running_means_are_means(values: list[float], most: int) -> None:
    size, groups = grouped(values, most)
    assert len(groups) <= most
    assert groups[0] == pytest.approx(np.mean(values[:size]), abs=1e-9)
    place = len(values) // 2
    assert running(values, 3)[place] == pytest.approx(np.mean(values[max(0, place - 3) : place + 4]), abs=1e-9)
