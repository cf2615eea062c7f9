"""The way of a real checkpoint: chat template, processor, generate() under compression, saved and loaded again.

Processors are the published classes with their real placeholder layout, set to the tiny models' patch sizes, and a
tokenizer that knows the family's special tokens and single characters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from vtc.app import loading
from vtc.testing import tiny_model
from vtc.testing.contract import against_oracle, generate
from vtc.testing.family import IMAGE, VIDEO
from vtc.testing.processors import QWEN_CLASSES, tiny_processor
from vtc.testing.tiny_qwen import MERGE


def picture(height: int, width: int, seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts: Any) -> list[dict[str, Any]]:
    """One user turn; a string is text, a picture an image, a list of pictures a video."""
    kinds = {str: "text", Image.Image: "image", list: "video"}
    content = [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]
    return [{"role": "user", "content": content}]


FRAMES = [picture(40, 24, 10 + number) for number in range(6)]
FEW = [picture(24, 32, 20 + number) for number in range(4)]
CASES: dict[str, list[list[dict[str, Any]]]] = {
    "one image": [user(picture(40, 24, 0), "What is this?")],
    "several images": [user(picture(40, 24, 1), "And", picture(24, 56, 2), picture(16, 16, 3), "How many?")],
    "a video": [user(FRAMES, "What happens?")],
    "mixed batch": [
        user(picture(40, 24, 4), "One", picture(48, 48, 5)),
        user(FEW, "What happens in this one?"),
        user("No picture at all"),
        user("Both", FRAMES, picture(32, 16, 6), "Which came first?"),
    ],
}


def prepare(processor: Any, case: str) -> dict[str, Any]:
    inputs = processor.apply_chat_template(
        CASES[case],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    return dict(inputs)


def sizes(inputs: dict[str, Any], kind: str) -> list[int]:
    """Tokens of each item, by the grids the processor made."""
    grids = inputs.get(f"{kind}_grid_thw")
    return [] if grids is None else (grids.prod(-1) // MERGE**2).tolist()


@pytest.mark.parametrize("name", QWEN_CLASSES)
@pytest.mark.parametrize("case", CASES)
def test_chat_template_to_answer(name: str, case: str, limits: Any) -> None:
    model, processor = tiny_model(name), tiny_processor(name)
    inputs = prepare(processor, case)
    assert {"input_ids", "attention_mask", "mm_token_type_ids"} <= set(inputs)
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        assert int((inputs["input_ids"] == token).sum()) == sum(sizes(inputs, kind))
    for method in ("vtc_cls", "random", "pool"):
        worst = against_oracle(model, inputs, lambda model, m=method: vtc.compress(model, m, retention=0.5), 4)
        assert worst <= limits.logits
    handle = vtc.compress(model, "vtc_cls", retention=0.25)
    ids, _ = generate(model, inputs, handle, 4)
    found = {
        kind: [(len(i.positions), len(i.kept[0])) for i in handle.trace[0].items if i.kind == kind]
        for kind in ("image", "video")
    }
    for kind, items in found.items():
        assert items == [(n, max(1, (n + 2) // 4)) for n in sizes(inputs, kind)]
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(answers) == len(CASES[case])


def test_frames_of_a_qwen3_video_lie_between_timestamps() -> None:
    processor = tiny_processor("qwen3-vl")
    inputs = prepare(processor, "a video")
    visual = inputs["input_ids"][0] == VIDEO
    runs = int((visual[1:] & ~visual[:-1]).sum())
    assert runs == int(inputs["video_grid_thw"][0, 0]) > 1
    assert processor.decode(inputs["input_ids"][0]).count("seconds>") == runs
    model = tiny_model("qwen3-vl")
    handle = vtc.compress(model, "random", retention=0.5)
    generate(model, inputs, handle, 1)
    (item,) = handle.trace[0].items
    assert torch.equal(item.positions, visual.nonzero().flatten())
    assert len(item.kept[0]) == (len(item.positions) + 1) // 2


@pytest.mark.parametrize("name", QWEN_CLASSES)
def test_saved_and_loaded_it_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    model, processor = tiny_model(name), tiny_processor(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = loading.load(str(tmp_path), device="cpu")
    assert type(loaded.model) is type(model)
    assert type(loaded.processor) is type(processor)
    assert loaded.fingerprint()["class"] == type(model).__name__
    inputs, again = prepare(processor, "mixed batch"), prepare(loaded.processor, "mixed batch")
    assert inputs.keys() == again.keys()
    for key in inputs:
        assert torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(again[key]))
    expected, _ = generate(model, inputs, vtc.compress(model, "vtc_cls", retention=0.5), 6)
    found, _ = generate(loaded.model, again, vtc.compress(loaded.model, "vtc_cls", retention=0.5), 6)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", QWEN_CLASSES)
def test_video_file_to_answer(name: str, tmp_path: Path) -> None:
    from vtc.app.answer import answer
    from vtc.app.media import Video

    model, processor = tiny_model(name), tiny_processor(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = loading.load(str(tmp_path), device="cpu")
    frames = np.stack([np.asarray(frame) for frame in FRAMES])
    clip = Video(frames, np.arange(len(frames)) / 2, 2.0, len(frames))
    images = [picture(40, 24, 0)]
    whole = answer(loaded, images, "What is this?", videos=[clip], max_new_tokens=2)
    short = answer(loaded, images, "What is this?", videos=[clip], method="random", retention=0.5, max_new_tokens=2)
    assert whole.visual_tokens_in == whole.visual_tokens_kept == short.visual_tokens_in > 0
    assert abs(short.visual_tokens_kept - short.visual_tokens_in / 2) <= 1


def loaded_tiny(name: str) -> loading.Loaded:
    return loading.Loaded(name, "", tiny_model(name), tiny_processor(name))


def as_clip(pictures: list[Image.Image], name: str = "") -> Any:
    from vtc.app.media import Video

    frames = np.stack([np.asarray(frame) for frame in pictures])
    return Video(frames, np.arange(len(frames)) / 24, 24.0, len(frames), name)


@pytest.mark.parametrize("name", QWEN_CLASSES)
@pytest.mark.parametrize("case", CASES)
def test_the_way_of_the_commands_is_the_processors_own(name: str, case: str) -> None:
    from vtc.app.preparation import prepare as prepared

    loaded = loaded_tiny(name)
    own = prepare(loaded.processor, case)
    conversations = [
        [{**message, "content": [video_as_clip(part) for part in message["content"]]} for message in conversation]
        for conversation in CASES[case]
    ]
    found, _ = prepared(loaded, conversations)
    assert own.keys() == found.keys()
    for key in own:
        assert torch.equal(torch.as_tensor(own[key]), torch.as_tensor(found[key])), key


def video_as_clip(part: dict[str, Any]) -> dict[str, Any]:
    return part | {"video": as_clip(part["video"])} if part["type"] == "video" else part


def test_what_the_processor_refuses_is_named() -> None:
    """A picture of extreme shape, a video of one frame, and a placeholder in the question."""
    from vtc.app.answer import answer
    from vtc.app.images import open_image
    from vtc.errors import InputError

    loaded = loaded_tiny("qwen3-vl")
    thin = open_image(picture(5, 1093, 0))
    thin.info["source"] = "thin.png"
    for images, videos, prompt, words in (
        ([picture(40, 24, 0), thin], [], "hi", r"image 'thin\.png' \(1093 x 5 pixels\) in the prompt .* ratio"),
        ([], [as_clip(FEW), as_clip(FEW[:1], "one.mp4")], "hi", r"video 'one\.mp4' \(1 frame of 32 x 24 .*--frames"),
        ([picture(40, 24, 0)], [], "what is <|video_pad|>?", r"the prompt holds '<\|video_pad\|>'"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            answer(loaded, images, prompt, videos=videos, method="random", retention=0.5)
        assert "\n" not in str(refused.value)


def test_a_prompt_is_told_the_true_times_of_uneven_frames() -> None:
    from vtc.app.media import Video
    from vtc.app.preparation import prepare as prepared

    loaded = loaded_tiny("qwen3-vl")
    seconds = np.array([0.0, 0.4, 7.1, 9.3])
    clip = Video(as_clip(FEW).frames, seconds, 13 / 10.0, 13)
    inputs, _ = prepared(loaded, [[{"role": "user", "content": [{"type": "video", "video": clip}]}]])
    text = loaded.processor.decode(inputs["input_ids"][0])
    assert "<0.2 seconds>" in text and "<8.2 seconds>" in text  # the means of each pair
