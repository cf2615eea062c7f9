"""Tokenizer, image processor and chat template of the small model, built from the closed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from vtc.eval.tiny.batches import PIXEL_MEAN, PIXEL_STD
from vtc.eval.tiny.scenes import PATCH, SIZE
from vtc.eval.tiny.vocabulary import ASSISTANT, BEGIN, END, IMAGE, PAD, TOKEN, UNKNOWN, USER, VOCABULARY

MAX_LENGTH = 1024  # tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(
    vocabulary: Sequence[str] = VOCABULARY,
    special: Sequence[str] = (),
    *,
    end: str = "",
    padding_side: str = "left",
    **named: str,
) -> Any:
    """A word-level tokenizer: lower case, punctuation as words, `<s>` in front, `end` behind.

    `special` are further words that are never cut or lower-cased, `named` attributes of the tokenizer such as
    ``image_token``.
    """
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(r"[?.,]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.WhitespaceSplit()])
    around = [(each, TOKEN[each]) for each in (BEGIN, end) if each]
    core.post_processor = processors.TemplateProcessing(f"{BEGIN} $A {end}".rstrip(), None, around)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side=padding_side,
        additional_special_tokens=[IMAGE, USER, ASSISTANT, *special],
        model_max_length=MAX_LENGTH,
        **({"model_specific_special_tokens": named} if named else {}),
    )


def build_processor() -> Any:
    """Tokenizer, CLIP image processor for 168 px and the chat template of LLaVA-1.5."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        resample=3,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
