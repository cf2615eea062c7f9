"""The page of parts: forms of a method side by side, as the store of a sweep has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtc.eval.parts import HEAD, document, rows
from vtc.eval.results import Results
from vtc.eval.spec import make_spec
from vtc.eval.sweep import run_sweep

FORMS = ["todre(relevance=false)", "todre(diversity=false,tau=1.0)", "hiprune", "hiprune(alpha=0.3)"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("parts")
    return run_sweep(make_spec({"out": out, "limit": 18, "methods": FORMS, "retentions": [0.5, 0.25]})).results


def test_forms_stand_side_by_side_at_every_budget(results: Results) -> None:
    found = [dict(zip(HEAD, row, strict=True)) for row in rows(results, "hiprune")]
    assert [(row["form"], row["at"]) for row in found] == [
        *[("hiprune", "0.5"), ("hiprune(alpha=0.3)", "0.5")],
        *[("hiprune", "0.25"), ("hiprune(alpha=0.3)", "0.25")],
    ]
    assert [row["fewer"] for row in found] == ["100%", "0%"] * 2
    lines = {(line["method"], line["retention"]): line for line in results.select("tiny_image", "accuracy")}
    for row in found:
        line = lines[row["form"], float(row["at"])]
        assert row["score"] == f"{100 * line['value']:.1f}"
        assert float(row["TokDense"]) == pytest.approx(float(row["score"]) / float(row["tokens"]), abs=0.01)
        assert row["KV"] == f"{line['kv_share']:.0%}" and row["FLOPs"] == f"{line['flops_share']:.0%}"


def test_a_stage_that_fires_has_fewer_tokens_than_the_untouched_model(results: Results) -> None:
    always = [row for row in rows(results, "todre") if "diversity=False" in row[1]]
    (row,) = (dict(zip(HEAD, each, strict=True)) for each in always)
    assert (row["at"], row["fewer"]) == ("-", "100%")  # at a threshold of 1 all tokens leave behind the layer checked
    assert 0 < float(row["tokens"]) < 144


def test_every_method_has_its_table(results: Results) -> None:
    text = document(results, "make it")
    assert [line for line in text.split("\n") if line.startswith("## ")] == ["## todre", "## hiprune"]
    assert "tiny-llava, questions of each task: tiny_image 18" in text


def test_the_committed_page_says_what_the_report_says(results: Results) -> None:
    page = (Path(__file__).parents[2] / "docs" / "results" / "parts.md").read_text(encoding="utf-8")
    about = document(results, "make it").split("\n## ")[0].split('"at":')[1]
    assert " ".join(about.split()) in " ".join(page.split())
