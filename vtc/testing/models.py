"""Tiny random models of every family, built from configurations alone, and raw inputs for them.

Weights are drawn much larger than usual, so that attention is far from uniform in every tower and an error in masks or
positions moves the logits by whole units instead of drowning.
"""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.method.layout import Kind
from vtc.testing.family import LAYERS, PAD, Piece, TinyModel

Part = int | Kind
"""A piece of a prompt: so many random text tokens, or one visual item."""


def _discover() -> dict[str, TinyModel]:
    """The MODELS of every module `tiny_*` of this package."""
    package = importlib.import_module("vtc.testing")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith("tiny_"))
    return {k: v for name in names for k, v in importlib.import_module(f"vtc.testing.{name}").MODELS.items()}


TINY_MODELS: dict[str, TinyModel] = _discover()


def tiny_model(name: str, *, attn_implementation: str = "sdpa", layers: int = LAYERS, seed: int = 0) -> Any:
    """A tiny model `name` of your own, in float32 on the CPU; the same seed gives the same weights."""
    return copy.deepcopy(_built(name, attn_implementation, layers, seed))


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _built(name: str, attn_implementation: str, layers: int, seed: int) -> Any:
    """The model that copies are made of: building it takes three times as long."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: Any = TINY_MODELS[name].build(layers).eval().float()
    finally:
        torch.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed + 1)
    for key, weight in model.named_parameters():
        draw = torch.randn(weight.shape, generator=generator)
        if "class_embedding" in key or "embed" in key:
            weight.data.copy_(0.5 * draw)
        elif weight.ndim >= 2:
            inputs = weight[0, 0] if "experts" in key else weight[0]  # experts' matrices are stacked
            weight.data.copy_(draw * (1.6 / inputs.numel() ** 0.5))
        elif key.endswith(("bias", "newline", "token")):
            weight.data.copy_(0.2 * draw)
        elif "lambda_" in key:
            weight.data.fill_(1.0)
    model.set_attn_implementation(attn_implementation)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def tiny_inputs(
    name: str,
    layout: Sequence[Sequence[Part]],
    *,
    seed: int = 0,
    padding: Literal["left", "right"] = "left",
    extra: int = 0,
    only: int | None = None,
    model: Any = None,
) -> dict[str, Tensor]:
    """Inputs for `tiny_model(name)`: one row per entry of `layout`, each a list of parts, padded to one length.

    extra: padding tokens added to every row. only: build just this row of the layout, without padding. Text and pixels
    of a row depend on `seed` and its number only. model: where the family has to ask the model for token counts, an
    instance that saves building one.

    Example: ``tiny_inputs("llava-clip", [[3, "image", 5], [2, "image", 9, "image"], [7]])``
    """
    family = TINY_MODELS[name]
    model = model if model is not None else tiny_model(name)
    chosen = range(len(layout)) if only is None else [only]
    rows, pieces = zip(*(_row(family, model, layout[row], 1000 * seed + row) for row in chosen), strict=True)
    length = max(len(ids) for ids, _ in rows) + (extra if only is None else 0)
    inputs = {
        "input_ids": torch.full((len(rows), length), PAD),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
    }
    types = torch.zeros(len(rows), length, dtype=torch.int)
    for row, (ids, kinds) in enumerate(rows):
        place = slice(length - len(ids), length) if padding == "left" else slice(0, len(ids))
        inputs["input_ids"][row, place] = torch.tensor(ids)
        inputs["attention_mask"][row, place] = 1
        types[row, place] = torch.tensor(kinds, dtype=torch.int)
    if family.token_types:
        inputs["mm_token_type_ids"] = types
    if any(pieces):
        inputs |= family.collate(list(pieces))
    return inputs


def _row(
    family: TinyModel, model: Any, parts: Sequence[Part], seed: int
) -> tuple[tuple[list[int], list[int]], list[Piece]]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    types: list[int] = []
    pieces: list[Piece] = []
    placeholders = {kind: getattr(model.config, f"{kind}_token_id", None) for kind in family.kinds}
    for part in parts:
        if isinstance(part, int):
            new = torch.randint(5, 110, (part,), generator=generator).tolist()
        else:
            pieces.append(family.piece(model, part, generator, len(pieces), parts.count(part)))
            new = pieces[-1].ids
        ids += new
        types += [1 if i == placeholders.get("image") else 2 if i == placeholders.get("video") else 0 for i in new]
    return (ids, types), pieces
