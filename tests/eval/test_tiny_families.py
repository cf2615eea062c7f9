"""Packed training sequences are the same calculation as the processor and one prompt per question, for every task."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vtc.eval.tiny.family import Family, encoded
from vtc.eval.tiny.mixture import MixTrainer, packed_hidden
from vtc.eval.tiny.model import TRAINING_ATTENTION
from vtc.eval.tiny.onevision import OneVision
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.stream import Stream
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.vocabulary import ASSISTANT, EXTENDED, PAD, TOKEN

SMALL = {"hidden": 64, "vision_layers": 2, "vision_inner": 96, "text_layers": 3, "text_inner": 96}
FAMILIES: dict[str, Family] = {"tiny-onevision": OneVision(**SMALL)}
CASES = [(name, geometry) for name, task in TASKS.items() for geometry in range(task.geometries)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MixTrainer:
    recipe = Recipe(request.param, steps_tower=1, steps_joint=1, different=60, sizes=tuple(SMALL.items()))
    return MixTrainer.create(recipe, tmp_path_factory.mktemp("run"), torch.device("cpu"))


@pytest.fixture(scope="module")
def single(trainer: MixTrainer) -> Any:
    """The same weights as a user runs them."""
    model = trainer.family.build("sdpa").eval()
    model.load_state_dict(trainer.model.state_dict())
    return model


@torch.no_grad()
@pytest.mark.parametrize(("name", "geometry"), CASES)
def test_packed_logits_equal_single_prompts(trainer: MixTrainer, single: Any, name: str, geometry: int) -> None:
    assert trainer.model.config._attn_implementation == TRAINING_ATTENTION
    (stream,) = [s for s in trainer.series if (s.task.name, s.geometry) == (name, geometry)]
    numbers = [0, 1]
    batch = trainer.make(stream, numbers, random.Random(geometry))
    seen = trainer.family.see(trainer.model, batch.task.media, batch.inputs)
    logits = trainer.model.lm_head(packed_hidden(trainer.family, trainer.model, batch, seen.tokens))
    pictures, _ = stream.read(numbers)
    compared = 0
    for row in numbers:
        start = 0
        for _, length in batch.task.slots:
            ids = [token for token in batch.ids[row, start : start + length].tolist() if token != TOKEN[PAD]]
            if ids:
                at = ids.index(TOKEN[ASSISTANT])
                text = " ".join(EXTENDED[token] for token in ids[:at])
                inputs = encoded(trainer.processor, batch.task.media, [pictures[row]], [text])
                expected = single(**inputs).logits[0, -1]
                torch.testing.assert_close(logits[row, start + at], expected, atol=2e-4, rtol=0)
                compared += 1
            start += length
    assert compared >= 8


def test_list_answers_are_predicted_word_by_word(trainer: MixTrainer, single: Any) -> None:
    stream = next(s for s in trainer.series if s.task.name == "tiny_list")
    batch = trainer.make(stream, [0], random.Random(0))
    with torch.no_grad():
        seen = trainer.family.see(trainer.model, "image", batch.inputs)
        logits = trainer.model.lm_head(packed_hidden(trainer.family, trainer.model, batch, seen.tokens))[0]
        length = batch.task.slots[0][1]
        ids = [token for token in batch.ids[0, :length].tolist() if token != TOKEN[PAD]]
        at = ids.index(TOKEN[ASSISTANT])
        text = " ".join(EXTENDED[token] for token in ids[:at])
        inputs = encoded(trainer.processor, "image", [stream.read([0])[0][0]], [text])
        answer = torch.tensor([ids[at + 1 :]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = single(**inputs).logits[0, -1 - answer.shape[1] :]
    assert answer.shape[1] >= 8
    torch.testing.assert_close(logits[at : len(ids)], expected, atol=2e-4, rtol=0)
    assert batch.labels[0, at : len(ids)].tolist() == [*ids[at + 1 :], TOKEN["</s>"]]


def test_views_cover_what_the_tower_sees(trainer: MixTrainer) -> None:
    """A bright square at the centre of every cell of a view lights up that cell in the processor's pixels."""
    family = trainer.family
    for stream in (s for s in trainer.series if s.task.name == "tiny_detail"):
        pictures, facts = stream.read([0])
        views = family.views("image", 1, facts[0].size)
        for index, view in enumerate(views):
            left, top, right, bottom = view.box
            x, y = left + 0.75 * (right - left), top + 0.25 * (bottom - top)
            if not (0 <= x < facts[0].size[1] and 0 <= y < facts[0].size[0]):
                continue
            marked = pictures.copy() * 0
            marked[0, 0, int(y) - 4 : int(y) + 4, int(x) - 4 : int(x) + 4] = 255
            inputs = trainer.processor.image_processor(
                [[torch.from_numpy(marked[0, 0]).permute(2, 0, 1)]], return_tensors="pt"
            )
            seen = inputs["pixel_values"][0, index].mean(0)
            row, column = divmod(int(seen.argmax()), seen.shape[1])
            assert abs(row / seen.shape[0] - 0.25) < 0.1 and abs(column / seen.shape[1] - 0.75) < 0.1


def test_streams_repeat_in_another_order(trainer: MixTrainer) -> None:
    stream = Stream(TASKS["tiny_multi"], 1, "train", trainer.out / "samples", 12)
    assert [stream.number(at, 0) for at in range(12)] == list(range(12))
    second = [stream.number(at, 0) for at in range(12, 24)]
    assert sorted(second) == list(range(12)) and second != list(range(12))
