"""A CLIP whose vision half is the tower of a tiny model, as a checkpoint folder, and methods that need one."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from typing import Any

import torch
import transformers
from tokenizers import processors

from vtc import adapters
from vtc.errors import unknown_name
from vtc.method.base import Compressor
from vtc.testing.models import TINY_MODELS, tiny_model
from vtc.testing.processors import BEGIN, END, TINY_TEXT, tiny_processor, tiny_tokenizer

WIDTH, LENGTH = 24, 40
"""Of the features that are compared; tokens of a text, which are characters."""


@functools.cache
def tiny_pair(name: str) -> str:
    """The folder of a CLIP with the vision tower of the tiny model `name` and a random text tower.

    Raises UnknownName for models whose tower is of another kind.

    >>> tiny_pair("llava-clip") == tiny_pair("llava-clip")  # saved once per process
    True
    """
    model = tiny_model(name)
    if not adapters.of(model).spec.clip:
        raise unknown_name("pair", name, [other for other in TINY_MODELS if adapters.of(tiny_model(other)).spec.clip])
    text = {**TINY_TEXT, "max_position_embeddings": LENGTH}
    vision = model.config.vision_config.to_dict()
    clip: Any = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=WIDTH)
    )
    generator = torch.Generator().manual_seed(7)
    for weight in clip.parameters():
        if weight.ndim > 1:
            weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    tower = model.model.vision_tower
    clip.vision_model.load_state_dict(getattr(tower, "vision_model", tower).state_dict())
    words = tiny_tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    words.padding_side = "right"
    folder = tempfile.mkdtemp(prefix="vtc-pair-")
    clip.save_pretrained(folder)
    transformers.CLIPProcessor(tiny_processor("llava-clip").image_processor, words).save_pretrained(folder)
    return folder


def with_tiny_pair(method: Compressor, name: str) -> tuple[Compressor, dict[str, Any]]:
    """The method with a pair for the tiny model `name` where it needs one and has none, and what else to attach with.

    Its hyper-parameter for that is called `pair`, as that of `vtc.method.pairs.PairedCompressor`.
    """
    pairs = method.plan(adapters.of(tiny_model(name)).spec).needs.pairs
    if None in pairs:
        method = dataclasses.replace(method, pair=tiny_pair(name))  # type: ignore[call-arg]
    return method, {"processor": tiny_processor(name)} if pairs else {}
