"""Tasks of lmms-eval whose scoring takes arguments, writes files, counts in its module, or calls a judge.

The tasks run lmms-eval's own code on a few rows made here in the columns of the real data.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtc.errors import InputError
from vtc.eval.catalogue import load_tasks
from vtc.eval.rehearsal import rehearse
from vtc.eval.scoring import metric_records, score

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.{process}
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false}}
metric_list:
{metrics}
metadata: {{version: 1.0}}
"""
METRIC = "  - {{metric: {}, aggregation: {}, higher_is_better: true}}"
CODE = """
from PIL import Image
from {module} import *


def visual(doc):
    return [Image.new("RGB", (64, 64), "red")]
"""


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a task from functions of `module`, for documents given here."""

    def make(name: str, module: str, process: str, metrics: dict[str, str], rows: list[dict[str, Any]]) -> Any:
        folder = tmp_path / "tasks"
        folder.mkdir()
        lines = [
            METRIC.format(metric, f"{'' if f == 'mean' else '!function utils.'}{f}") for metric, f in metrics.items()
        ]
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, process=process, metrics="\n".join(lines)))
        (folder / "utils.py").write_text(CODE.format(module=module))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_tasks([name], [folder])[0]

    return make


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has to stay empty, and no network."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: pytest.fail(f"{host} was asked"))
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(key, raising=False)
    return folder


def answered(task: Any, texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"doc_id": doc_id, "repeat": 0, "text": text, "visual_tokens_in": 9, "visual_tokens_kept": 9.0}
        for doc_id, text in enumerate(texts)
    ]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def textvqa(made: Callable[..., Any], metrics: dict[str, str]) -> Any:
    rows = [
        {"question_id": n, "question": "what is written?", "answers": ["stop"] * 10, "answer": "stop"} for n in "12"
    ]
    return made("textvqa_here", "lmms_eval.tasks.textvqa.utils", "textvqa_process_results", metrics, rows)


def test_textvqa_is_scored_and_its_submission_lies_in_the_folder_of_the_cell(
    made: Callable[..., Any], tmp_path: Path, elsewhere: Path
) -> None:
    task = textvqa(made, {"exact_match": "mean", "submission": "textvqa_aggregate_submissions"})
    rehearse(task)
    assert not files(elsewhere) and not (tmp_path / "out").exists()
    for _ in range(2):  # the second time replaces the file of the first, whose name holds the time
        scored, _ = metric_records(task, "cell", 2, answered(task, ["Stop.", "go"]), None, tmp_path / "out")
    assert {name: entry.value for name, entry in scored.items()} == {"exact_match": 0.5}
    (name,) = files(tmp_path / "out")
    assert name.startswith("submissions/cell/textvqa_here/textvqa_submission_")
    assert [row["answer"] for row in json.loads((tmp_path / "out" / name).read_text())] == ["stop", "go"]
    assert not files(elsewhere)


def test_a_task_that_only_writes_files_is_refused_before_it_is_answered(made: Callable[..., Any]) -> None:
    task = textvqa(made, {"submission": "textvqa_aggregate_submissions"})
    with pytest.raises(InputError, match=r"no metric that is a number \(submission is NoneType\).*choose a split"):
        rehearse(task)


def test_ocrbench_counts_every_cell_from_nothing(
    made: Callable[..., Any],
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vtc.eval.statistics.RESAMPLES", 200)
    kinds = ("Regular Text Recognition", "Doc-oriented VQA", "Digit String Recognition")
    rows = [
        {"dataset": "IIIT5K", "question": "what?", "question_type": kind, "answer": ["stop"], "image": ""}
        for kind in kinds
    ]
    metrics = {"ocrbench_accuracy": "ocrbench_aggregate_accuracy"}
    task = made("ocr_here", "lmms_eval.tasks.ocrbench.utils", "ocrbench_process_results", metrics, rows)
    rehearse(task)
    texts = answered(task, ["STOP", "it says stop", "no"])
    capfd.readouterr()
    values = []
    for cell in ("first", "second"):
        scored, records = metric_records(task, cell, 3, texts, None, tmp_path / "out")
        values.append(scored["ocrbench_accuracy"].value)
    assert values == [0.002, 0.002], "2 of the 1000 questions of the real benchmark, in every cell"
    assert records[0]["ci_high"] <= 0.003, "nor do resamples add up"
    assert "-----" not in "".join(capfd.readouterr()), "it prints a line wherever it is called"
    assert files(tmp_path / "out") == [
        f"submissions/{cell}/ocr_here/results/ocrbench_results.txt" for cell in ("first", "second")
    ]
    assert "(Total 300): 1\n" in (tmp_path / "out" / files(tmp_path / "out")[1]).read_text()
    assert not files(elsewhere)


@pytest.fixture
def openai(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is OpenAI's, whatever address the process had when the task's module was first imported."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    monkeypatch.setattr(mmbench_evaluator, "API_URL", "https://api.openai.com/v1/chat/completions")


def mmbench(made: Callable[..., Any], evaluate: str) -> Any:
    rows = [
        {
            "index": n,
            "question": "Which?",
            "hint": "nan",
            "answer": "A",
            "A": "red",
            "B": "blue",
            "C": "sky",
            "D": "sea",
        }
        | {"category": "color", "L2-category": "perception", "source": "made", "split": "dev"}
        for n in range(3)
    ]
    metrics = {"gpt_eval_score": evaluate, "submission": "mmbench_aggregate_dev_results_submission"}
    return made("mmbench_here", "lmms_eval.tasks.mmbench.en_utils", "mmbench_process_results", metrics, rows)


@pytest.mark.usefixtures("openai")
def test_mmbench_without_a_key_for_its_judge_is_refused_and_nobody_is_asked(made: Callable[..., Any]) -> None:
    task = mmbench(made, "mmbench_aggregate_dev_results_eval")
    words = r"'mmbench_here' is scored by a judge at .*openai.* and none of OPENAI_API_KEY, AZURE_API_KEY is set"
    with pytest.raises(InputError, match=words):
        rehearse(task)


@pytest.mark.usefixtures("openai")
def test_with_a_key_the_judge_is_noted_and_not_asked(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "made up")
    monkeypatch.setattr("vtc.eval.rehearsal.reachable", lambda host, port: None)
    notes: list[str] = []
    rehearse(mmbench(made, "mmbench_aggregate_dev_results_eval"), notes.append)
    (note,) = notes
    assert "'mmbench_here' asks" in note and "openai" in note and note.endswith("that was not rehearsed")


def test_mmbench_scored_without_a_judge_writes_its_files(
    made: Callable[..., Any], tmp_path: Path, elsewhere: Path
) -> None:
    task = mmbench(made, "mmbench_aggregate_dev_results_static")
    rehearse(task)
    scored = score(task, answered(task, ["A", "B", "A."]), 3, tmp_path / "out")
    assert scored["gpt_eval_score"].value == pytest.approx(200 / 3)
    assert files(tmp_path / "out") == [
        "mmbench_en_dev_results.xlsx", "mmbench_en_dev_static_results.json",
    ]  # fmt: skip
    assert not files(elsewhere)


def egoschema(made: Callable[..., Any], metric: str, aggregation: str) -> Any:
    options = [f"{letter}. thing {letter}" for letter in "ABCDE"]
    rows = [{"video_idx": f"v{n}", "question": "What?", "option": options, "answer": "1"} for n in range(2)]
    process = "egoschema_process_results_generation"
    return made("ego_here", "lmms_eval.tasks.egoschema.utils", process, {metric: aggregation}, rows)


def test_egoschema_subset_is_scored(made: Callable[..., Any], elsewhere: Path) -> None:
    task = egoschema(made, "score", "egoschema_aggregate_score")
    rehearse(task)
    assert score(task, answered(task, ["B", "C"]), 2)["score"].value == 0.5
    assert not files(elsewhere)


def test_egoschema_server_is_noted_and_not_asked(
    made: Callable[..., Any], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtc.eval.rehearsal.reachable", lambda host, port: None)
    notes: list[str] = []
    rehearse(egoschema(made, "submission", "egoschema_aggregate_mc"), notes.append)
    assert notes == ["note: scoring task 'ego_here' asks validation-server.onrender.com; that was not rehearsed"]
    assert not files(elsewhere)


def coco(made: Callable[..., Any]) -> Any:
    rows = [
        {
            "question_id": f"COCO_val2014_00000000000{n}.jpg",
            "id": n,
            "question": "?",
            "answer": [f"a {what} on a table"],
        }
        for n, what in enumerate(("cup", "dog"))
    ]
    metrics = {"coco_Bleu_1": "coco_bleu1", "coco_CIDEr": "coco_cider"}
    return made("coco_here", "lmms_eval.tasks.coco_cap.utils", "coco_process_result", metrics, rows)


@pytest.mark.skipif(shutil.which("java") is None, reason="captions are tokenised by a program in Java")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_captions_are_scored_once_and_not_two_thousand_times(
    made: Callable[..., Any], tmp_path: Path, elsewhere: Path
) -> None:
    task = coco(made)
    texts = answered(task, ["a cup on a table", "a cat"])
    scored, records = metric_records(task, "cell", 2, texts, None, tmp_path / "out")
    assert 0 < scored["coco_Bleu_1"].value < 1 and "coco_CIDEr" in scored
    assert [record["ci_low"] for record in records] == [None, None], "no resamples through an outside program"
    _, records = metric_records(task, "other", 2, texts, scored, tmp_path / "out")
    assert [record["diff"] for record in records] == [0.0, 0.0]
    assert files(tmp_path / "out" / "submissions" / "cell") == ["coco_here/coco_captions_val2014_alg_results.json"]
    assert not files(elsewhere)


def test_captions_without_java_are_refused_before_they_are_answered(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    task = coco(made)
    monkeypatch.setenv("PATH", "")
    delete = Meteor.__del__
    Meteor.__del__ = lambda self: delete(self) if hasattr(self, "lock") else None  # complains when it was half made
    with pytest.raises(InputError, match=r"'coco_here' cannot be scored here: .*'java'; install what is missing, or"):
        rehearse(task)
