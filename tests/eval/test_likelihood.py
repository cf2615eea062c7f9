"""Likelihoods of completions, and the tasks of lmms-eval that need them or several rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from vtc.app import loading
from vtc.app.likelihood import IGNORED, completed, likelihoods
from vtc.errors import InputError, VTCError
from vtc.eval.quiet import muted
from vtc.eval.runner import Runner

CHOICES = ("red", "green ring", "blue blue blue")
CODE = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.new("RGB", (100 + 10 * doc["size"], 90), (20 * doc["size"], 80, 90))]


def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None, lmms_eval_specific_kwargs=None):
    if round_idx is None:
        return doc["question"]
    if round_idx > doc["size"] % 3:
        return None, None, True, previous_output, previous_round_info
    said = previous_output[-1].split()[0]
    told = (previous_round_info or []) + [said]
    return doc_to_visual(doc), f"{said} {doc['question']}", False, previous_output, told


def process_rounds(doc, results):
    return {"length": {"answers": results[0], "size": doc["size"]}}


def total(items):
    return sum(len(item["answers"]) for item in items)
"""
CHOICE_YAML = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: 1
doc_to_choice: [red, green ring, blue blue blue]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROUNDS_YAML = """
task: rounds
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until_multi_round
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.rounds
doc_to_target: answer
process_results: !function utils.process_rounds
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}
metric_list:
  - {metric: length, aggregation: !function utils.total, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    (folder / "utils.py").write_text(CODE)
    (folder / "choices.yaml").write_text(CHOICE_YAML)
    (folder / "rounds.yaml").write_text(ROUNDS_YAML)
    rows = [{"question": "What color is the ring?", "answer": "red", "size": size} for size in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def answerer(video_model_folder: Path) -> Runner:
    return Runner(loading.load(str(video_model_folder), device="cpu", dtype="float32"))


def prepared(answerer: Runner) -> Any:
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in (
            (Image.effect_noise((168, 168), 60).convert("RGB"), "What color is the ring?"),
            (Image.effect_noise((90, 168), 60).convert("RGB"), "Is there a red ring?"),
            (Image.effect_noise((84, 84), 60).convert("RGB"), "What word is written?"),
        )
    ]
    return [answerer.prepare(chats), *(answerer.prepare([chat]) for chat in chats)]


def test_completions_stand_behind_their_prompts_left_padded() -> None:
    ids = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 6]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 9).long(),
        "mm_token_type_ids": (ids == 2).long(),
        "x": ids[0],
    }
    grown, labels = completed(inputs, [[7, 8, 7], [7]], 9)
    assert grown["input_ids"].tolist() == [[1, 2, 7, 8, 7], [3, 4, 5, 6, 7]]
    assert grown["attention_mask"].tolist() == [[1] * 5, [1] * 5]
    assert grown["mm_token_type_ids"].tolist() == [[0, 1, 0, 0, 0], [0] * 5]
    assert labels.tolist() == [[IGNORED, IGNORED, 7, 8, 7], [IGNORED] * 4 + [7]]
    assert grown["x"] is inputs["x"]


SETTINGS: dict[str | None, dict[str, Any]] = {
    None: {}, "random": {"retention": 0.3}, "aim": {"retention": 0.5}, "fastv": {"layer": 1, "retention": 0.6},
    "mustdrop": {"retention": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("method", SETTINGS)
def test_a_loss_is_that_of_the_labels_and_the_same_alone(answerer: Runner, method: str | None) -> None:
    together, *single = prepared(answerer)
    settings = SETTINGS[method]

    def found(batch: Any, completions: Any) -> Any:
        if method is None:
            return likelihoods(answerer, batch, completions)
        with answerer.compressed(method, **settings) as handle:
            return likelihoods(answerer, batch, completions, handle)

    batched = found(together, CHOICES)
    assert [each.tokens for each in batched] == [1, 2, 3]
    tokenizer = answerer.processor.tokenizer
    for batch, text, expected in zip(single, CHOICES, batched, strict=True):
        (alone,) = found(batch, [text])
        assert alone.loss == pytest.approx(expected.loss, abs=1e-5) and alone.greedy == expected.greedy
        ids = tokenizer([text], add_special_tokens=False)["input_ids"]
        inputs, labels = completed(batch.inputs, ids, tokenizer.pad_token_id)
        with torch.inference_mode():
            if method is None:
                loss = answerer.model(**inputs, labels=labels).loss
            else:
                with vtc.compress(answerer.model, method, pad_output=True, **settings):
                    loss = answerer.model(**inputs, labels=labels).loss
        assert alone.loss == pytest.approx(float(loss), abs=1e-5)


def test_bad_completions_and_nan_are_named(answerer: Runner) -> None:
    _, batch, *_ = prepared(answerer)
    with pytest.raises(InputError, match="completion ' ' has no tokens"):
        likelihoods(answerer, batch, [" "])
    weight = answerer.model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(VTCError, match="NaN or infinite"):
            likelihoods(answerer, batch, ["red"])
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def evaluated(folder: Path, tasks: Path, name: str, batch_size: int, **options: Any) -> dict[str, Any]:
    with muted():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        arguments = f"pretrained={folder},method=random,retention=0.5,device=cpu,dtype=float32"
        result: dict[str, Any] = simple_evaluate(
            "vtc",
            model_args=arguments,
            tasks=[name],
            task_manager=manager,
            batch_size=batch_size,
            bootstrap_iters=0,
            **options,
        )
    return result


def test_multiple_choice_tasks_take_the_most_likely_choice(video_model_folder: Path, tasks: Path) -> None:
    one, four = (evaluated(video_model_folder, tasks, "choices", size, force_simple=True) for size in (1, 4))
    losses = [
        [[pair[0] for pair in sample["filtered_resps"]] for sample in run["samples"]["choices"]] for run in (one, four)
    ]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5)
    best = [min(range(3), key=row.__getitem__) for row in losses[0]]
    assert one["results"]["choices"]["acc,none"] == pytest.approx(sum(each == 1 for each in best) / 5)
    runner = Runner(loading.load(str(video_model_folder), device="cpu", dtype="float32"))
    picture = Image.new("RGB", (100, 90), (0, 80, 90))
    asked = {"type": "text", "text": "What color is the ring?"}
    batch = runner.prepare([[{"role": "user", "content": [{"type": "image", "image": picture}, asked]}]])
    with runner.compressed("random", retention=0.5) as handle:
        (expected,) = likelihoods(runner, batch, [" green ring"], handle)
    assert losses[0][0][1] == pytest.approx(expected.loss, abs=1e-5)


def test_rounds_are_answered_until_the_task_ends_them(video_model_folder: Path, tasks: Path) -> None:
    one, four = (evaluated(video_model_folder, tasks, "rounds", size) for size in (1, 4))
    answers = [[sample["resps"][0] for sample in run["samples"]["rounds"]] for run in (one, four)]
    assert answers[0] == answers[1]
    assert one["results"]["rounds"]["length,none"] == four["results"]["rounds"]["length,none"]


def test_older_requests_generate_what_chats_do(video_model_folder: Path, tasks: Path, task_folder: Path) -> None:
    simple = evaluated(video_model_folder, task_folder, "blobs", 4, force_simple=True)
    chat = evaluated(video_model_folder, task_folder, "blobs", 4)
    assert [s["resps"] for s in simple["samples"]["blobs"]] == [s["resps"] for s in chat["samples"]["blobs"]]
