"""The control `downsample`: pictures scaled until the tokens that the processor really makes meet the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtc.app import loading
from vtc.app.media import Video
from vtc.app.preparation import Chat
from vtc.app.video_reading import scaled_size
from vtc.errors import BudgetError
from vtc.eval.downsample import LEAST, Downsampler
from vtc.eval.progress import SilentProgress
from vtc.eval.runner import Runner
from vtc.eval.spec import make_spec
from vtc.eval.store import Store
from vtc.eval.sweep import run_sweep
from vtc.method.budget import Budget


@pytest.fixture(scope="module")
def loaded(video_model_folder: Path) -> Any:
    return loading.load(str(video_model_folder), device="cpu")


class Notes(SilentProgress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def chat(**media: Any) -> Chat:
    parts = [{"type": kind, kind: each} for kind, each in media.items()]
    return Chat([{"role": "user", "content": [*parts, {"type": "text", "text": "What color is the ring?"}]}])


@pytest.mark.parametrize("size", [(336, 336), (333, 120)])
@pytest.mark.parametrize("budget", [Budget(retention=0.6), Budget(retention=0.3), Budget(keep=40)])
def test_the_tokens_made_meet_the_budget_and_no_larger_picture_does(
    loaded: Any, size: tuple[int, int], budget: Budget
) -> None:
    runner = Runner(loaded)
    given = chat(image=Image.effect_noise(size, 50).convert("RGB"))
    (full,) = runner.prepare([given]).visual_tokens
    (small,) = runner.scaled([given], budget).visual_tokens
    allowed = budget.tokens(full)
    scaled = Downsampler(loaded).smaller(given, budget)[0]["content"][0]["image"]
    assert abs(scaled.width / scaled.height - size[0] / size[1]) < 0.1 * size[0] / size[1]
    assert given[0]["content"][0]["image"].size == size
    larger = given[0]["content"][0]["image"].resize((round(scaled.width * 1.1) + 1, round(scaled.height * 1.1) + 1))
    (more,) = runner.prepare([chat(image=larger)]).visual_tokens
    if small <= allowed:
        assert small > 0 and (more > allowed or scaled.size == size)
        Downsampler(loaded).check(given, budget)
    else:  # tiles have an overview and at least one crop
        assert (
            small == runner.prepare([chat(image=Image.new("RGB", scaled_size(*size, LEAST)))]).visual_tokens[0] < more
        )
        with pytest.raises(BudgetError, match=f"at {allowed} tokens: model .* makes at least {small} of a picture"):
            Downsampler(loaded).check(given, budget)


def test_a_budget_that_is_met_already_changes_nothing(loaded: Any) -> None:
    given = chat(image=Image.new("RGB", (84, 84)))
    assert Downsampler(loaded).smaller(given, Budget(1.0))[0]["content"][0] is given[0]["content"][0]


def test_frames_are_scaled_alike(loaded: Any) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    given = chat(video=Video(frames, np.arange(4) / 2.0, 2.0, 4))
    sampler = Downsampler(loaded)
    video = sampler.smaller(given, Budget(0.5))[0]["content"][0]["video"]
    assert len(video.frames) == 4 and video.seconds.tolist() == [0, 0.5, 1, 1.5]
    if "onevision" in loaded.name:  # which resizes every frame
        assert video.frames.shape == frames.shape
        with pytest.raises(BudgetError, match="makes at least"):
            sampler.check(given, Budget(0.5))
    else:
        assert video.frames.shape[1] < 112
        sampler.check(given, Budget(0.5))


def test_models_of_one_size_are_left_out_of_a_sweep(model_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    settings = {
        "methods": ["downsample", "stride"],
        "retentions": [0.5],
        "tasks": ["blobs"],
        "include_path": [str(task_folder)],
    }
    notes = Notes()
    spec = make_spec({**settings, "model": str(model_folder), "device": "cpu", "limit": 1, "out": str(tmp_path)})
    result = run_sweep(spec, notes)
    assert [line["method"] for line in result.results.select("blobs", "accuracy")] == ["none", "stride"]
    (left,) = [note for note in notes.told if note.startswith("left out")]
    assert "downsample at 72 tokens" in left and "makes at least 144 of a picture" in left and "take 'pool'" in left


def test_a_budget_that_one_task_cannot_meet_leaves_the_others(
    model_folder: Path, write_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Downsampler, given: Chat, budget: Budget) -> None:
        if "large" in given.source:
            raise BudgetError("too large")

    monkeypatch.setattr(Downsampler, "check", check)
    folders = [str(write_task(tmp_path / name, name)) for name in ("small", "large")]
    settings = {"model": str(model_folder), "methods": ["downsample", "stride"], "retentions": [0.5], "device": "cpu"}
    settings |= {"tasks": ["large", "small"], "include_path": folders, "limit": 2, "out": str(tmp_path / "out")}
    notes = Notes()
    result = run_sweep(make_spec(settings), notes)
    found = {task: {line["method"] for line in result.results.select(task, "accuracy")} for task in settings["tasks"]}
    assert found == {"small": {"none", "downsample", "stride"}, "large": {"none", "stride"}}
    assert [note for note in notes.told if note.startswith("left out")] == ["left out: of large: too large"]
    assert not result.results.incomplete and not result.failures and result.answered == 10
    assert run_sweep(make_spec(settings), notes).answered == 0


def test_a_sweep_compares_it_at_the_tokens_of_the_untouched_model(
    video_model_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "model": str(video_model_folder),
        "methods": ["downsample", "stride"],
        "retentions": [0.9 if video_model_folder.name == "onevision" else 0.5],
        "tasks": ["blobs"],
        "include_path": [str(task_folder)],
        "device": "cpu",
        "limit": 4,
        "out": str(tmp_path),
    }
    result = run_sweep(make_spec(settings))
    assert not result.failures
    found = {line["method"]: line for line in result.results.select("blobs", "accuracy")}
    assert set(found) == {"none", "downsample", "stride"}
    before = {line["visual_tokens_in"] for line in found.values()}
    assert len(before) == 1 and 0 < found["downsample"]["visual_tokens_kept"] <= 0.9 * before.pop()
    assert len(list(Store(tmp_path).rows())) == 12
