"""Training of tiny-clip: captions are true of their scenes, and a run that was killed ends with the same weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vtc.cli.tiny import app
from vtc.embedded import model_path
from vtc.errors import InputError
from vtc.eval.tiny import clip
from vtc.eval.tiny.cache import render_scenes
from vtc.eval.tiny.captions import MAX_WORDS, complete, facts, placed, random_caption
from vtc.eval.tiny.clip_train import ClipRecipe, ClipTrainer, train_clip
from vtc.eval.tiny.scenes import make_scene
from vtc.eval.tiny.vocabulary import encode

SIZES = (("width", 32), ("vision_layers", 2), ("text_layers", 1))
RECIPE = ClipRecipe(steps_joint=4, blocks_kept=1, batch_size=2, captions=2, scenes=6, start="", sizes=SIZES)


class Killed(BaseException):
    """Ends a run from inside."""


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_captions_are_true_fit_and_name_known_words() -> None:
    for number in range(20):
        items, rng = make_scene(number, "check").items, random.Random(number)
        for make in (complete, placed, random_caption):
            caption = make(items, rng)
            assert caption.claims and caption.claims <= facts(items)
            assert 0 < len(encode(caption.text)) <= MAX_WORDS
        everything = complete(items, rng)
        assert len(everything.claims) == len({(item.kind, item.colour, item.name) for item in items})
        assert not everything.claims <= facts(items[1:]) or len(set(items)) > len(everything.claims)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def kill(stage: str, step: int) -> None:
        if (stage, step) == ("joint", 3):
            raise Killed

    with pytest.raises(Killed):
        train_clip(tmp_path / "killed", RECIPE, device="cpu", workers=0, save_every=2, on_step=kill)
    done: list[tuple[str, int]] = []

    def note(stage: str, step: int) -> None:
        done.append((stage, step))

    first = train_clip(tmp_path / "killed", RECIPE, device="cpu", workers=0, save_every=2, on_step=note)
    assert done == [("joint", 3), ("joint", 4)]
    second = train_clip(tmp_path / "whole", RECIPE, device="cpu", workers=0)
    a, b = load_file(first / clip.WEIGHTS), load_file(second / clip.WEIGHTS)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((first / "training.json").read_text())["settings"]["blocks_kept"] == 1
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{first}")
    assert torch.equal(model.visual.proj.half(), a["visual.proj"])
    with pytest.raises(InputError, match="captions"):
        train_clip(tmp_path / "whole", ClipRecipe(**{**vars(RECIPE), "captions": 3}), device="cpu", workers=0)


def test_kept_blocks_stay_and_every_true_caption_is_right(tmp_path: Path) -> None:
    scenes = render_scenes(tmp_path / "scenes", "train", 6, 0)
    trainer = ClipTrainer.create(RECIPE, tmp_path, torch.device("cpu"), scenes)
    (stage,) = RECIPE.stages
    trained = {name for name, _ in trainer.trained(stage)}
    assert {name.split(".")[3] for name in trained if "visual.transformer" in name} == {"1"}
    assert "visual.proj" in trained and "visual.conv1.weight" not in trained
    batch = trainer.batch(0, 0)
    assert batch.true.shape == (2, 4) and bool(batch.true[0, :2].all() and batch.true[1, 2:].all())
    assert all(loss.isfinite() for loss in trainer.losses(batch, stage).values())


def test_training_calculates_what_the_model_does() -> None:
    torch.manual_seed(0)
    model = clip.build(dict(SIZES))
    pixels, ids = (
        torch.randn(2, 3, 168, 168),
        clip.tokens(["a ring", "the word cat", "", "a red ring"] * 2, clip.tokenizer()),
    )
    with torch.no_grad():
        halves = clip.from_block(model.visual, clip.to_block(model.visual, pixels, 1), 1)
        assert torch.allclose(halves, model.encode_image(pixels), atol=1e-6)
        assert torch.allclose(clip.encode_texts(model, ids), model.encode_text(ids), atol=1e-5)


def test_the_tower_taken_over_is_the_same_and_a_further_block_does_nothing() -> None:
    from transformers import AutoModelForImageTextToText

    model = clip.build()
    taken = clip.take_over_tower(model, "tiny-llava")
    assert len(taken) == 7 + 5 * 12
    tower = AutoModelForImageTextToText.from_pretrained(
        model_path("tiny-llava"), dtype=torch.float32
    ).model.vision_tower
    pixels = torch.randn(1, 3, 168, 168)
    with torch.no_grad():
        wanted = tower.eval()(pixels).pooler_output @ model.visual.proj
        assert torch.allclose(model.eval().encode_image(pixels), wanted, atol=1e-4)
    with pytest.raises(InputError, match="tiny-llava"):
        clip.take_over_tower(clip.build({**clip.SIZES, "width": 64}), "tiny-llava")


def test_the_embedded_model_is_what_the_recipe_makes() -> None:
    folder = model_path("tiny-clip")
    recipe = ClipRecipe()
    assert json.loads((folder / clip.CONFIGURATION).read_text()) == clip.configuration(**dict(recipe.sizes))
    settings = json.loads((folder / "training.json").read_text())["settings"]
    assert settings == json.loads(json.dumps(recipe.as_dict()))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_500_000
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["A red ring, the word cat"])
    assert torch.equal(ids, clip.tokens(["a red ring, the word cat"], clip.tokenizer()))


def test_options_of_other_models_are_refused(tmp_path: Path) -> None:
    command = ["train", "--out", str(tmp_path / "run"), "--model", "tiny-clip", "--steps-tower", "3"]
    assert isinstance(CliRunner().invoke(app, command).exception, InputError)
    for wrong in ({"steps_joint": 0}, {"seed": -1}, {"batch_size": 9, "scenes": 8}):
        with pytest.raises(InputError):
            ClipRecipe(**wrong)  # type: ignore[arg-type]
