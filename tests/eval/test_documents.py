"""Generated documents say what the code says now: whole where that is cheap, else all but the measured numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import vtc.testing.__main__ as contract
from vtc.app.pages import page, table
from vtc.eval.documents import DOCUMENTS, main
from vtc.eval.training import atp_report, vqtoken_report
from vtc.eval.training.measure import Measurement
from vtc.testing import overhead, timing
from vtc.testing.models import TINY_MODELS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("docs")
    main(folder)
    return folder


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_made_of_code_are_current(name: str, written: Path) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == (written / name).read_text(encoding="utf-8"), "run `make docs`"


def measured(families: tuple[str, ...], questions: int) -> Measurement:
    return Measurement((True,) * questions, families * (questions // 9), (36.0,) * questions, 144, (144.0,) * 6)


def atp() -> str:
    found = {label: measured(vqtoken_report.FAMILIES, 540) for label in ("untouched", "trained", *atp_report.OTHERS)}
    return atp_report.report({name: found for name in (atp_report.WEIGHTS, f"{atp_report.WEIGHTS}-25")}, 60)


MEASURED: dict[str, Callable[[], str]] = {
    "overhead": lambda: overhead.report([], 9),
    "ops": lambda: timing.report([]),
    "contract": lambda: contract.report((["method", *TINY_MODELS], []), (["check", *TINY_MODELS], []), 7, 5e-5),
    "vqtoken": lambda: vqtoken_report.report([("none", "6", measured(vqtoken_report.FAMILIES, 720))], None),
    "atp": atp,
}
"""What each report says around its measurements, of which the committed one was made with more weights (`--plain`)."""


def words(text: str) -> list[str]:
    """The text without the rows of its tables, and with every number as #."""
    lines = text.split("\n")
    rows = {i for i in range(2, len(lines)) if lines[i].startswith("|") and lines[i - 1].startswith("|")}
    kept = " ".join(line for i, line in enumerate(lines) if i not in rows and not line.startswith("|---"))
    return re.sub(r"\d[\d.e-]*", "#", kept).split()


@pytest.mark.parametrize("name", MEASURED)
def test_measured_documents_say_what_their_reports_say(name: str) -> None:
    committed, made = (words(text) for text in ((DOCS / "results" / f"{name}.md").read_text(), MEASURED[name]()))
    if name == "atp":  # the order of the families is that of the questions
        committed, made = sorted(committed), sorted(made)
    assert committed[: len(made)] == made, f"run the command that docs/results/{name}.md names"
    assert committed[len(made) :][:6] in ([], vqtoken_report.PLAIN.split()[:6])


def test_a_page_is_title_command_and_parts() -> None:
    about = " ".join(["word"] * 30)
    text = page("Title", "make it", about, "## Part", (["a", "b"], [["1", "2"], ["3", "4"]]), packages=("rich",))
    head, made, part, rows = text.rstrip("\n").split("\n\n")
    assert (head, part) == ("# Title", "## Part")
    assert made.startswith("Made by `make it`: word") and re.search(r"word\s+rich [\d.]+\.$", made)
    assert max(map(len, made.split("\n"))) <= 120
    assert rows == table(["a", "b"], iter([["1", "2"], ["3", "4"]])) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"
