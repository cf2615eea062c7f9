"""`python -m vtc.eval.documents` writes the documents made of the code and of committed scores; `make docs` runs it.

Those that hold other measurements have a command each, which they name; `make results` runs all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from vtc.app.catalogue import describe_methods
from vtc.app.lines import lines_page
from vtc.app.method_pages import method_pages, overview
from vtc.eval import claims, parts, ranking
from vtc.eval.archive import SUFFIX, read_scores
from vtc.eval.cells import BASELINE
from vtc.eval.charts import picture
from vtc.eval.choosing import choosing_page
from vtc.eval.columns import column_page
from vtc.eval.curves import figure
from vtc.eval.files import markdown
from vtc.eval.reference import core_page, eval_page, methods_page
from vtc.eval.results import Results
from vtc.eval.series import make_series
from vtc.eval.spec import read_settings
from vtc.eval.suite import task_page

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SCORES = RESULTS / "scores"
"""Sweeps that `vtc.eval.archive` packed; one that is measured again changes the pages that show it, and no other."""
COMMAND = "python -m vtc.eval.documents"


@functools.cache
def scored(pattern: str) -> list[Results]:
    """The packed sweeps of that name, in the order of their names."""
    return [read_scores(path) for path in sorted(SCORES.glob(pattern + SUFFIX))]


DOCUMENTS: Mapping[str, Callable[[], str]] = {
    "choosing.md": lambda: choosing_page(scored("tiny-onevision")[0], (RESULTS / "overhead.md").read_text("utf-8")),
    "methods.md": lambda: method_pages(describe_methods()),
    "columns.md": column_page,
    "results/lines.md": lines_page,
    "results/ranking.md": lambda: ranking.document(scored("tiny-*"), COMMAND),
    "results/claims.md": lambda: claims.document(scored("tiny-*"), claims.read_claims(), COMMAND),
    "results/tiny_onevision.md": lambda: markdown(scored("tiny-onevision")[0]),
    "results/tiny_qwen.md": lambda: markdown(scored("tiny-qwen")[0]),
    "results/tiny_internvl.md": lambda: markdown(scored("tiny-internvl")[0]),
    "results/parts.md": lambda: parts.document(scored("parts")[0], COMMAND),
    "tasks.md": task_page,
    "api/vtc.md": core_page,
    "api/methods.md": methods_page,
    "api/eval.md": eval_page,
}
"""Name of a file in docs -> what makes its text."""


def onevision_figure() -> bytes:
    """The methods of the sweep `full` on tiny-onevision, as PNG: fifty lines could not be told apart."""
    (results,) = scored("tiny-onevision")
    sweeps = make_series(read_settings(Path("full")))
    drawn = {
        BASELINE,
        *(method.name for sweep in sweeps if sweep.model == "tiny-onevision" for method in sweep.methods),
    }
    lines = [line for line in results.lines if results.cells[line["cell"]]["method"] in drawn]
    return picture(figure(dataclasses.replace(results, lines=lines)), "png")


BEGIN, END = "<!-- methods: written by `make docs` -->", "<!-- end of methods -->"


def with_methods(readme: str) -> str:
    """The text of README with the table of the registry's methods between its marks."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{overview(describe_methods(), 'docs/methods.md')}\n{END}{after}"


def main(folder: Path = Path("docs"), readme: Path = Path("README.md")) -> None:
    """Write all of them into `folder`, and the table of methods into `readme`."""
    readme.write_text(with_methods(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for name, make in DOCUMENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(make(), encoding="utf-8")
        sys.stdout.write(f"{folder / name}\n")
    (folder / "results" / "tiny_onevision.png").write_bytes(onevision_figure())


if __name__ == "__main__":
    main()
