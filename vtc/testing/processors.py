"""Processors for the tiny models: the published classes with their own placeholder layout, and a small tokenizer.

Sizes are those of the tiny models; the tokenizer knows the family's special tokens and single characters.
"""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from vtc.errors import unknown_name
from vtc.testing import tiny_internvl, tiny_llava, tiny_llava_next, tiny_llava_onevision, tiny_qwen
from vtc.testing.family import IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY

UNKNOWN, BEGIN, END = 4, 116, 117
CHARACTERS = "\n 0123456789.:<>?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONTROL = {"<pad>": PAD, "<unk>": UNKNOWN, "<s>": BEGIN, "</s>": END}
LLAVA = CONTROL | {"<image>": IMAGE, "<video>": VIDEO}
INTERNVL = CONTROL | {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": VISION_START, "</img>": VISION_END}
QWEN = {
    "<|endoftext|>": PAD,
    "<|unknown|>": UNKNOWN,
    "<|im_start|>": BEGIN,
    "<|im_end|>": END,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
}
QWEN_CLASSES = {
    "qwen2-vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2.5-vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3-vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
TINY_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
"""Sizes of a text tower for `tiny_tokenizer`."""
PROCESSED = ("llava-clip", "llava-next", "llava-next-video", "llava-onevision", "internvl", *QWEN_CLASSES)
"""Names of the tiny models that have one."""


def tiny_processor(name: str) -> Any:
    """The processor of the tiny model `name`; raises UnknownName for others than those of `PROCESSED`."""
    if name not in PROCESSED:
        raise unknown_name("processor", name, PROCESSED)
    if name in QWEN_CLASSES:
        return _qwen(name)
    return _internvl() if name == "internvl" else _llava(name)


def tiny_tokenizer() -> Any:
    """The tokenizer alone, which knows control tokens and single characters."""
    return _tokenizer(CONTROL)


def _llava(name: str) -> Any:
    side = tiny_llava.SIDE
    tokenizer = _tokenizer(LLAVA, extra_special_tokens={"image_token": "<image>", "video_token": "<video>"})
    square = {"height": side, "width": side}
    clip: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square}
    chat = {"chat_template": _template("<image>")}
    if name == "llava-onevision":
        images = transformers.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=tiny_llava_onevision.PINPOINTS
        )
        videos = transformers.LlavaOnevisionVideoProcessor(size=square, do_sample_frames=False)
        return transformers.LlavaOnevisionProcessor(
            images, tokenizer, videos, num_image_tokens=(side // tiny_llava.PATCH) ** 2,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4", **chat,
        )  # fmt: skip
    counts: dict[str, Any] = {
        "patch_size": tiny_llava.PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if name == "llava-clip":
        return transformers.LlavaProcessor(transformers.CLIPImageProcessor(**clip), tokenizer, **counts, **chat)
    images = transformers.LlavaNextImageProcessor(**clip, image_grid_pinpoints=tiny_llava_next.PINPOINTS)
    if name == "llava-next":
        return transformers.LlavaNextProcessor(images, tokenizer, **counts, **chat)
    videos = transformers.LlavaNextVideoVideoProcessor(**clip, do_sample_frames=False)
    return transformers.LlavaNextVideoProcessor(videos, images, tokenizer, **counts, **chat)


def _internvl() -> Any:
    roles = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    square = {"height": tiny_internvl.SIDE, "width": tiny_internvl.SIDE}
    images = transformers.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=4)
    videos = transformers.InternVLVideoProcessor(size=square, do_sample_frames=False)
    return transformers.InternVLProcessor(
        images, _tokenizer(INTERNVL, extra_special_tokens=roles), videos,
        image_seq_length=tiny_internvl.TILE_TOKENS, chat_template=_template("<IMG_CONTEXT>"),
    )  # fmt: skip


def _qwen(name: str) -> Any:
    whole, video = (getattr(transformers, class_name) for class_name in QWEN_CLASSES[name])
    sizes = {"patch_size": tiny_qwen.PATCH, "merge_size": tiny_qwen.MERGE, "temporal_patch_size": tiny_qwen.PAIR}
    area = {"shortest_edge": 64, "longest_edge": 56 * 56}
    images = transformers.Qwen2VLImageProcessor(size=area, **sizes)
    volume = {"shortest_edge": 64, "longest_edge": (6 if name == "qwen3-vl" else 1) * 32 * 32}
    videos = video(size=volume, do_sample_frames=False, cap_pixels_per_frame=False, **sizes)
    names = [token for token, number in QWEN.items() if number >= BEGIN]
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return whole(images, _tokenizer(QWEN, additional_special_tokens=names), videos, chat_template=template)


def _template(image: str) -> str:
    """Chat template that puts the family's placeholder, which the processor expands, in front of the text."""
    return (
        "{% for message in messages %}<s>{{ message['role'] }}: "
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "\n"
        "{% elif part['type'] == 'video' %}<video>\n"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )


def _tokenizer(special: dict[str, int], **roles: Any) -> Any:
    free = (number for number in range(VOCABULARY) if number not in special.values())
    vocabulary = special | {character: next(free) for character in CHARACTERS}
    vocabulary |= {f"<reserved_{number}>": number for number in free}
    names = {number: token for token, number in special.items()}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=names[UNKNOWN]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    begin = {} if special is QWEN else {"bos_token": names[BEGIN]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=names[PAD], eos_token=names[END], unk_token=names[UNKNOWN],
        padding_side="left", **begin, **roles,
    )  # fmt: skip
