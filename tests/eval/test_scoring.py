"""Stored answers are scored exactly as lmms-eval scores fresh ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtc.eval.catalogue import load_tasks
from vtc.eval.quiet import muted
from vtc.eval.scoring import VERSION, metric_records, score, scoring_of

WriteTask = Callable[..., Path]


def rows(task: Any, answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"cell": "c", "task": task.name, "task_fp": task.fingerprint, "doc_id": doc_id, "repeat": 0, "text": text}
        | {"visual_tokens_in": 100 + doc_id, "visual_tokens_kept": 10.0 + doc_id, "output_tokens": doc_id}
        for doc_id, text in enumerate(answers)
    ]


ANSWERS = ["red", "left", "red", "right", " red ", "left", "blue", "left", "", "left"]


def test_metrics_families_and_clusters(blobs: Any) -> None:
    scored = score(blobs, rows(blobs, ANSWERS), 10)
    assert list(scored) == ["accuracy", "colour", "place"]
    assert {name: (entry.value, len(entry.doc_ids)) for name, entry in scored.items()} == {
        "accuracy": (0.7, 10),
        "colour": (0.6, 5),
        "place": (0.8, 5),
    }
    assert scored["place"].doc_ids == (1, 3, 5, 7, 9)
    outcomes = scored["accuracy"].outcomes
    assert outcomes.scores is not None
    assert outcomes.scores.tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 0, 1]
    assert outcomes.clusters == ["0", "0", "1", "1", "2", "2", "3", "3", "4", "4"]


def test_only_the_first_documents_are_scored_where_fewer_are_wanted(blobs: Any) -> None:
    found = score(blobs, rows(blobs, ANSWERS), 4)
    assert found["accuracy"].value == 0.75
    assert found["accuracy"].doc_ids == (0, 1, 2, 3)
    assert score(blobs, rows(blobs, ANSWERS[:4]), 4)["accuracy"].value == 0.75  # what was not asked is not missed


def test_cells_are_compared_on_the_same_documents_only(blobs: Any) -> None:
    reference = score(blobs, rows(blobs, ["red", "left"] * 5), 10)
    others = reference | {"place": replace(reference["place"], doc_ids=reference["colour"].doc_ids)}
    _, records = metric_records(blobs, "cell", 10, rows(blobs, ANSWERS), others)
    compared = {record["metric"]: record["diff"] is not None for record in records}
    assert compared == {"accuracy": True, "colour": True, "place": False}


def test_every_filter_has_outcomes_of_its_own(tmp_path: Path, write_task: WriteTask) -> None:
    folder = write_task(tmp_path)
    yaml = (folder / "blobs.yaml").read_text()
    filters = [
        "  - {name: none, filter: [{function: take_first}]}",
        "  - {name: small, filter: [{function: lowercase}, {function: take_first}]}",
    ]
    (folder / "blobs.yaml").write_text(yaml + "filter_list:\n" + "\n".join(filters) + "\n")
    (task,) = load_tasks(["blobs"], [folder])
    scored = score(task, rows(task, ["RED", "left", "red", "LEFT", "RED", "right"]), 6)
    both = {name: scored[name].outcomes.scores for name in ("accuracy", "accuracy,small")}
    assert {name: list(scores) for name, scores in both.items() if scores is not None} == {
        "accuracy": [0, 1, 1, 0, 0, 0],
        "accuracy,small": [1, 1, 1, 1, 1, 0],
    }
    assert (scored["accuracy"].value, scored["accuracy,small"].value) == pytest.approx((2 / 6, 5 / 6))
    assert scored["accuracy,small"].doc_ids == (0, 1, 2, 3, 4, 5)


def test_the_value_is_the_one_of_a_plain_lmms_eval_run(blobs: Any) -> None:
    with muted():
        from lmms_eval.api.model import lmms
        from lmms_eval.evaluator import simple_evaluate

    class Canned(lmms):  # type: ignore[misc]
        is_simple = False
        accelerator = None
        device = "cpu"

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [ANSWERS[request.args[3]] for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

    with muted():
        plain = simple_evaluate(Canned(), tasks=[blobs.lmms], bootstrap_iters=0)["results"]["blobs"]
    scored = score(blobs, rows(blobs, ANSWERS), 10)
    assert {name: entry.value for name, entry in scored.items()} == {name: plain[f"{name},none"] for name in scored}


def test_a_record_holds_tokens_interval_and_comparison(blobs: Any) -> None:
    reference, base_records = metric_records(blobs, "base", 10, rows(blobs, ["red", "left"] * 5), None)
    _, records = metric_records(blobs, "cell", 10, rows(blobs, ANSWERS), reference)
    assert [r["diff"] for r in base_records] == [None, None, None]
    record = records[2]
    assert (record["metric"], record["value"], record["n"], record["documents"]) == ("place", 0.8, 5, 10)
    assert record["higher_is_better"] is True
    assert (record["visual_tokens_in"], record["visual_tokens_kept"], record["output_tokens"]) == (105.0, 15.0, 5.0)
    assert record["scoring"] == scoring_of(blobs.fingerprint) and record["scoring"]["version"] == VERSION
    assert record["ci_low"] < 0.8 < record["ci_high"]
    assert record["diff"] == pytest.approx(-0.2)
    assert (record["n_up"], record["n_down"]) == (0, 1)
    assert record["scores"] == {"1": 1.0, "3": 0.0, "5": 1.0, "7": 1.0, "9": 1.0}


OTHER_AGGREGATES = """
def percent(items):
    return 100 * sum(item["score"] for item in items) / len(items)


