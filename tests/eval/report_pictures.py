"""`python tests/eval/report_pictures.py` draws docs/pictures/report*.png: the report of a small sweep in a browser.

It needs chromium and chromedriver: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

from vtc.eval.spec import make_spec
from vtc.eval.sweep import run_sweep

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
SWEEP = {
    "model": "tiny-onevision", "tasks": ["tiny_detail"], "methods": ["random", "vtc_cls", "fastv", "hiprune"],
    "retentions": [0.75, 0.5], "limit": 48, "device": "cpu",
}  # fmt: skip
SHOWN = {"report.png": (1280, "h1", "[id^=task-] ~ details"), "report_narrow.png": (400, "#samples", "#settings")}
"""Width of the window, and from which element to which the picture reaches."""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")
DRAWN = "return [...document.querySelectorAll('.chart')].every((c) => !c.checkVisibility() || c.dataset.drawn)"


def browser(profile: str) -> Any:
    """A headless Chromium with a profile of its own."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise SystemExit("no chromium and chromedriver here; `apt-get install chromium chromium-driver` brings them")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def picture(driver: Any, page: Path, width: int, first: str, behind: str) -> bytes:
    """The page at this width from one element to another, as a PNG of few colours."""
    size = {"width": width, "height": 12_000, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.resolve().as_uri())
    while not driver.execute_script(DRAWN):
        time.sleep(0.1)
    place = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    top, bottom = (float(driver.execute_script(place, element)) for element in (first, behind))
    clip = {"x": 0, "y": top - 12, "width": width, "height": bottom - top, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip})
    content = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return content.getvalue()


def main() -> None:
    """Sweep, open the report, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="of a sweep that ran already")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = given.report or run_sweep(make_spec(SWEEP | {"out": f"{folder}/sweep"})).folder / "report.html"
        driver = browser(f"{folder}/profile")
        try:
            for name, (width, first, behind) in SHOWN.items():
                (given.out / name).write_bytes(picture(driver, report, width, first, behind))
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
