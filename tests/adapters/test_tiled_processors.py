"""The way of a real checkpoint for the families with tiles: chat template, processor, generate(), saved and loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vtc
from vtc import adapters
from vtc.app import loading
from vtc.app.answer import Answerer
from vtc.errors import InputError, UnsupportedCall, VTCError
from vtc.method.base import Selection, StageView
from vtc.method.layout import VisualItem
from vtc.testing import (
    FixedKeep,
    snapshot,
    tiny_internvl,
    tiny_model,
)
from vtc.testing.contract import against_oracle, generate
from vtc.testing.family import IMAGE, PAD, VIDEO
from vtc.testing.processors import tiny_processor

# The InternVL processor of transformers 5.17 hands a tensor to numpy.cumsum.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

NAMES = ["llava-next", "llava-next-video", "llava-onevision", "internvl"]


def picture(height: int, width: int, seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts: Any) -> list[dict[str, Any]]:
    """One user turn; a string is text, a picture an image, a list of pictures a video."""
    kinds = {str: "text", Image.Image: "image", list: "video"}
    content = [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]
    return [{"role": "user", "content": content}]


FRAMES = [[picture(40, 24, 10 * video + number) for number in range(3)] for video in range(3)]
IMAGES: dict[str, list[list[dict[str, Any]]]] = {
    "one image": [user(picture(40, 24, 0), "What is this?")],
    "several images": [user(picture(40, 24, 1), "And", picture(24, 56, 2), picture(16, 16, 3), "How many?")],
    "mixed batch": [
        user(picture(30, 70, 4), "One", picture(48, 48, 5)),
        user(picture(100, 110, 6), "And this?"),
        user("No picture at all"),
    ],
}
VIDEOS: dict[str, list[list[dict[str, Any]]]] = {
    "a video": [user(FRAMES[0], "What happens?")],
    "images and videos": [
        user(picture(40, 24, 4), "One", picture(48, 48, 5)),
        user(FRAMES[1], "What happens in this one?"),
        user("No picture at all"),
        user("Both", FRAMES[2], picture(32, 16, 6), "Which came first?"),
    ],
}


def cases(name: str) -> dict[str, list[list[dict[str, Any]]]]:
    return IMAGES if name == "llava-next" else IMAGES | VIDEOS


def prepare(processor: Any, name: str, case: str) -> dict[str, Any]:
    inputs = processor.apply_chat_template(
        cases(name)[case],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    return dict(inputs)


PAIRS = [(name, case) for name in NAMES for case in cases(name)]


def runs(ids: torch.Tensor) -> list[tuple[int, str, int]]:
    """(row, kind, length) of every unbroken run of placeholders; the template puts text between any two items."""
    found: list[tuple[int, str, int]] = []
    for row, line in enumerate(ids.tolist()):
        for before, token in zip([PAD, *line], line, strict=False):
            if token in (IMAGE, VIDEO):
                if before == token:
                    *rest, length = found[-1]
                    found[-1] = (*rest, length + 1)  # type: ignore[assignment]
                else:
                    found.append((row, "image" if token == IMAGE else "video", 1))
    return found


def joined(images: list[tuple[int, str, int]], conversations: list[Any]) -> list[tuple[int, str, int]]:
    """The runs of an InternVL prompt, those of a video's frames as one."""
    found, left = [], list(images)
    for row, (turn,) in enumerate(conversations):
        for part in turn["content"]:
            if part["type"] != "text":
                count = len(part["video"]) if part["type"] == "video" else 1
                found.append((row, part["type"], sum(length for _, _, length in left[:count])))
                del left[:count]
    assert not left
    return found


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_chat_template_to_answer(name: str, case: str, limits: Any) -> None:
    model, processor = tiny_model(name), tiny_processor(name)
    inputs = prepare(processor, name, case)
    for method in ("vtc_cls", "random", "pool"):

        def attach(model: Any, method: str = method) -> vtc.Handle:
            return vtc.compress(model, method, retention=0.5, processor=processor)

        assert against_oracle(model, inputs, attach, 4) <= limits.logits
    handle = vtc.compress(model, "vtc_cls", retention=0.5, processor=processor)
    ids, _ = generate(model, inputs, handle, 4)
    found = [(item.row, item.kind, len(item.positions)) for item in handle.trace[0].items]
    expected = runs(inputs["input_ids"])
    assert sorted(found) == sorted(joined(expected, cases(name)[case]) if name == "internvl" else expected)
    assert all(len(item.kept[0]) == math.floor(len(item.positions) / 2 + 0.5) for item in handle.trace[0].items)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(answers) == len(cases(name)[case])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    model, processor = tiny_model(name), tiny_processor(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = loading.load(str(tmp_path), device="cpu")
    assert type(loaded.model) is type(model)
    assert type(loaded.processor) is type(processor)
    assert loaded.fingerprint()["class"] == type(model).__name__
    case = list(cases(name))[-1]
    inputs, again = prepare(processor, name, case), prepare(loaded.processor, name, case)
    assert inputs.keys() == again.keys()
    for key in inputs:
        assert torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(again[key]))
    expected, _ = generate(model, inputs, vtc.compress(model, "vtc_cls", retention=0.5), 6)
    found, _ = generate(loaded.model, again, vtc.compress(loaded.model, "vtc_cls", retention=0.5), 6)
    assert torch.equal(expected, found)


