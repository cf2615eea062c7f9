"""The way of a real checkpoint for the families with tiles: chat template, processor, generate(), saved and loaded.

Processors are the published classes with their real placeholder layout, set to the tiny models' sizes, and a tokenizer
that knows the family's special tokens and single characters.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import vtc
from vtc import adapters
from vtc.app import loading
from vtc.errors import UnsupportedCall, VTCError
from vtc.testing import snapshot, tiny_internvl, tiny_llava, tiny_llava_next, tiny_llava_onevision, tiny_model
from vtc.testing.contract import against_oracle, generate
from vtc.testing.family import IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY

# The InternVL processor of transformers 5.17 hands a tensor to numpy.cumsum.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

NAMES = ["llava-next", "llava-next-video", "llava-onevision", "internvl"]
UNKNOWN, BEGIN, END = 4, 116, 117
CONTROL = {"<pad>": PAD, "<unk>": UNKNOWN, "<s>": BEGIN, "</s>": END}
LLAVA = {"<image>": IMAGE, "<video>": VIDEO}
INTERNVL = {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": VISION_START, "</img>": VISION_END}
CHARACTERS = "\n 0123456789.:<>?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def build_tokenizer(name: str) -> Any:
    special = CONTROL | (INTERNVL if name == "internvl" else LLAVA)
    free = (i for i in range(VOCABULARY) if i not in special.values())
    vocabulary = special | {character: next(free) for character in CHARACTERS}
    vocabulary |= {f"<reserved_{number}>": number for number in free}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    roles = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=roles if name == "internvl" else {"image_token": "<image>", "video_token": "<video>"},
    )


def template(name: str) -> str:
    """Chat template that puts the family's placeholder, which the processor expands, in front of the text."""
    image = "<IMG_CONTEXT>" if name == "internvl" else "<image>"
    return (
        "{% for message in messages %}<s>{{ message['role'] }}: "
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "\n"
        "{% elif part['type'] == 'video' %}<video>\n"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )


def build_processor(name: str) -> Any:
    tokenizer, side = build_tokenizer(name), tiny_llava.SIDE
    chat: dict[str, Any] = {"chat_template": template(name)}
    square = {"height": side, "width": side}
    clip = {"size": {"shortest_edge": side}, "crop_size": square}
    counts = {"patch_size": tiny_llava.PATCH, "vision_feature_select_strategy": "default"}
    if name.startswith("llava-next"):
        images = transformers.LlavaNextImageProcessor(**clip, image_grid_pinpoints=tiny_llava_next.PINPOINTS)
        counts["num_additional_image_tokens"] = 1
        if name == "llava-next":
            return transformers.LlavaNextProcessor(images, tokenizer, **counts, **chat)
        videos = transformers.LlavaNextVideoVideoProcessor(**clip, do_sample_frames=False)
        return transformers.LlavaNextVideoProcessor(videos, images, tokenizer, **counts, **chat)
    if name == "llava-onevision":
        images = transformers.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=tiny_llava_onevision.PINPOINTS
        )
        videos = transformers.LlavaOnevisionVideoProcessor(size=square, do_sample_frames=False)
        return transformers.LlavaOnevisionProcessor(
            images,
            tokenizer,
            videos,
            num_image_tokens=(side // tiny_llava.PATCH) ** 2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
            **chat,
        )
    square = {"height": tiny_internvl.SIDE, "width": tiny_internvl.SIDE}
    images = transformers.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=4)
    videos = transformers.InternVLVideoProcessor(size=square, do_sample_frames=False)
    return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=tiny_internvl.TILE_TOKENS, **chat)


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
    model, processor = tiny_model(name), build_processor(name)
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
    model, processor = tiny_model(name), build_processor(name)
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
    model, processor = tiny_model("internvl"), build_processor("internvl")
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
    processor = build_processor("internvl")
    inputs = prepare(processor, "internvl", "a video")
    assert [length for _, _, length in runs(inputs["input_ids"])] == [tiny_internvl.TILE_TOKENS] * 3
    assert processor.decode(inputs["input_ids"][0]).count("Frame") == 3


def test_a_budget_is_that_of_an_internvl_video() -> None:
    """Not of each of its frames; a budget per frame would keep so many times more."""
    model, processor = tiny_model("internvl"), build_processor("internvl")
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
    model, processor = tiny_model("internvl"), build_processor("internvl")
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
    model, processor = tiny_model("internvl"), build_processor("internvl")
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
        vtc.compress(model, "random", keep=5, processor=build_processor("llava-next"))
    assert snapshot(model) == before
    with vtc.compress(tiny_model("llava-next"), "random", keep=5, processor=object()):  # not asked for there
        pass


@pytest.mark.parametrize(("name", "side"), [("llava-next", 336), ("llava-onevision", 384)])
def test_published_sizes_give_the_tokens_that_processors_count(name: str, side: int) -> None:
    """Any picture on the published tilings: thousands of tokens, odd margins, shrunk maps."""
    config = tiny_model(name).config
    config.vision_config.image_size, config.vision_config.patch_size = side, 14
    processor = build_processor(name)
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

    loaded = loading.Loaded(name, "", tiny_model(name), build_processor(name))
    own = prepare(loaded.processor, name, case)
    conversations = [
        [{**message, "content": [as_clip(part) for part in message["content"]]} for message in conversation]
        for conversation in cases(name)[case]
    ]
    found = prepared(loaded, conversations)
    assert own.keys() == found.keys()
    for key in own:
        if isinstance(own[key], torch.Tensor):
            assert torch.equal(own[key], found[key]), key


def test_videos_that_cannot_be_stacked_are_refused() -> None:
    from vtc.app.preparation import Chat
    from vtc.app.preparation import prepare as prepared
    from vtc.errors import InputError

    loaded = loading.Loaded("llava-onevision", "", tiny_model("llava-onevision"), build_processor("llava-onevision"))
    long, short = (as_clip(user(frames)[0]["content"][0]) for frames in (FRAMES[0], FRAMES[1][:2]))
    with pytest.raises(InputError, match=r"the prompt with videos of 3 and 2 frames .*--frames 2"):
        prepared(loaded, [Chat([{"role": "user", "content": [long, short]}])])
    clips = {"a": long, "b": short}
    alone = [Chat([{"role": "user", "content": [clip]}], name) for name, clip in clips.items()]
    with pytest.raises(InputError, match=r"the batch of a, b is refused .*ask each alone"):
        prepared(loaded, alone)
