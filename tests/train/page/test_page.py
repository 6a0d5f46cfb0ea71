"""Pages: whole in one file, nothing taken for HTML, pictures without loss, lines where their numbers are."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from train.page.chart import Axis, Interval, Series, draw_chart, draw_intervals
from train.page.page import Page

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag: str, name: str = "") -> list[dict]:
        return [
            attrs for each, attrs in self.tags if each == tag and (not name or name in attrs.get("class", "").split())
        ]


def picture(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def full_page(text: str = "a") -> Page:
    page = Page(text, subtitle=text, refresh=9)
    page.heading(text)
    for mood in ("plain", "note", "good", "warning", "bad"):
        page.text(text, mood)
    page.facts({text: text, "n": 3})
    page.table([text, "n"], [[text, 1.5], ["b", "−2.5 (−3.0 … −2.0)"]], caption=text)
    page.chart([Series(text, [1, 2], [3.0, 4.0]), Series("b", [1], [2.0])], x=text, y=text, title=text)
    page.chart([], x=text, y=text)
    page.intervals([Interval(text, 0.5, 0.2, 0.8)], x=text, title=text)
    page.slider(picture(0), picture(1), (text, text), text)
    page.pictures([(picture(2), text), (picture(3)[..., 0], text)])
    page.code(text, text)
    return page


def test_no_text_becomes_html():
    plain, evil = (Parsed(full_page(text).html()) for text in ("a", EVIL))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attrs) for _, attrs in evil.tags] == [sorted(attrs) for _, attrs in plain.tags]
    assert sum(EVIL in text for text in evil.texts) >= 15
    assert [attrs["alt"] for attrs in evil.of("img")] == [EVIL] * 4


def test_a_page_fetches_nothing_and_runs_its_own_script_alone(tmp_path):
    text = full_page().html()
    page = Parsed(text)
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if attrs.get(name)]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    (policy,) = [attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    full_page().write(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("refresh", "wanted"), [(None, []), (30, ["30"])])
def test_a_page_renews_itself_only_where_asked(refresh, wanted):
    page = Parsed(Page("a", refresh=refresh).html())
    assert [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "refresh"] == wanted


def test_pictures_are_kept_to_the_last_bit():
    page = Page("a")
    images = [picture(n, 9, 17) for n in range(2)] + [picture(2)[..., 0]]
    page.slider(*images[:2], ("before", "after"))
    page.pictures([(images[2], "grey")])
    shown = Parsed(page.html()).of("img")
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["src"].partition(",")[2])))) for each in shown]
    assert [each["alt"] for each in shown] == ["after", "before", "grey"]  # the one before lies on top
    for image, wanted in zip(decoded, [images[1], images[0], images[2]], strict=True):
        np.testing.assert_array_equal(image, wanted)


def test_what_is_no_picture_or_no_pair_is_told():
    page = Page("a")
    with pytest.raises(ValueError, match=r"float64 \[4, 4, 3\]: a page shows uint8"):
        page.pictures([(np.zeros((4, 4, 3)), "x")])
    with pytest.raises(ValueError, match="pictures have one size"):
        page.slider(picture(0, 4, 4), picture(0, 4, 5), ("a", "b"))
    with pytest.raises(ValueError, match="a row of 1 cells under 2 heads"):
        page.table(["a", "b"], [["1"]])


def test_columns_of_numbers_are_set_to_the_right():
    page = Page("a")
    rows = [["severe", "+0.12 (+0.01 … +0.20)", 3, "one sample"], ["extreme", "−1.0", "4 %", "n/a"]]
    page.table(["tier", "gain", "share", "note"], rows)
    cells = Parsed(page.html()).of("td")
    assert [each.get("class") == "number" for each in cells] == [False, True, True, False] * 2


def drawn(text: str, kind: str) -> list[list[tuple[float, float]]]:
    """Points of the paths of a class, a list for every run, in units of the axes 0 … 1 from the left and bottom."""
    paths = [attrs["d"] for attrs in Parsed(text).of("path", kind)]
    runs = [run for path in paths for run in path.strip("M").split("M")]
    numbers = [re.findall(r"[\d.]+ [\d.]+", run) for run in runs]
    return [[(float(x) / 1000, 1 - float(y) / 1000) for x, y in (each.split() for each in run)] for run in numbers]


def test_lines_stand_where_their_numbers_are():
    text = draw_chart([Series("a", [0, 5, 10], [1.0, 3.0, 2.0])], x="step", y="loss")
    data = json.loads(Parsed(text).of("div", "plot")[0]["data-chart"])
    low, high = data["y"]
    assert low < 1 < 3 < high
    wanted = [(x / 10, (y - low) / (high - low)) for x, y in zip((0, 5, 10), (1, 3, 2), strict=True)]
    (run,) = drawn(text, "line")
    np.testing.assert_allclose(run, wanted, atol=2e-4)
    assert data["series"][0]["y"] == [1, 3, 2]


def test_a_logarithmic_axis_is_one_of_decades():
    text = draw_chart([Series("a", [0, 1, 2], [1e-3, 1e-1, 10.0])], x="step", y="loss", log=True)
    (run,) = drawn(text, "line")
    heights = [y for _, y in run]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=2e-4)
    with pytest.raises(ValueError, match="no place on a logarithmic axis"):
        draw_chart([Series("a", [0], [0.0])], x="step", y="loss", log=True)


def test_what_was_not_measured_is_a_gap_and_a_point_alone_is_seen():
    text = draw_chart([Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 3.0, None])], x="step", y="loss")
    assert [len(run) for run in drawn(text, "line")] == [2, 1]
    assert len(drawn(text, "dots")[0]) == 1
    assert "NaN" not in text
    assert "nothing measured yet" in draw_chart([Series("a", [0], [None])], x="step", y="loss")


def test_a_band_goes_there_and_back():
    band = Series("a", [0, 1, 2], [1.0, 1.0, 1.0], [0.5, None, 0.2], [1.5, None, 1.8], "marked")
    ((*edge,),) = drawn(draw_chart([band], x="step", y="gain"), "band")
    assert [round(x, 2) for x, _ in edge] == [0, 1, 1, 0]
    assert edge[0][1] > edge[3][1]


def test_series_of_unequal_lengths_are_told():
    with pytest.raises(ValueError, match=r"a: x, y and bounds have \[1, 2\] values"):
        draw_chart([Series("a", [0, 1], [1.0])], x="step", y="loss")


@pytest.mark.parametrize(
    ("values", "log"), [([0, 1], False), ([-3.2, 17.9], False), ([5, 5], False), ([0, 0], False), ([1e-7, 3e4], True),
                        ([0.9, 1.1], True), ([2, 2], True), ([1e6, 3e6], False), ([-1e-9, 1e-9], False)],
)  # fmt: skip
def test_axes_hold_their_values_and_have_round_ticks_inside(values, log):
    axis = Axis.of(values, log=log)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert 2 <= len(axis.ticks) <= 8
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks)
    labels = re.findall(r">([^<]+)</span>", axis.labels("y"))
    assert len(set(labels)) == len(axis.ticks)
    for label, tick in zip(labels, axis.ticks, strict=True):
        assert float(label.replace(",", "")) == pytest.approx(tick, rel=5e-3, abs=1e-12)


@pytest.mark.parametrize("last", [1, 3, 12, 13, 420, 100_000])
def test_an_axis_of_steps_has_whole_ticks(last):
    ticks = Axis.of([0, last], tight=True).ticks
    assert all(float(tick).is_integer() for tick in ticks)
    assert len(ticks) >= 2


def test_intervals_say_by_colour_whether_they_hold_zero():
    rows = [Interval("a", 0.5, 0.1, 0.9), Interval("b", -0.5, -0.9, -0.1), Interval("c", 0.1, -0.2, 0.4)]
    text = draw_intervals([*rows, Interval("d", 0.3)], x="gain, dB")
    assert re.findall(r'class="row (up|down|open)"', text) == ["up", "down", "open", "open"]
    assert "+0.500 (+0.100 … +0.900)" in text
    lefts = [float(each) for each in re.findall(r'class="dot" style="left:([\d.]+)%', text)]
    assert lefts[1] < lefts[2] < lefts[3] < lefts[0]
    with pytest.raises(ValueError, match="no place on an axis"):
        draw_intervals([Interval("a", math.nan)], x="gain")