def spread(items):
    return float(len({item["guess"] for item in items}))


def upload(items):
    return None
"""


def test_aggregates_that_are_no_plain_means(tmp_path: Path, write_task: WriteTask) -> None:
    folder = write_task(tmp_path)
    code = (folder / "utils.py").read_text()
    code = code.replace(
        '{"accuracy": entry,', '{"accuracy": entry, "hundred": entry, "spread": entry, "upload": entry,'
    )
    (folder / "utils.py").write_text(code + OTHER_AGGREGATES)
    yaml = (folder / "blobs.yaml").read_text()
    for name, function in (("hundred", "percent"), ("spread", "spread"), ("upload", "upload")):
        line = f"  - {{metric: {name}, aggregation: !function utils.{function}, higher_is_better: false}}\n"
        yaml = yaml.replace("metadata:", f"{line}metadata:")
    (folder / "blobs.yaml").write_text(yaml)
    (task,) = load_tasks(["blobs"], [folder])

    _, records = metric_records(task, "c", 10, rows(task, ANSWERS), score(task, rows(task, ["red", "left"] * 5), 10))
    by_name = {record["metric"]: record for record in records}
    assert "upload" not in by_name
    accuracy, hundred, spread = by_name["accuracy"], by_name["hundred"], by_name["spread"]
    assert (hundred["value"], spread["value"]) == (70.0, 5.0)
    assert hundred["ci_low"] == pytest.approx(100 * accuracy["ci_low"])
    assert hundred["diff"] == pytest.approx(100 * accuracy["diff"])
    assert (spread["ci_method"], spread["scores"]) == ("cluster bootstrap", None)
    assert spread["diff_method"] == "cluster bootstrap, swaps of clusters"

    nothing = score(task, rows(task, ["wrong"] * 10), 10)
    assert nothing["hundred"].outcomes.scale == 100.0 and nothing["accuracy"].outcomes.scale == 1.0


def test_a_missing_answer_is_an_error_and_never_an_empty_one(blobs: Any) -> None:
    with pytest.raises(KeyError):
        score(blobs, rows(blobs, ANSWERS[:-1]), 10)


def test_repeated_answers_reach_the_filters_in_order(tmp_path: Path, write_task: WriteTask) -> None:
    folder = write_task(tmp_path)
    yaml = (folder / "blobs.yaml").read_text()
    (folder / "blobs.yaml").write_text(f"{yaml}repeats: 2\n")
    (task,) = load_tasks(["blobs"], [folder])
    assert task.repeats == 2
    first = rows(task, ["red", "left"] * 5)
    second = [row | {"repeat": 1, "text": "wrong"} for row in first]
    assert score(task, second + first, 10)["accuracy"].value == 1.0
    assert np.isclose(score(task, [r | {"repeat": 1 - r["repeat"]} for r in first + second], 10)["accuracy"].value, 0.0)


def test_what_is_stored_of_each_document(blobs: Any) -> None:
    answers = [row | {"seconds": 0.5} for row in rows(blobs, ANSWERS)]
    _, records = metric_records(blobs, "cell", 10, answers, None)
    stored = {record["metric"]: record for record in records}
    place = stored["place"]
    assert place["scores"] == {"1": 1.0, "3": 0.0, "5": 1.0, "7": 1.0, "9": 1.0}
    assert place["clusters"] == [0, 1, 2, 3, 4] and place["kept"] == [11.0, 13.0, 15.0, 17.0, 19.0]
    assert (place["scale"], place["seconds"]) == (1.0, 0.5)
    assert stored["accuracy"]["clusters"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    without = [{name: value for name, value in row.items() if name != "visual_tokens_kept"} for row in answers]
    _, records = metric_records(blobs, "cell", 10, without, None)
    assert records[0]["kept"] is None and records[0]["scores"] is not None
