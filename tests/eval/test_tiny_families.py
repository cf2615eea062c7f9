"""Packed training sequences are the same calculation as the processor and one prompt per question, for every task."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.clip_questions import direction, meanwhile
from vtc.eval.tiny.clips import BINS, bins, make
from vtc.eval.tiny.family import Family, View, encoded, media_inputs
from vtc.eval.tiny.internvl import InternVL
from vtc.eval.tiny.mixed_batches import packed_hidden
from vtc.eval.tiny.mixture import MixTrainer
from vtc.eval.tiny.model import TRAINING_ATTENTION
from vtc.eval.tiny.onevision import OneVision
from vtc.eval.tiny.places import NOTHING, place_targets
from vtc.eval.tiny.qwen import Qwen
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.sample import Actor, Facts
from vtc.eval.tiny.stream import Stream
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.vocabulary import ASSISTANT, EXTENDED, PAD, TOKEN

SMALL = {"hidden": 64, "vision_layers": 2, "vision_inner": 96, "text_layers": 3, "text_inner": 96}
FAMILIES: dict[str, Family] = {
    "tiny-onevision": OneVision(**SMALL),
    "tiny-qwen": Qwen(**SMALL),
    "tiny-internvl": InternVL(**SMALL),
}
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
    if TASKS[name].media not in trainer.family.media:
        pytest.skip("this class reads no clips here")
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
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, answer.shape[1]))
        expected = single(**inputs).logits[0, -1 - answer.shape[1] :]
    assert answer.shape[1] >= 8
    torch.testing.assert_close(logits[at : len(ids)], expected, atol=2e-4, rtol=0)
    assert batch.labels[0, at : len(ids)].tolist() == [*ids[at + 1 :], TOKEN["</s>"]]


@torch.no_grad()
def test_cells_are_where_the_views_say(trainer: MixTrainer) -> None:
    """A bright square inside one cell changes that cell of the same view more than any other."""
    family, model = trainer.family, trainer.model
    for stream in (s for s in trainer.series if s.task.name in ("tiny_detail", "tiny_video", "tiny_multi")):
        media = stream.task.media
        pictures, facts = stream.read([0])
        views = family.views(media, pictures.shape[1], facts[0].size)
        blank = pictures * 0
        before = family.see(model, media, media_inputs(trainer.processor, media, blank)).cells
        for index, view in enumerate(views):
            left, top, right, bottom = view.box
            width, height = (right - left) / view.columns, (bottom - top) / view.rows
            row, column = view.rows // 2, view.columns // 2 - 1
            x, y = round(left + column * width), round(top + row * height)
            marked = blank.copy()
            marked[0, list(view.pictures), y + 2 : y + round(height) - 2, x + 2 : x + round(width) - 2] = 255
            after = family.see(model, media, media_inputs(trainer.processor, media, marked)).cells
            change = (after - before)[index].norm(dim=-1)
            assert divmod(int(change.argmax()), view.columns) == (row, column), (stream.task.name, index)


@torch.no_grad()
def test_clips_ask_for_places_and_clues(trainer: MixTrainer) -> None:
    """Every visual token where its actor is, the last token of a question about motion what its answer follows from."""
    if "video" not in trainer.family.media:
        pytest.skip("this class reads no clips here")
    for stream in (s for s in trainer.series if s.task.media == "video"):
        batch = trainer.make(stream, [0, 1], random.Random(0))
        visual, text = trainer.answered(batch, trainer.family.see(trainer.model, "video", batch.inputs))[1]
        assert batch.places is not None and visual.shape[:2] == batch.places.shape[:2]
        assert text.shape[:2] == batch.ids.shape == batch.clues.shape[:2]
        shown = batch.places[..., 0] != NOTHING
        assert shown.any() and (batch.places[shown] < BINS).all()
        asked = batch.clues[..., 0] != NOTHING
        wanted = Counter(name for names in batch.families for name in names)
        assert asked.sum() == wanted["direction"] + wanted["while"] > 0
        assert (batch.ids[asked] == TOKEN[ASSISTANT]).all() and (batch.clues[asked] < BINS).all()
        assert set(trainer.places((visual, text), batch.places, batch.clues)) == {"spot", "clues"}


def test_answers_about_motion_follow_from_their_clues() -> None:
    rng = random.Random(0)
    told = 0
    for seed in range(20):
        facts = make(seed, "check").facts
        question = direction(facts, rng)
        assert question is not None
        x, y, u, v = question.clues
        (mover,) = [a for a in facts.actors if a.direction and f"the {a.colour} {a.name} " in question.text]
        assert (x, y, u, v) == bins([*mover.path[0], *mover.path[-1]])
        assert (x == u) == (question.answer in ("up", "down"))  # as far as it does not come back where it was
        overlap = meanwhile(facts, rng)
        if overlap is not None:
            start, end, first, last = overlap.clues
            told += 1
            assert (start <= first and last <= end) if overlap.answer == "yes" else (last < start or end < first)
    assert told > 5


def test_a_token_is_told_the_place_of_the_actor_that_covers_most_of_it() -> None:
    """A circle and a square as actors and a word, which is none, on six columns of 14 px."""
    shapes = [("circle", "red", 35.0, 7.0), ("square", "blue", 77.0, 77.0)]
    things = [Item("shape", name, colour, (x - 7, y - 7, x + 7, y + 7)) for name, colour, x, y in shapes]
    actors = tuple(Actor(name, colour, 7.0, (True,), ((x, y),)) for name, colour, x, y in shapes)
    facts = Facts(((*things, Item("word", "cat", "", (30.0, 40.0, 60.0, 50.0))),), (84, 84), actors)
    view = View((0,), (0.0, 0.0, 84.0, 84.0), 6, 6)
    told = {tokens: place_targets(facts, view, tokens, tokens) for tokens in (6, 3)}
    assert {int(n): told[6][n].tolist() for n in (told[6][:, 0] != NOTHING).nonzero()[0]} == {2: [8, 1], 35: [19, 19]}
    assert {int(n): told[3][n].tolist() for n in (told[3][:, 0] != NOTHING).nonzero()[0]} == {1: [8, 1], 8: [19, 19]}


def test_positions_tell_columns_apart() -> None:
    """The slowest frequencies of positions in three dimensions are the columns'; of 12 the first and last differ."""
    model = Qwen().build()
    columns = model.config.text_config.rope_parameters["mrope_section"][-1]
    assert 11 * float(model.model.language_model.rotary_emb.inv_freq[-columns:].max()) > 1


def test_streams_repeat_in_another_order(trainer: MixTrainer) -> None:
    stream = Stream(TASKS["tiny_multi"], 1, "train", trainer.out / "samples", 12)
    assert [stream.number(at, 0) for at in range(12)] == list(range(12))
    second = [stream.number(at, 0) for at in range(12, 24)]
    assert sorted(second) == list(range(12)) and second != list(range(12))
