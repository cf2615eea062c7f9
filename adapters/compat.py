"""Differences between the supported transformers versions, 5.17 and later, in one place.

transformers is imported where a model is at hand: tables of families and methods are made without it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from vtc.batch.context import VisionContext
from vtc.errors import UnsupportedCall
from vtc.method.layout import Kind

TRANSFORMERS = version("transformers")
EXPANDS_IN_ORDER = Version(TRANSFORMERS) >= Version("5.20.0.dev0")
"""generate() repeats a prompt's images as a group for its beams; before, it repeated them one by one."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Progress bars of transformers only where a person watches."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def media(kind: Kind, arguments: dict[str, Any]) -> Tensor:
    """The pixels among the arguments of a get_{kind}_features call; up to 5.17 videos had the name of images."""
    names = ("pixel_values_videos", "pixel_values") if kind == "video" else ("pixel_values",)
    found = [arguments[name] for name in names if name in arguments]
    pixels: Tensor = found[0]
    return pixels


def attention_function_of(attention: nn.Module) -> nn.Module:
    """The module that looks the attention function up: DINOv2's lay inside the one of its name in older versions."""
    inner: nn.Module = getattr(attention, "attention", attention)
    return inner


def takes_mask(layer: nn.Module) -> bool:
    """True when a tower's layer can hide the padding of shorter crops; DINOv2's could not in older versions."""
    return "attention_mask" in _parameters(type(layer).forward)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def refuse_other_layer(arguments: dict[str, Any], own: Any) -> None:
    """Raise UnsupportedCall where a feature call asks for another encoder layer than the configuration's."""
    given = arguments.get("vision_feature_layer")
    if given is not None and given != own:
        raise UnsupportedCall(
            f"vision_feature_layer={given} was passed to this call, the method was planned for the configuration's "
            f"{own}; set model.config.vision_feature_layer before vtc.compress instead"
        )


def expands_in_order(model: Any) -> bool:
    """True when beams get a prompt's images in their order; some families always had an expansion of their own."""
    from transformers import GenerationMixin

    own = type(model)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation
    return EXPANDS_IN_ORDER or own


def refuse_wrong_order(context: VisionContext, placeholders: Tensor) -> None:
    """Raise UnsupportedCall where an old generate() handed the images of one prompt to the wrong beams.

    placeholders: [B, S] bool. Before transformers 5.20 the images A, B of a prompt reach its two beams as A, A and
    B, B. This reads keys and counts on the host; newer versions return at once.
    """
    if EXPANDS_IN_ORDER:
        return
    keys: list[int] = context.fingerprint.tolist()
    ends = list(accumulate(item.n_tokens for item in context.items))
    sizes: list[int] = placeholders.sum(1).tolist()
    rows = list(accumulate(sizes))
    if not ends or ends[-1] != rows[-1]:
        return
    held = [
        tuple(key for key, end in zip(keys, ends, strict=True) if row - size < end <= row)
        for row, size in zip(rows, sizes, strict=True)
    ]
    for expand in range(2, len(rows) + 1):
        repeated = len(rows) % expand == len(keys) % expand == 0 and _in_groups(keys, expand)
        if repeated and _in_groups(sizes, expand) and not _in_groups(held, expand):
            raise UnsupportedCall(
                f"generate() of transformers {TRANSFORMERS} gives the {context.kind}s of one prompt to the "
                "wrong beams or returned sequences, with or without compression; use transformers 5.20 or later, or "
                f"one {context.kind} (one tile) per prompt"
            )


@cache
def repeats_hooks() -> bool:
    """True where gradient checkpointing runs a layer's hooks again in the backward pass; later they stay outside."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # brings in half of transformers

    return "__call__" in vars(GradientCheckpointingLayer)


def checkpoints(language_model: Any) -> bool:
    """True when gradient checkpointing is at work in the LLM: then its layers run without a cache."""
    return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in language_model.layers)


def check_checkpointing(layer: Any) -> None:
    """Raise UnsupportedCall where the backward pass would run this layer without what its hook does."""
    if layer.training and getattr(layer, "gradient_checkpointing", False) and repeats_hooks():
        raise UnsupportedCall(
            f"gradient checkpointing of transformers {TRANSFORMERS} recomputes a layer together with its "
            "hooks, after the call they belong to has ended; use a later version, a method that acts only before the "
            "LLM, or no checkpointing"
        )


def _in_groups(values: Sequence[Any], size: int) -> bool:
    """True when every `size` neighbours are equal."""
    return all(value == values[place - place % size] for place, value in enumerate(values))
