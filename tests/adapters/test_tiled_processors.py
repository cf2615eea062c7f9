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
from vtc import adapters, loading
from vtc.testing import tiny_internvl, tiny_llava, tiny_llava_next, tiny_llava_onevision, tiny_model
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


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_chat_template_to_answer(name: str, case: str, limits: Any) -> None:
    model, processor = tiny_model(name), build_processor(name)
    inputs = prepare(processor, name, case)
    for method in ("vtc_cls", "random", "pool"):
        worst = against_oracle(model, inputs, lambda model, m=method: vtc.compress(model, m, retention=0.5), 4)
        assert worst <= limits.logits
    handle = vtc.compress(model, "vtc_cls", retention=0.5)
    ids, _ = generate(model, inputs, handle, 4)
    found = [(item.row, item.kind, len(item.positions)) for item in handle.trace[0].items]
    assert sorted(found) == sorted(runs(inputs["input_ids"]))
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
    from vtc.eval.media import Video

    if part["type"] != "video":
        return part
    frames = np.stack([np.asarray(frame) for frame in part["video"]])
    return part | {"video": Video(frames, np.arange(len(frames)) / 24, 24.0, len(frames))}


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_the_way_of_the_commands_is_the_processors_own(name: str, case: str) -> None:
    from vtc.preparation import prepare as prepared

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
    from vtc.errors import InputError
    from vtc.preparation import Chat
    from vtc.preparation import prepare as prepared

    loaded = loading.Loaded("llava-onevision", "", tiny_model("llava-onevision"), build_processor("llava-onevision"))
    long, short = (as_clip(user(frames)[0]["content"][0]) for frames in (FRAMES[0], FRAMES[1][:2]))
    with pytest.raises(InputError, match=r"the prompt with videos of 3 and 2 frames .*--frames 2"):
        prepared(loaded, [Chat([{"role": "user", "content": [long, short]}])])
    clips = {"a": long, "b": short}
    alone = [Chat([{"role": "user", "content": [clip]}], name) for name, clip in clips.items()]
    with pytest.raises(InputError, match=r"the batch of a, b is refused .*ask each alone"):
        prepared(loaded, alone)
