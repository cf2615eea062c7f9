"""Processors for models without a checkpoint: the families' own image processors, and a tokenizer of whole words.

Pictures become exactly what the published processors make of them; texts become one token a word.
"""

from __future__ import annotations

from typing import Any

from vtc.cost.shapes import ModelShape
from vtc.eval.tiny.family import SPECIAL, chat_template
from vtc.eval.tiny.processor import build_tokenizer
from vtc.eval.tiny.vocabulary import BEGIN, END, EXTENDED, IMAGE, PAD, TOKEN, VIDEO, VISION_END, VISION_START

TOKENS = {
    "begin": TOKEN[BEGIN], "end": TOKEN[END], "pad": TOKEN[PAD], "image": TOKEN[IMAGE], "video": TOKEN[VIDEO],
    "vision_start": TOKEN[VISION_START], "vision_end": TOKEN[VISION_END],
}  # fmt: skip
"""Token numbers that configurations name."""
QWEN_TEMPLATE = chat_template(f"{VISION_START}{IMAGE}{VISION_END}", f"{VISION_START}{VIDEO}{VISION_END}")


def processor(family: str, shape: ModelShape, config: Any) -> Any:
    """The processor of a model of that family and configuration, left-padding."""
    made = _qwen(family) if family.startswith("qwen") else _crops(family, shape, config)
    made.tokenizer.model_max_length = 10**6
    return made


def _crops(family: str, shape: ModelShape, config: Any) -> Any:
    import transformers as hf

    tokens, template = build_tokenizer(EXTENDED, SPECIAL), chat_template()
    if family == "internvl":
        named = {"start_image_token": VISION_START, "end_image_token": VISION_END, "context_image_token": IMAGE}
        tokens = build_tokenizer(EXTENDED, SPECIAL, **named, video_token=VIDEO)
        size = {"height": 448, "width": 448}
        images = hf.GotOcr2ImageProcessor(crop_to_patches=True, min_patches=1, max_patches=12, size=size)
        return hf.InternVLProcessor(
            images, tokens, hf.InternVLVideoProcessor(size=size), image_seq_length=256, chat_template=template
        )
    if family == "llava-onevision":
        size, points = {"height": 384, "width": 384}, config.image_grid_pinpoints
        return hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=points), tokens,
            hf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=shape.crop_patches,
            vision_feature_select_strategy="full", chat_template=template,
        )  # fmt: skip
    sizes: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    common: dict[str, Any] = {
        "patch_size": 14, "vision_feature_select_strategy": "default", "image_token": IMAGE,
        "chat_template": template, "num_additional_image_tokens": 1,
    }  # fmt: skip
    if family == "llava-next":
        images = hf.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
        return hf.LlavaNextProcessor(images, tokens, **common)
    return hf.LlavaProcessor(hf.CLIPImageProcessor(**sizes), tokens, **common)


def _qwen(family: str) -> Any:
    import transformers as hf

    tokens = build_tokenizer(EXTENDED, SPECIAL, image_token=IMAGE, video_token=VIDEO)
    if family == "qwen3-vl":
        images = hf.Qwen2VLImageProcessor(patch_size=16, size=_up_to(32))
        return hf.Qwen3VLProcessor(images, tokens, hf.Qwen3VLVideoProcessor(), chat_template=QWEN_TEMPLATE)
    images = hf.Qwen2VLImageProcessor(size=_up_to(28))
    both = images, tokens, hf.Qwen2VLVideoProcessor()
    made = hf.Qwen2VLProcessor if family == "qwen2-vl" else hf.Qwen2_5_VLProcessor
    return made(*both, chat_template=QWEN_TEMPLATE)


def _up_to(side: int) -> dict[str, int]:
    """Sizes up to the 16384 tokens, each `side` pixels wide, that the published processors admit."""
    return {"shortest_edge": 56**2, "longest_edge": 16384 * side**2}
