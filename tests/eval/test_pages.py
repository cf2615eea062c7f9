"""Pages in a headless Chromium: nothing complains, nothing overflows, what can be pressed works."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtc.eval.compare import compare
from vtc.eval.compare_report import write_comparison
from vtc.eval.report import write_report
from vtc.eval.samples import thumbnail

WriteStore = Callable[..., Path]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage",
)  # fmt: skip
METHODS = (
    "random", "stride", "pool", "vtc_cls", "globalcom2", "hiprune", "todre", "atp_training_free", "mustdrop", "aim",
    "vqtoken_codebook", "downsample", "a_method_with_a_long_name(weights=some-weights) <b>",
)  # fmt: skip
PENDING = """
return [...document.querySelectorAll(".chart")].filter((c) => c.checkVisibility() && !c.dataset.drawn).length;
"""


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver with a fresh profile; without Chromium the test is skipped, and fails where ``CI`` is set."""
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
    """Load a page so tall that all of it is in view, open what is folded, wait for charts; the console's complaints."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.resolve().as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    settle(browser)
    return [json.dumps(entry) for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def open_once(browser: Any, page: Path) -> None:
    """The page at 1280 pixels, as it is where an earlier test has opened it."""
    if browser.current_url != page.resolve().as_uri() or browser.execute_script("return innerWidth") != 1280:
        open_page(browser, page, 1280)


def settle(browser: Any) -> None:
    """Wait until every chart in view is drawn."""
    finish, quiet = time.monotonic() + 90, 0
    while time.monotonic() < finish and quiet < 3:  # what was unfolded just now comes into view a moment later
        time.sleep(0.1)
        quiet = 0 if browser.execute_script(PENDING) else quiet + 1
    assert quiet == 3


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> Path:
    """Thirteen methods at three retentions, one with four seeds, on two tasks; samples, with kept tokens of a cell."""
    cells: list[tuple[Any, ...]] = [("none", 1.0), *((m, r) for m in METHODS for r in (0.5, 0.25, 0.1))]
    cells += [("random", r, seed) for r in (0.5, 0.25, 0.1) for seed in (1, 2, 3)]
    rng = np.random.default_rng(0)
    scores = {
        task: [(rng.random(40) < 0.5 + 0.45 * (retention or 0.3)).astype(float).tolist() for _, retention, *_ in cells]
        for task in ("images", "a_task_with_quite_a_long_name")
    }
    clusters = {task: [n // 2 for n in range(40)] for task in scores}
    folder = write_store(tmp_path_factory.mktemp("sweep"), cells, scores, clusters=clusters)
    picture = thumbnail(Image.new("RGB", (600, 300), "red"))
    samples = [
        {"doc_id": doc, "question": f"What <b>colour</b> {doc}?", "target": "red", "why": "spread evenly", "of": 1,
         "pictures": [picture], "places": [[0, 0, 1]]}
        for doc in (3, 5)
    ]  # fmt: skip
    about = {"task": "images", "task_fp": "f", "stage": "before the LLM", "left": 5, "of": 16}
    panels = [["overview", 1, 2, "QA=="], ["tiles", 2, 3, "VA=="]]  # 01 and 010 101
    items = [{"media": 0, "kind": "image", "window": [0.25, 0, 0.75, 1], "panels": panels}]
    lines = [{**about, "cell": cell, "doc_id": doc, "items": items} for cell in ("k1", "k2") for doc in (3, 5)]
    (folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    (folder / "samples" / "images.json").write_text(json.dumps({"fingerprint": "f", "samples": samples}))
    write_report(folder)
    return folder


def overflow(browser: Any) -> int:
    """How many pixels the page is wider than the window."""
    wider = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    return int(wider)


@pytest.mark.parametrize("width", [400, 1280])
def test_the_report_is_quiet_and_fits_and_names_stand_apart(browser: Any, store: Path, width: int) -> None:
    assert open_page(browser, store / "report.html", width) == []
    assert browser.execute_script("return window.innerWidth") == width
    assert overflow(browser) == 0
    drawn = browser.execute_script("return document.querySelectorAll('.chart[data-drawn] svg').length")
    assert drawn == 9  # the ranking, and of each task curve, differences, pairs and groups
    boxes = browser.execute_script(
        """
        const chart = [...document.querySelectorAll('.two .chart[data-drawn]')][0];
        const names = [...chart.querySelectorAll('.role-mark.mark-text text')].filter((t) => t.textContent);
        const edge = chart.getBoundingClientRect().right;
        return names.map((t) => [t.textContent, t.getBoundingClientRect().top, t.getBoundingClientRect().right - edge]);
        """
    )
    assert len(boxes) == 14  # thirteen methods, the seeds of one together, and untouched
    tops = sorted(top for _, top, _ in boxes)
    assert min(b - a for a, b in itertools.pairwise(tops)) > 10
    assert max(over for _, _, over in boxes) <= 1


def test_a_press_sorts_a_table(browser: Any, store: Path) -> None:
    open_once(browser, store / "report.html")
    column = "return [...document.querySelectorAll('#ranked tbody tr')].map((row) => row.cells[2].innerText)"
    press = "document.querySelectorAll('#ranked th')[2].click()"
    browser.execute_script(press)
    down = [float(text) for text in browser.execute_script(column)]
    assert down == sorted(down, reverse=True) and len(set(down)) > 5
    browser.execute_script(press)
    assert [float(text) for text in browser.execute_script(column)] == down[::-1] or down[::-1] == sorted(down)
    assert browser.execute_script("return document.querySelectorAll('#ranked th')[2].ariaSort") == "ascending"


def test_a_choice_shows_another_chart(browser: Any, store: Path) -> None:
    open_once(browser, store / "report.html")
    shown = "return [...document.querySelectorAll('.choice')[0].querySelectorAll('.board')].map((each) => !each.hidden)"
    assert browser.execute_script(shown) == [False, False, True]
    browser.execute_script(
        "const s = document.querySelector('.choice select'); s.value = '0'; s.dispatchEvent(new Event('change'))"
    )
    settle(browser)
    assert browser.execute_script(shown) == [True, False, False]


def test_samples_show_picture_question_and_answers(browser: Any, store: Path) -> None:
    open_once(browser, store / "report.html")
    words = "return document.querySelector('.browser').innerText"
    assert "What <b>colour</b> 3?" in browser.execute_script(words)
    assert browser.execute_script("return document.querySelector('.browser img').naturalWidth") == 256
    browser.execute_script("document.querySelector('[data-part=on]').click()")
    assert "document 5" in browser.execute_script(words)
    cells = browser.execute_script("return document.querySelectorAll('.browser td.right, .browser td.wrong').length")
    assert cells == 1 + 3 * 13 + 9


VEILED = """
const box = (element) => {
  const { x, y, width, height } = element.getBoundingClientRect();
  return [x, y, width, height];
};
return [...document.querySelectorAll(".browser figure")].map((figure) => {
  const canvas = figure.querySelector("canvas"), [x, y, width, height] = box(figure.querySelector("img"));
  if (!canvas) return null;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const [left, top, w, h] = box(canvas);
  return {
    size: [canvas.width, canvas.height],
    dropped: [...pixels].filter((_, at) => at % 4 === 3).map((alpha) => alpha > 0),
    window: [(left - x) / width, (top - y) / height, w / width, h / height],
    name: figure.querySelector("figcaption").innerText,
  };
});
"""


def test_an_answer_shows_the_tokens_that_its_cell_kept(browser: Any, store: Path) -> None:
    open_page(browser, store / "report.html", 1280)
    overview, tiles = browser.execute_script(VEILED)  # of k1, the first cell that has some
    assert (overview["name"], overview["size"], overview["dropped"]) == ("overview", [2, 1], [True, False])
    assert (tiles["name"], tiles["size"]) == ("tiles", [3, 2])
    assert tiles["dropped"] == [True, False, True, False, True, False]
    assert np.allclose(tiles["window"], [0.25, 0, 0.5, 1], atol=0.01)
    line = "return document.querySelector('[data-part=kept]').innerText"
    assert browser.execute_script(line) == "random at 0.5, before the LLM: 5 of 16 visual tokens left"
    browser.execute_script("document.querySelector('[data-part=on]').click()")  # the same cell, on the next sample
    assert browser.execute_script(line).startswith("random at 0.5")
    shown = "return [...document.querySelectorAll('.browser td.shown')].map((cell) => cell.ariaPressed)"
    assert browser.execute_script(shown) == ["true"]
    press = "document.querySelectorAll('.browser tbody tr')[1].cells[arguments[0]].click()"
    browser.execute_script(press, 3)  # k2
    assert browser.execute_script(line).startswith("random at 0.25")
    browser.execute_script(press, 4)  # k3, of which nothing is recorded
    assert browser.execute_script(line).startswith("random at 0.25")
    browser.execute_script(press, 3)
    assert browser.execute_script(VEILED) == [None] and browser.execute_script(line) == ""


@pytest.mark.parametrize("width", [400, 1280])
def test_a_comparison_is_quiet_and_fits(browser: Any, store: Path, tmp_path: Path, width: int) -> None:
    write_comparison(compare(store, store), tmp_path)
    assert open_page(browser, tmp_path / "compare.html", width) == []
    assert overflow(browser) == 0


def test_the_page_is_small_and_loads_nothing(store: Path) -> None:
    text = (store / "report.html").read_text()
    assert len(text) < 3_000_000
    text = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.DOTALL)
    loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"([^\"]*)\"", text)
    assert loaded == ["data:,"]


@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_of_kept_tokens_is_quiet_and_follows_its_slider(browser: Any, tmp_path: Path, width: int) -> None:
    from vtc.app.loading import load
    from vtc.app.show import show
    from vtc.eval.tiny.benchmark import scene_image

    loaded = load("tiny-llava", device="cpu")
    shown = show(loaded.model, loaded.processor, scene_image(0), "is it?", ["vtc_cls", "stride"], [0.5, 0.25], side=96)
    assert open_page(browser, shown.save(tmp_path / "shown.html"), width) == []
    assert overflow(browser) == 0
    texts = "return [...document.querySelectorAll('article')].map((each) => each.innerText)"
    assert all("36 of 144 tokens per layer" in text for text in browser.execute_script(texts))
    move = "const b = document.getElementById('budget'); b.value = 1; b.dispatchEvent(new Event('input'))"
    browser.execute_script(move)
    assert all("72 of 144 tokens per layer" in text for text in browser.execute_script(texts))
    kept = browser.execute_script("return document.querySelector('article img').src")
    browser.execute_script("document.getElementById('scores').click()")
    assert browser.execute_script("return document.querySelector('article img').src") != kept