def test_the_last_tile_of_an_internvl_image_is_its_overview() -> None:
    model, processor = tiny_model("internvl"), tiny_processor("internvl")
    pictures = [picture(40, 24, 1), picture(24, 56, 2), picture(16, 16, 3)]
    inputs = prepare(processor, "internvl", "several images")
    whole = processor.image_processor(pictures, crop_to_patches=False, return_tensors="pt").pixel_values
    handle = vtc.compress(model, "random", retention=0.5)
    generate(model, inputs, handle, 1)
    counts = [item.grid[0] for item in handle.trace[0].items if item.grid is not None]
    assert counts == [3, 3, 1]
    ends = torch.tensor(counts).cumsum(0) - 1
    assert torch.equal(inputs["pixel_values"][ends], whole)


def test_frames_of_an_internvl_video_lie_between_marks() -> None:
    processor = tiny_processor("internvl")
    inputs = prepare(processor, "internvl", "a video")
    assert [length for _, _, length in runs(inputs["input_ids"])] == [tiny_internvl.TILE_TOKENS] * 3
    assert processor.decode(inputs["input_ids"][0]).count("Frame") == 3


def test_a_budget_is_that_of_an_internvl_video() -> None:
    """Not of each of its frames; a budget per frame would keep so many times more."""
    model, processor = tiny_model("internvl"), tiny_processor("internvl")
    inputs = prepare(processor, "internvl", "images and videos")
    with vtc.compress(model, "random", keep=5, processor=processor) as handle, torch.no_grad():
        model(**inputs)
    items = handle.trace[0].items
    assert [(item.row, item.kind) for item in items] == [
        (0, "image"),
        (0, "image"),
        (1, "video"),
        (3, "video"),
        (3, "image"),
    ]
    assert [len(item.kept[0]) for item in items] == [5] * 5
    assert [item.grid[0] for item in items if item.kind == "video" and item.grid] == [3, 3]


