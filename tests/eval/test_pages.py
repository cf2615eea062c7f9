"""A headless Chromium for pages that the library writes; used by tests, which skip where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage",
)  # fmt: skip


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver with a fresh profile in the folder `profile`; without Chromium the test is skipped, and fails in CI."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "no chromium and chromedriver here; `apt-get install chromium chromium-driver` brings them"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def open_page(browser: Any, page: Path, width: int, *, height: int = 20_000) -> list[str]:
    """Load a local page so tall that all of it is in view, wait for its charts, and return the console's complaints."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(page.resolve().as_uri())
    finish = time.monotonic() + 60
    while time.monotonic() < finish and browser.execute_script(PENDING):
        time.sleep(0.1)
    assert not browser.execute_script(PENDING), "charts were not drawn in a minute"
    return [json.dumps(entry) for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


PENDING = """
return [...document.querySelectorAll(".chart")].filter((c) => c.checkVisibility() && !c.dataset.drawn).length;
"""
