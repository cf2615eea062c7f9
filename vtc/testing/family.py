"""What a family contributes to the tiny models: how to build one, and raw tensors for its items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.method.layout import Kind

IMAGE, VIDEO, VISION_START, VISION_END, PAD, BOS, VOCABULARY = 120, 121, 122, 123, 0, 1, 128
HIDDEN, LAYERS = 64, 4


@dataclass(frozen=True)
class Piece:
    """One visual item of a prompt: the ids that stand for it, and its tensors by keyword argument.

    Tensors of all items of a batch are joined by the family's `collate`.
    """

    kind: Kind
    ids: list[int]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class TinyModel:
    """A tiny model of one family.

    build: layers -> model. kinds: modalities. piece: (model, kind, generator, item's number in its row, items of its
    kind in the row) -> Piece. collate: (pieces of each row) -> keyword arguments. token_types: pass mm_token_type_ids.
    """

    family: str
    build: Callable[[int], nn.Module]
    kinds: tuple[Kind, ...]
    piece: Callable[[Any, Kind, torch.Generator, int, int], Piece]
    collate: Callable[[list[list[Piece]]], dict[str, Tensor]]
    token_types: bool = False


def text_settings(layers: int) -> dict[str, Any]:
    """Size of every tiny language model."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }


def concatenate(rows: list[list[Piece]]) -> dict[str, Tensor]:
    """Join the pieces' tensors along their first axis, in prompt order."""
    pieces = [piece for row in rows for piece in row]
    names = dict.fromkeys(name for piece in pieces for name in piece.tensors)
    return {name: torch.cat([p.tensors[name] for p in pieces if name in p.tensors]) for name in names}