def test_an_internvl_prompt_that_counts_images_needs_the_processor() -> None:
    """Frames, and images that the user counts: the ids show which they are once the processor says how it counts."""
    model, processor = tiny_model("internvl"), tiny_processor("internvl")
    del model.config.video_frame_texts
    pictures = [picture(16, 16, seed) for seed in range(3)]
    text = "".join(f"Image-{number}: <IMG_CONTEXT>\n" for number in (1, 2, 3)) + "Which is brightest?"
    counted = dict(processor(text=[text], images=[pictures], return_tensors="pt"))
    plain = dict(processor(text=["<IMG_CONTEXT>\n" * 3 + "Which?"], images=[pictures], return_tensors="pt"))
    video = prepare(processor, "internvl", "a video")
    model(**plain)
    before = snapshot(model)
    for inputs, kinds in ((counted, ["image"] * 3), (video, ["video"])):
        with vtc.compress(model, "random", keep=5) as handle, torch.no_grad():
            with pytest.raises(UnsupportedCall, match=r"counts images of one tile.*pass processor=processor"):
                model(**inputs)
            model(**plain)  # nothing is counted here
        assert [item.kind for item in handle.trace[0].items] == ["image"] * 3
        with vtc.compress(model, "random", keep=5, processor=processor) as handle, torch.no_grad():
            model(**inputs)
        assert [item.kind for item in handle.trace[0].items] == kinds
    assert snapshot(model) == before


def test_videos_that_follow_one_another_stay_apart() -> None:
    model, processor = tiny_model("internvl"), tiny_processor("internvl")
    clips = [[picture(16, 16, 10 * clip + number) for number in range(count)] for clip, count in enumerate((12, 12))]
    text = "<video>\n<video><IMG_CONTEXT>What changes?"
    inputs = dict(processor(text=[text], videos=clips, images=[picture(16, 16, 99)], return_tensors="pt"))
    with vtc.compress(model, "random", keep=7, processor=processor) as handle, torch.no_grad():
        model(**inputs)
    found = [(item.kind, item.grid and item.grid[0]) for item in handle.trace[0].items]
    assert found == [("video", 12), ("video", 12), ("image", 1)]


def test_the_processor_of_another_family_tells_no_frames() -> None:
    model = tiny_model("internvl")
    before = snapshot(model)
    with pytest.raises(VTCError, match="LlavaNextProcessor is no processor of InternVL"):
        vtc.compress(model, "random", keep=5, processor=tiny_processor("llava-next"))
    assert snapshot(model) == before
    with vtc.compress(tiny_model("llava-next"), "random", keep=5, processor=object()):  # not asked for there
        pass


