"""Headless Chromium for tests that look at pages as people do; skipped by name where none is installed, not in CI."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

Found = TypeVar("Found")
DESKTOP, PHONE = (1280, 900), (390, 844)
PATIENCE = 90.0  # s for what a page does: the machine may be busy


def cannot(reason: str) -> None:
    """Skip, or fail where CI demands that these tests run."""
    if os.environ.get("SHARPPRIOR_CI"):
        pytest.fail(f"SHARPPRIOR_CI is set, and pages must be tested: {reason}")
    pytest.skip(f"no Chromium to test pages with: {reason}")


class Browser:
    """One headless Chromium."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium", "chromium-browser", "google-chrome")
        for each in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(each)
        options.add_argument(f"--user-data-dir={folder / 'profile'}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = Service(_program("chromedriver", "chromium.chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self._downloads = folder / "downloads"
        wanted = {"behavior": "allow", "downloadPath": str(self._downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", wanted)

    def close(self) -> None:
        """End it."""
        self.driver.quit()

    def open(self, address: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        """Load an address on a screen of a size in px, forgetting what was logged before."""
        device = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.requests()
        self.problems()
        self.driver.get(address)

    def run(self, script: str, *values: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *values)

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector, waited for."""
        from selenium.webdriver.common.by import By

        return self.wait(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None), selector)

    def text(self, selector: str) -> str:
        """The text that is seen of an element."""
        return self.find(selector).text

    def actions(self) -> Any:
        """A chain of what a pointer does."""
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver, duration=20)

    def wait(self, asked: Callable[[], Found], what: str = "", seconds: float = PATIENCE) -> Found:
        """What is asked, as soon as it is true. Fails after `seconds`."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := asked():
                    return found
            except StaleElementReferenceException:
                pass
            time.sleep(0.1)
        pytest.fail(f"waited {seconds:.0f} s for {what or asked}; the page says:\n{self.find('body').text[:2000]}")

    def downloaded(self, selector: str) -> Path:
        """The file that a click on an element downloads."""
        shutil.rmtree(self._downloads, ignore_errors=True)
        self._downloads.mkdir()
        self.find(selector).click()

        def whole() -> list[Path]:
            return [path for path in self._downloads.iterdir() if path.suffix != ".crdownload" and path.name[0] != "."]

        return self.wait(whole, f"a download by {selector}")[0]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        logged = (json.loads(each["message"])["message"] for each in self.driver.get_log("performance"))
        return [each["params"]["request"]["url"] for each in logged if each["method"] == "Network.requestWillBeSent"]

    def problems(self) -> list[str]:
        """Errors on the console since the last call."""
        return [each["message"] for each in self.driver.get_log("browser") if each["level"] == "SEVERE"]

    def overflow(self) -> int:
        """px by which the page is wider than the screen."""
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        layout = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssVisualViewport"]["clientWidth"]
        return max(self.run(wide), round(self.run("return innerWidth") - layout))

    def picture(self, path: Path) -> None:
        """Write the whole page as PNG."""
        size = self.run("const e = document.documentElement; return [innerWidth, Math.min(e.scrollHeight, 8000)]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        wanted = {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", wanted)["data"]))


def started(folder: Path) -> Iterator[Browser]:
    """A browser, ended at the end."""
    if importlib.util.find_spec("selenium") is None:
        cannot("selenium is not installed")
    browser = Browser(folder)
    yield browser
    browser.close()


def _program(*names: str) -> str:
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        cannot(f"{names[0]} not found (Debian: apt-get install chromium chromium-driver)")
    return found
