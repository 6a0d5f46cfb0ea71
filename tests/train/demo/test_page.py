"""The demo as a visitor has it: its server, and its page in headless Chromium."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import DESKTOP, PHONE
from tests.train.demo.test_acts import picture
from train.restore.restorer import Restorer

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the server of these tests has its temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(model_file, place):
    """Of a demo that serves a small model with small limits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ["--megabytes", "0.4", "--megapixels", "0.3", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.cli", "demo", str(model_file), *limits], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(place)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    url, end = f"http://127.0.0.1:{port}/", time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    assert process.poll() is None, process.stdout.read()
    yield url
    assert list(place.glob("sharpprior-demo-*"))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "Traceback" not in out, out
    assert not list(place.glob("sharpprior-demo-*")), "a visitor's files outlive the server"


@pytest.fixture
def page(browser, address):
    """The page, just opened, with its first look on it."""
    browser.open(address)
    browser.wait(lambda: "PSNR" in browser.text("#told"), "the first look")
    return browser


def upload(page, selector: str, path: Path) -> None:
    page.find(f"{selector} input[type=file]").send_keys(str(path))


def saved(folder: Path, name: str, image: np.ndarray) -> Path:
    Image.fromarray(image).save(folder / name)
    return folder / name


def downloaded(page, name: str) -> np.ndarray:
    """The picture that the button downloads, once it has this name."""
    page.wait(lambda: f"Download {name}" in page.text("#download"), f"the download of {name}")
    path = page.downloaded("#download")
    assert path.name == name
    return np.asarray(Image.open(path))


def toast(page) -> str:
    return page.wait(lambda: page.text(".toast-messages"), "a message")


def open_playground(page) -> None:
    page.wait(lambda: page.run(
        "const t = [...document.querySelectorAll('button[role=tab]')].find(e => e.innerText.includes('Playground'));"
        "t.click(); return document.querySelector('#pad canvas')?.offsetWidth > 50"
    ), "the playground")  # fmt: skip


def test_the_first_look_asks_no_other_server_for_anything(page, address):
    assert "best without a model" in page.text("#told")
    asked = page.requests()
    assert address in asked
    assert [each for each in asked if not each.startswith((address, "data:", "blob:", "about:", "chrome"))] == []
    assert page.problems() == []


def test_a_photograph_is_restored_blended_and_downloaded(page, model_file, tmp_path):
    mine = picture(150, 200)
    upload(page, "#upload", saved(tmp_path, "mine.png", mine))
    restored = downloaded(page, "mine_restored.png")
    np.testing.assert_array_equal(restored, Restorer.load(model_file, "cpu")(mine))
    page.wait(lambda: "200 × 150 px" in page.text("#told"), "its size")
    assert "No score" in page.text("#told")
    widths = "return [...document.querySelectorAll('#compare img')].map(e => e.naturalWidth)"
    page.wait(lambda: page.run(widths) == [200, 200], "both pictures")
    shown = "return [...document.querySelectorAll('#compare img')].map(e => e.src).join()"
    before, knob = page.run(shown), page.find("#strength input[type=range]")
    page.actions().move_to_element(knob).move_by_offset(-knob.size["width"] // 2, 0).click().perform()
    page.wait(lambda: page.run(shown) != before, "the pictures at strength 0")
    np.testing.assert_array_equal(downloaded(page, "mine_restored.png"), mine)


def test_the_line_between_before_and_after_follows_the_pointer(page):
    line = page.find("#compare [data-testid=slider]")
    before = line.rect["x"]
    page.actions().move_to_element(page.find("#compare .icon-wrap")).click_and_hold().move_by_offset(
        -120, 0
    ).release().perform()
    page.wait(lambda: before - 130 < line.rect["x"] < before - 110, "the line to move")
    shown = re.search(r"inset\(0px 0px 0px ([\d.]+)%\)", page.find("#compare img.fixed").get_attribute("style"))
    assert 100 * 120 / page.find("#compare img.fixed").size["width"] == pytest.approx(50 - float(shown[1]), abs=1.5)


def test_an_example_is_scored(page):
    told = page.text("#told")
    page.find("#examples .thumbnail-item:nth-of-type(1)").click()
    page.wait(lambda: page.text("#told") != told and "PSNR" in page.text("#told"), "another example")
    assert "best without a model" in page.text("#told")
    assert downloaded(page, "example_restored.png").shape == (512, 512, 3)


def test_a_path_is_drawn_and_played(page):
    open_playground(page)
    scores = page.text("#scores")
    assert "Wiener filter, told the kernel" in scores
    pad = page.find("#pad canvas")
    page.actions().move_to_element_with_offset(pad, -80, -40).click_and_hold().move_by_offset(60, 30).move_by_offset(
        60, -50
    ).move_by_offset(30, 70).release().perform()
    page.wait(lambda: page.text("#scores") != scores and "restored by the model" in page.text("#scores"), "new scores")
    assert re.search(r"Motion over \d+ px: severe", page.text("#scores"))
    ink = """const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
             let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 200; return n"""
    assert page.run(ink, pad) > 2000
    drawn, scores = page.run(ink, pad), page.text("#scores")
    page.find("#shake").click()
    page.wait(lambda: page.text("#scores") != scores, "scores of a sampled path")
    page.wait(lambda: page.run(ink, page.find("#pad canvas")) != drawn, "the sampled path on the pad")
    widths = "return [...document.querySelectorAll('#play-compare img, #kernel img')].map(e => e.naturalWidth)"
    assert page.run(widths) == [512, 512, 256]


def test_a_sharp_photograph_of_ones_own_is_played_with(page, tmp_path):
    open_playground(page)
    scores = page.text("#scores")
    upload(page, "#own", saved(tmp_path, "sharp.png", picture(200, 300)))
    page.wait(lambda: page.text("#scores") != scores, "its scores")
    width = "return document.querySelector('#original img').naturalWidth"
    page.wait(lambda: page.run(width) == 200, "its middle square")


def test_limits_are_told(page, tmp_path):
    upload(page, "#upload", saved(tmp_path, "wide.png", np.zeros((600, 600, 3), np.uint8)))
    assert "600×600 px are 0.4 megapixels: at most 0.3 here" in toast(page)
    assert "600×600" in page.text("#told")
    assert "PSNR" not in page.text("#told")  # nothing of the picture before is left beside it
    assert page.run("return document.querySelectorAll('#compare img').length") == 0


def test_what_is_no_picture_is_told_as_text(page, tmp_path):
    (tmp_path / "a <img src=x onerror=alert(1)>.png").write_bytes(b"nothing")
    upload(page, "#upload", tmp_path / "a <img src=x onerror=alert(1)>.png")
    assert "is no picture that can be read" in toast(page)
    assert page.run("return document.querySelectorAll('img[src=x]').length") == 0


def test_a_file_that_is_too_large_is_not_taken(page, place, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    upload(page, "#upload", saved(tmp_path, "heavy.png", noise))
    assert "size" in toast(page).lower()
    kept = [each for each in place.rglob("*") if each.is_file() and each.stat().st_size > 400_000]
    assert [each for each in kept if each.name == "heavy.png"] == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_no_screen_is_too_narrow(browser, address, size):
    browser.open(address, size)
    browser.wait(lambda: "PSNR" in browser.text("#told"), "the first look")
    assert browser.overflow() == 0
    open_playground(browser)
    browser.wait(lambda: "PSNR" in browser.text("#scores"), "the playground's first look")
    assert browser.overflow() == 0


def test_the_server_answers_this_machine_alone_and_sends_its_policy(address):
    with urllib.request.urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    port = int(address.rstrip("/").rpartition(":")[2])
    others = {each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for other in others - {each for each in others if each.startswith("127.")}:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((other, port), timeout=5)
    for path in ("monitoring", "gradio_api/file=/etc/passwd", "gradio_api/file=pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError, match="40"):
            urllib.request.urlopen(address + path)