@pytest.mark.parametrize(("name", "side"), [("llava-next", 336), ("llava-onevision", 384)])
def test_published_sizes_give_the_tokens_that_processors_count(name: str, side: int) -> None:
    """Any picture on the published tilings: thousands of tokens, odd margins, shrunk maps."""
    config = tiny_model(name).config
    config.vision_config.image_size, config.vision_config.patch_size = side, 14
    processor = tiny_processor(name)
    default = type(processor.image_processor)()
    config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = default.image_grid_pinpoints
    if name == "llava-next":
        processor.patch_size, processor.num_additional_image_tokens = 14, 0
        adapter = adapters.of(transformers.LlavaNextForConditionalGeneration(config))
    else:
        processor.num_image_tokens, processor.vision_aspect_ratio = (side // 14) ** 2, "anyres_max_9"
        config.vision_aspect_ratio = "anyres_max_9"
        adapter = adapters.of(transformers.LlavaOnevisionForConditionalGeneration(config))
    draw = np.random.default_rng(0)
    sizes = [(10, 3000), (3000, 10), (336, 672), (1, 1), (2304, 2304), *draw.integers(20, 2500, (40, 2)).tolist()]
    pixels = torch.zeros(1, 37, 3, 1, 1)
    for height, width in sizes:
        arguments = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
        (item,) = adapter.describe("image", arguments, None).items
        assert item.n_tokens == processor._get_number_of_features(height, width, side, side)
        assert item.n_tokens - item.newlines == sum(math.prod(region) for region in item.regions)
        assert torch.equal(item.crop < 0, item.newline)
        assert int(item.crop.max()) < item.n_crops
        for value in (item.row[~item.newline], item.col[~item.newline]):
            assert -0.5 <= float(value.min()) <= float(value.max()) <= side // 14 - 0.5


def as_clip(part: dict[str, Any]) -> dict[str, Any]:
    from vtc.app.media import Video

    if part["type"] != "video":
        return part
    frames = np.stack([np.asarray(frame) for frame in part["video"]])
    return part | {"video": Video(frames, np.arange(len(frames)) / 24, 24.0, len(frames))}


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_the_way_of_the_commands_is_the_processors_own(name: str, case: str) -> None:
    from vtc.app.preparation import prepare as prepared

    loaded = loading.Loaded(name, "", tiny_model(name), tiny_processor(name))
    own = prepare(loaded.processor, name, case)
    conversations = [
        [{**message, "content": [as_clip(part) for part in message["content"]]} for message in conversation]
        for conversation in cases(name)[case]
    ]
    found, _ = prepared(loaded, conversations)
    assert own.keys() == found.keys()
    for key in own:
        if isinstance(own[key], torch.Tensor):
            assert torch.equal(own[key], found[key]), key


def test_videos_that_cannot_be_stacked_are_refused() -> None:
    from vtc.app.preparation import Chat
    from vtc.app.preparation import prepare as prepared
    from vtc.errors import InputError

    loaded = loading.Loaded("llava-onevision", "", tiny_model("llava-onevision"), tiny_processor("llava-onevision"))
    long, short = (as_clip(user(frames)[0]["content"][0]) for frames in (FRAMES[0], FRAMES[1][:2]))
    with pytest.raises(InputError, match=r"the prompt with videos of 3 and 2 frames .*--frames 2"):
        prepared(loaded, [Chat([{"role": "user", "content": [long, short]}])])
    clips = {"a": long, "b": short}
    alone = [Chat([{"role": "user", "content": [clip]}], name) for name, clip in clips.items()]
    with pytest.raises(InputError, match=r"the batch of a, b is refused .*ask each alone"):
        prepared(loaded, alone)


# --- how the tiles of an InternVL image lie
SIZES = [(40, 24), (24, 56), (16, 16)]


def slope(height: int, width: int) -> Image.Image:
    """A picture that is redder further down and greener further right."""
    down, right = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    return Image.fromarray(np.stack(np.broadcast_arrays(down, right, np.zeros((1, 1))), -1).round().astype(np.uint8))


class Seeing(FixedKeep):
    """Notes the layouts that it is shown."""

    layouts: ClassVar[list[VisualItem]] = []

    def select(self, view: StageView) -> Selection:
        self.layouts.extend(view.items.layouts)
        return super().select(view)


def layouts(inputs: dict[str, Any], model: Any = None, **told: Any) -> list[VisualItem]:
    Seeing.layouts.clear()
    model = tiny_model("internvl") if model is None else model
    with vtc.compress(model, Seeing(), **told), torch.no_grad():
        model(**inputs)
    return list(Seeing.layouts)


def slopes(*sizes: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    processor = tiny_processor("internvl")
    turn = user(*(slope(*size) for size in sizes), "What is this?")
    chat = dict(tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return processor, dict(processor.apply_chat_template([turn], **chat))


def test_sizes_of_pictures_tell_how_their_tiles_lie() -> None:
    processor, inputs = slopes(*SIZES, (90, 95))
    found = layouts(inputs, processor=processor, image_sizes=torch.tensor([*SIZES, (90, 95)]))
    assert [item.tiling for item in found] == [(2, 1), (1, 2), None, (2, 2)]
    first = 0
    for item in found:
        means = inputs["pixel_values"][first : first + item.n_crops].mean((-1, -2))
        first += item.n_crops
        if item.tiling is not None:
            down, right = means[:-1, 0].view(item.tiling), means[:-1, 1].view(item.tiling)
            assert item.thumbnail == item.n_crops - 1
            assert (down.diff(dim=0) > 0.5).all() and (right.diff(dim=1) > 0.5).all()
            assert down.std(1, correction=0).max() < 0.1 and right.std(0, correction=0).max() < 0.1
    assert [item.tiling for item in layouts(inputs, processor=processor)] == [None] * 4


def test_sizes_are_those_of_images_among_videos() -> None:
    processor = tiny_processor("internvl")
    inputs = prepare(processor, "internvl", "images and videos")
    found = layouts(inputs, processor=processor, image_sizes=[(40, 24), (48, 48), (32, 16)])
    shapes = [(item.kind, item.tiling) for item in found]
    assert shapes == [("image", (2, 1)), ("image", (2, 2)), ("video", None), ("video", None), ("image", (2, 1))]


def test_sizes_may_be_told_anew_and_leave_nothing_behind() -> None:
    processor, inputs = slopes((40, 24))
    _, others = slopes((24, 56))
    model = tiny_model("internvl")
    layouts(inputs, model)
    before = snapshot(model)
    with vtc.compress(model, "globalcom2", retention=0.5, processor=processor) as handle, torch.no_grad():
        for given, size in ((inputs, (40, 24)), (others, (24, 56))):
            handle.image_sizes = [size]
            assert handle.image_sizes == (size,) and handle.system_length is None
            model(**given)
    assert snapshot(model) == before


def test_the_overview_guides_the_tiles_of_an_internvl_image() -> None:
    processor, inputs = slopes((90, 95))
    model, kept = tiny_model("internvl"), {}
    for sizes in (None, [(90, 95)]):
        handle = vtc.compress(model, "globalcom2", retention=0.4, tau=0.01, processor=processor, image_sizes=sizes)
        generate(model, inputs, handle, 1)
        (item,) = handle.trace[0].items
        crops = item.kept[0] // tiny_internvl.TILE_TOKENS
        kept[sizes is None] = crops.bincount(minlength=5).tolist()
    assert sum(kept[True]) == sum(kept[False])
    assert max(kept[True][:4]) - min(kept[True][:4]) <= 1 < max(kept[False][:4]) - min(kept[False][:4])


@pytest.mark.parametrize(
    ("sizes", "told", "words"),
    [
        ([(40, 24)], False, "only together with the processor"),
        ([(40, 24), (24, 56)], True, r"image_sizes has 2 entries, the prompts hold 1 pictures"),
        ([(16, 16)], True, r"into 1 x 1 tiles, the picture in the prompt has 3 with its overview"),
    ],
)
def test_sizes_that_do_not_explain_the_tiles_are_refused(sizes: Any, told: bool, words: str) -> None:
    processor, inputs = slopes((40, 24))
    model = tiny_model("internvl")
    layouts(inputs, model)  # transformers leaves hooks of its own
    before = snapshot(model)
    with pytest.raises(UnsupportedCall, match=words):
        layouts(inputs, model, image_sizes=sizes, **({"processor": processor} if told else {}))
    assert snapshot(model) == before


@pytest.mark.parametrize("sizes", [40, [40, 24], [(40, 24, 3)], [(40.0, 24.0)], [(0, 24)], "large"])
def test_what_is_no_size_is_refused(sizes: Any) -> None:
    with pytest.raises(InputError, match="are no sizes of pictures"):
        vtc.compress(tiny_model("internvl"), "random", retention=0.5, image_sizes=sizes)


def test_an_answerer_tells_the_sizes() -> None:
    model, processor = tiny_model("internvl"), tiny_processor("internvl")
    answerer = Answerer(loading.Loaded("tiny", "", model, processor))
    batch = answerer.prepare([user(slope(40, 24), "What?"), user(slope(24, 56), slope(16, 16), "What?")])
    assert batch.image_sizes == tuple(SIZES)
    Seeing.layouts.clear()
    with answerer.compressed(Seeing()) as handle:
        answerer.generate(batch, {"max_new_tokens": 1, "do_sample": False}, handle)
    assert [item.tiling for item in Seeing.layouts] == [(2, 1), (1, 2), None]
