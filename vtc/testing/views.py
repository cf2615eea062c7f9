"""Views of made-up items of any size, so that a method can be compared with a plain loop without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.batch.context import VisionContext
from vtc.batch.items import build
from vtc.method.base import ModelSpec, Needs, Rows, StageView
from vtc.method.budget import Budget
from vtc.method.layout import Kind, VisualItem
from vtc.method.plan import grouped
from vtc.method.states import States

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)


@dataclass(frozen=True, eq=False)
class Entries:
    """What the cache of a layer holds of the items, as `StageView.cached` gives it. keys, values: [I, H, N, W]."""

    keys: Tensor
    values: Tensor

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@dataclass(frozen=True)
class Shape:
    """An item: rasters of (frames, rows, columns) one behind the other, after each row of the last a newline if asked.

    The frames of all rasters are its crops. tiling: (rows, columns) of the crops behind the first, the thumbnail. kind:
    a video has one raster.
    """

    regions: tuple[tuple[int, int, int], ...]
    newlines: bool = False
    tiling: tuple[int, int] | None = None
    kind: Kind = "image"

    def item(self) -> VisualItem:
        """The geometry of such an item."""
        crop: list[int] = []
        row: list[float] = []
        col: list[float] = []
        newline: list[bool] = []
        first = 0
        for frames, rows, columns in self.regions:
            ends = self.newlines and (frames, rows, columns) == self.regions[-1]
            for f in range(frames):
                for r in range(rows):
                    width = columns + ends
                    crop += [first + f if c < columns else -1 for c in range(width)]
                    row += [float(r)] * width
                    col += [float(c) for c in range(width)]
                    newline += [c == columns for c in range(width)]
            first += frames
        single = len(self.regions) == 1 and not self.newlines
        return VisualItem(
            kind=self.kind,
            n_tokens=len(crop),
            crop=torch.tensor(crop),
            row=torch.tensor(row),
            col=torch.tensor(col),
            newline=torch.tensor(newline),
            n_crops=first,
            crop_grid=self.regions[0][1:],
            newlines=sum(newline),
            grid=self.regions[0] if single else None,
            regions=self.regions,
            thumbnail=None if self.tiling is None else 0,
            tiling=self.tiling,
        )


def raster(height: int, width: int, frames: int = 1) -> Shape:
    """An item of one raster."""
    return Shape(((frames, height, width),))


def make_view(
    shapes: Sequence[Any],
    *,
    vision: dict[Any, Sequence[Tensor]] | None = None,
    llm: dict[Any, Tensor] | None = None,
    stage: Any = 0,
    spec: ModelSpec = CLIP_L,
    seed: int = 0,
    width: int = 6,
    entries: tuple[int, int] | None = None,
    **budget: Any,
) -> StageView:
    """Build the view of a batch that holds items of the given shapes, up to two in a row, text around them.

    shapes: (rows, columns) or Shape. vision: layer, or (layer, reading) -> one [n] or [n, C] tensor per item. llm:
    (layer, reading) -> [..., B, L]. budget: retention= or keep=. width: random numbers of each hidden row. entries: KV
    heads, and random numbers of each key and value in the layer's cache; None for no cache.
    """
    generator = torch.Generator().manual_seed(seed)
    items = [(each if isinstance(each, Shape) else raster(*each)).item() for each in shapes]
    context = VisionContext("image", items, torch.randint(2**62, (len(items),), generator=generator), lambda v: [])
    rows = [items[first : first + 2] for first in range(0, len(items), 2)]
    length = max(5 + sum(item.n_tokens + 1 for item in row) for row in rows)
    visual, valid = torch.zeros(2, len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = length - sum(item.n_tokens + 1 for item in row) - 3
        valid[index, place - 2 :] = True
        for item in row:
            visual[index, place : place + item.n_tokens] = True
            place += item.n_tokens + 1
    table, separators = build(visual[None], visual.sum(1).tolist(), [context], {"image": 0})
    default = Rows.CLS if spec.has_cls else Rows.RECEIVED
    recorded = {key if isinstance(key, tuple) else (key, default): v for key, v in (vision or {}).items()}
    pad = torch.nn.utils.rnn.pad_sequence
    cached = None
    if entries is not None:
        heads, wide = entries
        shape = len(items), heads, table.mask.shape[1], wide
        cached = Entries(*(torch.randn(shape, generator=generator) for _ in range(2)))
    return StageView(
        stage=stage,
        model=spec,
        budget=Budget(**budget) if budget else None,
        items=table,
        separators=separators,
        states=States(torch.randn(len(rows), length, width, generator=generator)),
        visual=visual,
        valid=valid,
        prompt=valid,
        text=valid & ~visual,
        fingerprint=context.fingerprint[table.source],
        vision_rows={key: pad(list(values), batch_first=True) for key, values in recorded.items()},
        llm_rows=llm or {},
        needs=Needs(grouped(list(recorded)), grouped(list(llm or {}))),
        cached=cached,
    )
