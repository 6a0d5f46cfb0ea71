"""Pages as a browser shows them: sliders move, charts tell, nothing is wider than a phone."""

import numpy as np
import pytest

from tests.browser import DESKTOP, PHONE
from train.page.chart import Interval, Series
from train.page.page import Page


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """Of a page with everything that there is, its words as long as they come."""
    page = Page("A run with a rather long name/of_a_folder_without_spaces_that_does_not_end_soon", subtitle="x" * 90)
    page.text("Words. " * 60, "bad")
    page.facts({"a name": "value " * 40, "path": "/folder" * 30})
    page.table([f"head {n}" for n in range(14)], [[f"{n}.25" for n in range(14)]] * 3, "A wide table")
    page.chart(
        [Series("first", [1, 2, 3], [0.1, 0.5, 0.25], [0, 0.4, 0.2], [0.2, 0.6, 0.3]),
         Series("second", [1, 3], [0.3, 0.4], style="marked")],
        x="step", y="gain, dB",
    )  # fmt: skip
    page.intervals([Interval("severe", 0.1, 0.05, 0.15), Interval("extreme", -0.1, -0.2, 0.05)], x="gain, dB")
    left, right = np.full((40, 60, 3), (255, 0, 0), np.uint8), np.full((40, 60, 3), (0, 0, 255), np.uint8)
    page.slider(left, right, ("before, with many words about it", "after"), "caption")
    page.pictures([(left, "one"), (right, "two"), (left, "three"), (right, "four")])
    page.code("line of code " * 40, "config")
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(path)
    return path.as_uri()


def test_a_page_asks_for_nothing_and_has_no_errors(browser, address):
    browser.open(address)
    asked = browser.requests()
    assert address in asked
    assert [each for each in asked if each.startswith(("http", "ws", "ftp"))] == []
    assert browser.problems() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (820, 1180)])
@pytest.mark.parametrize("dark", [False, True])
def test_no_screen_is_too_narrow(browser, address, size, dark):
    browser.open(address, size, dark=dark)
    assert browser.overflow() == 0
    smallest = "return Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
    assert browser.run(f"{smallest}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 11
    ground, ink = (
        browser.run(f"return getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    brightness = [sum(map(int, each[4:-1].split(",")[:3])) for each in (ground, ink)]
    assert (brightness[0] < brightness[1]) == dark


def test_the_line_follows_the_pointer_and_the_keys(browser, address):
    from selenium.webdriver.common.keys import Keys

    browser.open(address)
    box = browser.find(".compare")

    def at() -> float:
        return float(browser.run("return arguments[0].style.getPropertyValue('--at')", box).rstrip("%"))

    assert at() == 50
    quarter = box.size["width"] // 4
    browser.actions().move_to_element(box).click_and_hold().move_by_offset(-quarter, 0).release().perform()
    assert at() == pytest.approx(25, abs=1)
    browser.actions().send_keys(Keys.ARROW_RIGHT).perform()
    assert at() == pytest.approx(27, abs=1)
    browser.actions().move_to_element(box).perform()  # not pressed
    assert at() == pytest.approx(27, abs=1)


def test_a_chart_tells_what_is_under_the_pointer(browser, address):
    browser.open(address)
    area = browser.find(".plot .area")
    half = area.size["width"] // 2
    browser.actions().move_to_element(area).move_by_offset(half - 2, 0).perform()
    assert browser.text(".tip").split("\n") == ["step 3", "first", "0.25 (0.2 … 0.3)", "second", "0.4"]
    browser.actions().move_to_element(area).perform()
    assert browser.text(".tip").split("\n") == ["step 2", "first", "0.5 (0.4 … 0.6)"]
    browser.actions().move_to_element(browser.find("h1")).perform()
    assert browser.run("return document.querySelectorAll('.tip').length") == 0


def test_a_page_that_is_not_written_any_more_says_so(browser, tmp_path):
    page = Page("a", refresh=1000, written=1_000_000_000)
    page.write(tmp_path / "old.html")
    browser.open((tmp_path / "old.html").as_uri())
    assert browser.text("time").startswith("written 2001-09-09 01:46:40 UTC")
    assert browser.text("time").endswith("nothing new since, so it may have stopped")
