"""Generated documents say what the code says now: whole where that is cheap, else all but the measured numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import vtc.testing.__main__ as contract
import vtc.testing.inside.__main__ as encoder_contract
from vtc.app.pages import page, table
from vtc.eval.documents import DOCUMENTS, main
from vtc.eval.encoders import page as encoder_page
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.training import atp_report, p_mod_report, quecc_report, vqtoken_report
from vtc.eval.training.measure import Measurement
from vtc.testing import graphs, overhead, scaling, selecting, timing
from vtc.testing.encoders import NAMES
from vtc.testing.models import TINY_MODELS

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("docs")
    readme = folder / "README.md"
    readme.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    main(folder, readme)
    return folder


def test_the_table_in_the_readme_is_current(written: Path) -> None:
    assert README.read_text(encoding="utf-8") == (written / "README.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_made_of_code_are_current(name: str, written: Path) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == (written / name).read_text(encoding="utf-8"), "run `make docs`"


def measured(families: tuple[str, ...], questions: int, layers: int = 6) -> Measurement:
    each, some = questions // len(families), (144,) * questions
    return Measurement((True,) * questions, families * each, (36.0,) * questions, some, (144.0,) * layers)


def atp() -> str:
    labels = ("untouched", "trained", *atp_report.OTHERS)
    details = TASKS["tiny_detail"].graded
    found = {name: dict.fromkeys(labels, measured(vqtoken_report.FAMILIES, 540)) for name in atp_report.WEIGHTS}
    found["atp-tiny-onevision"] = dict.fromkeys(labels, measured(details, 360, 12))
    return atp_report.report(found, 60)


def quecc() -> str:
    result = measured(vqtoken_report.FAMILIES, 540)
    return quecc_report.report(
        result, {name: dict.fromkeys(quecc_report.FORMS, result) for name in quecc_report.WEIGHTS}
    )


def encoders() -> str:
    recalls = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    asked = {f"scenes_{name}": ["top1", "top5"] for name in ("colour", "form", "digit", "word")}
    return encoder_page.report(
        [
            encoder_page.Section(f"{task}: 1 pictures", encoder_page.head(metrics), [])
            for task, metrics in {**asked, "scenes_retrieval": recalls}.items()
        ]
    )


MEASURED: dict[str, Callable[[], str]] = {
    "overhead": lambda: overhead.report([], 5),
    "ops": lambda: timing.report([]),
    "selections": lambda: selecting.report([]),
    "scaling": lambda: scaling.report([]),
    "graphs": lambda: graphs.report([]),
    "contract": lambda: contract.report((["method", *TINY_MODELS], []), (["check", *TINY_MODELS], []), 7, 5e-5),
    "encoder_contract": lambda: encoder_contract.report(*encoder_contract.tables([], NAMES), 7, 5e-5),
    "p_mod": lambda: p_mod_report.report([("none", "1", measured(vqtoken_report.FAMILIES, 360))]),
    "vqtoken": lambda: vqtoken_report.report([("none", "6", measured(vqtoken_report.FAMILIES, 720))], None),
    "atp": atp,
    "quecc": quecc,
    "encoders": encoders,
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
    if name in ("atp", "quecc"):  # the order of the families is that of the questions
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
