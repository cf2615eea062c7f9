"""The tiny_image tasks load in lmms-eval without a network and score a replay of answers as they should."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

TASKS = Path(__file__).resolve().parents[2] / "eval" / "tasks"


@pytest.fixture(scope="module")
def load() -> Callable[[str], dict[str, Any]]:
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lambda name: dict(get_task_dict([name], manager, "chat"))


def _replay(tasks: dict[str, Any], answer: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    """Results of lmms-eval for a model that answers from the document."""
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import evaluate

    class Replay(lmms):  # type: ignore[misc]
        is_simple = False

        def generate_until(self, requests: list[Any]) -> list[str]:
            arguments = [request.args for request in requests]
            return [answer(self.task_dict[task][split][doc]) for _, _, _, doc, task, split in arguments]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

    model = Replay()
    for name, task in tasks.items():
        model.task_dict[name] = task.dataset
    results: dict[str, Any] = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, process_docs_parallel=1)
    return dict(results["results"])


def test_a_document_becomes_a_picture_and_a_question(load: Callable[[str], dict[str, Any]]) -> None:
    task = load("tiny_image")["tiny_image"]
    document = task.test_docs()[0]
    (picture,) = task.doc_to_visual(document)
    assert picture.size == (168, 168) and picture.mode == "RGB"
    assert task.doc_to_text(document) == document["question"]
    assert task.doc_to_target(document) == document["answer"]
    assert task.config.generation_kwargs["until"] == []
    assert len(task.test_docs()) == 720


def test_right_answers_score_one_and_wrong_ones_zero(load: Callable[[str], dict[str, Any]]) -> None:
    tasks = load("tiny_image")
    right = _replay(tasks, lambda document: f" {document['answer'].upper()}. ")["tiny_image"]
    wrong = _replay(tasks, lambda document: "a")["tiny_image"]
    families = set(tasks["tiny_image"].test_docs()["family"])
    assert len(families) == 9
    for metric in ("accuracy", *families):
        assert right[f"{metric},none"] == 1.0
        assert wrong[f"{metric},none"] == 0.0
    yes = _replay(tasks, lambda document: "yes")["tiny_image"]
    assert yes["existence,none"] == 0.5 and yes["shape,none"] == 0.0
    assert yes["accuracy,none"] == pytest.approx(40 / 720)
    assert 0 < yes["accuracy_stderr_clustered,none"] < 0.02


def test_single_families_are_tasks_of_their_own(load: Callable[[str], dict[str, Any]]) -> None:
    tasks = load("tiny_image_families")
    assert len(tasks) == 9
    for name, task in tasks.items():
        assert set(task.test_docs()["family"]) == {name.removeprefix("tiny_image_")}
        assert len(task.test_docs()) == 80
    counting = load("tiny_image_counting")
    assert _replay(counting, lambda document: "zero")["tiny_image_counting"]["accuracy,none"] == 16 / 80


@pytest.mark.parametrize(
    ("reply", "score"), [("red", 1), ("Red.", 1), ("red red two", 1), ("blue red", 0), ("", 0), ("reddish", 0)]
)
def test_the_first_word_counts(load: Callable[[str], dict[str, Any]], reply: str, score: float) -> None:
    task = load("tiny_image")["tiny_image"]
    document = {"seed": 5, "family": "colour", "question": "", "answer": "red"}
    entry = {"score": score, "scene": "5"}
    assert task.process_results(document, [reply]) == {"accuracy": entry, "colour": entry}


NEW = {"tiny_detail": 6, "tiny_video": 8, "tiny_list": 3, "tiny_multi": 7}  # families


@pytest.mark.parametrize("name", NEW)
def test_every_task_scores_right_answers_one_and_wrong_ones_zero(
    load: Callable[[str], dict[str, Any]], name: str
) -> None:
    tasks = load(name)
    families = set(tasks[name].test_docs()["family"])
    assert len(families) == NEW[name]
    right = _replay(tasks, lambda document: f" {document['answer'].upper()}. ")[name]
    wrong = _replay(tasks, lambda document: "a")[name]
    for metric in ("accuracy", *families):
        assert right[f"{metric},none"] == 1.0
        assert wrong[f"{metric},none"] == 0.0
    assert "accuracy_stderr_clustered,none" in right


@pytest.mark.parametrize("name", NEW)
def test_messages_hold_what_the_task_shows(load: Callable[[str], dict[str, Any]], name: str) -> None:
    task = load(name)[name]
    document = task.test_docs()[0]
    visuals = task.doc_to_visual(document)
    (message,) = task.doc_to_messages(document)
    *media, text = message["content"]
    assert text == {"type": "text", "text": document["question"]}
    if name == "tiny_video":
        assert media == [{"type": "video", "url": visuals}] and 8 <= len(visuals) <= 16
    else:
        assert media == [{"type": "image", "url": picture} for picture in visuals]
        assert len(visuals) == (2 if name == "tiny_multi" else 1)  # number 0 has two pictures


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("red ring, blue star", 1.0),
        ("Blue star ,red ring.", 1.0),
        ("red ring", 2 / 3),
        ("red ring, red ring, blue star", 4 / 5),
        ("red star, blue ring", 0.0),
        ("", 0.0),
    ],
)
def test_lists_are_scored_by_what_they_name(load: Callable[[str], dict[str, Any]], reply: str, score: float) -> None:
    task = load("tiny_list")["tiny_list"]
    document = {"seed": 5, "family": "objects", "question": "", "answer": "red ring, blue star"}
    assert task.process_results(document, [reply])["objects"]["score"] == pytest.approx(score)
