"""The page of claims: every figure comes from the rows of a finished sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtc.errors import InputError
from vtc.eval import ranking
from vtc.eval.answers import answers
from vtc.eval.claims import UNTOUCHED, Claim, differences, document, judged, losses, read_claims
from vtc.eval.comparisons import retained
from vtc.eval.mini import report
from vtc.eval.results import Results
from vtc.eval.spec import make_spec
from vtc.eval.sweep import run_sweep
from vtc.eval.tiny.tasks import TASKS
from vtc.method.registry import METHODS
from vtc.method.text import parse


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("claims")
    methods = ["random(seeds=3)", "hiprune", "fastv@0.33"]
    return run_sweep(make_spec({"out": out, "limit": 48, "methods": methods, "retentions": [0.33, 0.05]})).results


def row(claim: Claim, results: Results) -> str:
    ((*_, said),) = judged([claim], results)
    return said


def test_a_claim_is_the_paired_difference_of_two_methods(results: Results) -> None:
    said = row(Claim("hiprune", "", "tiny_image", "hiprune", "random"), results)
    data = answers(results, "tiny_image", "accuracy")
    assert data is not None
    for pair in differences(data, ["hiprune"], "random"):
        mine = {
            line["method"].split(",")[0]: n for n, line in enumerate(data.lines) if line["retention"] == pair.retention
        }
        expected = data.scores[mine["hiprune"]].mean() - data.scores[mine["random"]].mean()
        assert pair.diff == pytest.approx(expected)
        assert f"{pair.retention}: {100 * expected:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})" in said
    assert said.count(";") == 1


def test_a_line_may_lie_below_the_untouched_model(results: Results) -> None:
    near = Claim("hiprune", "", "tiny_image", "hiprune", UNTOUCHED, within=99.0)
    far = Claim("hiprune", "", "tiny_image", "hiprune", UNTOUCHED, retentions=(0.05,))
    assert row(near, results).count(" supported") == 2
    assert row(far, results).startswith("0.05: -")
    assert row(far, results).endswith("not supported")


def test_what_was_not_swept_is_said(results: Results) -> None:
    assert row(Claim("aim", "", "tiny_image", "aim", "random"), results) == "not swept"
    assert row(Claim("aim", "", "tiny_video", "aim", "random"), results).startswith("not testable here: the task")
    assert row(Claim("atp", "", why="no weights"), results) == "not testable here: no weights"


def test_losses_are_differences_below_zero_without_doubt(results: Results) -> None:
    found = list(losses(results, {"hiprune", "fastv"}))
    assert list(losses(results, {"hiprune"})) == [line for line in found if line[1] == "hiprune"]
    data = answers(results, "tiny_image", "accuracy")
    assert data is not None
    sure = [n for n in ("hiprune", "fastv") if any(pair.high < 0 for pair in differences(data, [n], "random"))]
    assert [line[1] for line in found] == sure
    assert "### Methods that lose" in document([results], [], "make it")


def test_the_ranking_says_who_leads_and_who_loses_to_what_knows_nothing(results: Results) -> None:
    text = ranking.document([results], "make it")
    order = retained(results)
    lost = {(line[1], line[2]): line[3] for line in losses(results, {"hiprune", "fastv"})}
    for budget in ("0.33", "0.05"):
        board = text.partition(f"## tiny-llava at {budget}\n")[2].partition("\n## ")[0]
        rows = [line.strip("| ").split(" | ") for line in board.strip().splitlines()[2:]]
        entries = [each for each in order if each.retention == float(budget)]
        assert [row[0] for row in rows] == [each.method for each in entries]
        for row, each in zip(rows, entries, strict=True):
            assert row[1].startswith(f"{each.percent:.1f}") and row[3] == f"{each.tasks['tiny_image']:.1f}"
            beaten = f"{budget} (" in lost.get((each.method, "random"), "")
            assert row[-1] == ("random (tiny_image)" if beaten else "-")
    assert "whole prompt" not in text and "All models" not in text


def test_several_models_are_ranked_together(results: Results) -> None:
    text = ranking.document([results, results], "make it")
    board = text.partition("## All models at 0.33\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in board.strip().splitlines()[2:]]
    expected = [(each.method, f"{each.percent:.1f}") for each in retained(results) if each.retention == 0.33]
    assert [(name, mean) for name, mean, *_ in rows] == expected
    assert all(mean == one == other for _, mean, one, other in rows)
    assert text.count("## tiny-llava at 0.33\n") == 2


def test_the_page_of_mini_llava_begins_with_what_the_model_knows(results: Results) -> None:
    text = report.document(results, {"stage": "joint", "step": "7", "seconds": "5400"})
    assert 'step 7 of stage "joint" after 1.5 hours' in " ".join(text.split())
    known = text.partition("## What the untouched model knows\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in known.strip().splitlines()[2:]]
    assert [row[1] for row in rows] == list(TASKS["tiny_image"].graded)
    for _, family, guess, value in rows:
        (line,) = [each for each in results.select("tiny_image", family) if each["method"] == "none"]
        assert value.startswith(f"{100 * line['value']:.1f} (") and 5 < float(guess) <= 60
    assert text.endswith(ranking.document([results], "make it").partition("\n## ")[2])


def test_shipped_claims_name_methods_that_exist() -> None:
    claims = read_claims()
    eight = {"vtc_cls", "globalcom2", "hiprune", "todre", "atp", "mustdrop", "aim", "vqtoken"}
    assert {claim.method for claim in claims} >= eight
    for claim in claims:
        assert claim.method in METHODS.names()
        assert claim.why or (claim.task and claim.better and claim.than)
        for label in (claim.better, claim.than):
            assert not label or label == UNTOUCHED or parse(label)


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "claims.yaml"
    file.write_text("- {method: aim, claim: x, better_than: y}")
    with pytest.raises(InputError, match="claim 1"):
        read_claims(file)
