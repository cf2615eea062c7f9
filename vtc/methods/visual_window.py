"""Attention among visual tokens within a window of their picture, or none of it (arXiv:2502.02458, 2410.06169)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.errors import UnsupportedCall, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.layout import VisualItem
from vtc.method.registry import register
from vtc.method.schedule import DEPTH, scaled_layer
from vtc.ops.grid import frame_lines


@register
class VisualWindow(Compressor):
    """Let visual tokens attend to the visual tokens in a small window around them alone, or to none but themselves.

    Acts inside the LLM, on attention masks; training-free, ranks nothing, reads nothing, drops nothing. From layer l on
    a visual row attends to text in front of it, to itself, and of the visual rows in front of it to those of its own
    frame that lie in the w x w window around it: |row - row'| <= (w - 1) / 2, columns likewise. Text rows attend to
    everything in front of them, as ever. w = 1 is the mask of NAAViT (arXiv:2502.02458): no visual self-attention. w =
    5 is the neighbour-aware attention of YOPO (arXiv:2410.06169), whose code for Qwen has w = 1.

    Saves nothing as it is: every token enters every layer and every KV cache, so that retention and costs are those of
    the untouched model, and attention runs over the whole square with a mask. It shows what a model that was not
    trained for it makes of such attention. No retention or keep is given.

    window: w, odd. layer: l, of an LLM of 32 layers, scaled to the depth of others. Rasters are those of the tokens:
    the overview of a tiled picture, the map that its tiles form, every frame of a video.

    Departures from the paper and its code: both papers train models for their masks. Attention stays causal, where
    YOPO's code lets a token see its whole window; newline tokens see no other visual token and are seen by none; nobody
    sees into another picture, but a picture in a later turn of a dialogue sees what earlier turns left in the cache.
    SAISA, whose projectors feed each layer, is `saisa`. Of YOPO, cuts of heads and neurons are not here; its cut of
    layers is `withdraw`.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("visual_window", window=5, layer=2).plan(llava).stages, vtc.create("visual_window").needs_budget
    ((2,), False)
    """

    window: int = 1
    layer: int = 0

    name: ClassVar[str] = "visual_window"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.window % 2 == 0:
            raise VTCError(
                f"window={self.window!r} has no middle; pass an odd number: 1 for no visual token but itself, 5 as YOPO"
            )
        if not 0 <= self.layer < DEPTH:
            raise VTCError(f"layer={self.layer!r} is none of layers 0 to {DEPTH - 1} of {DEPTH}; the papers begin at 0")

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((scaled_layer(self.layer, model),), Needs(), "preserve")

    def least_retention(self, model: ModelSpec) -> float:
        return 0.0

    def select(self, view: StageView) -> Selection:
        items = view.items
        places = items.token[..., None] if self.window == 1 else _places(view, self.window)
        return Selection(items.mask, counts=items.counts, near=2 * places / self.window)


def _places(view: StageView, window: int) -> Tensor:
    """[I, N, 3] row, column and frame of each token; frames are `window` apart."""
    layouts = view.items.layouts
    known = {id(layout): _of_item(layout, window) for layout in layouts}
    table = pad_sequence([known[id(layout)] for layout in layouts], batch_first=True)
    places = table.to(view.device, non_blocking=True)
    return places.gather(1, view.items.token[..., None].expand(-1, -1, places.shape[2]))


def _of_item(layout: VisualItem, window: int) -> Tensor:
    """The same by the token's number in its item, on the host; zeros for newlines."""
    if not layout.regions:
        raise UnsupportedCall(
            f"some tokens of this {layout.kind} lie in no raster, so there is no window around them; pass window=1"
        )
    row, col, _, _ = frame_lines(layout.regions)
    frame = ((row == 0) & (col == 0)).cumsum(0)
    places = torch.zeros(layout.n_tokens, 3, dtype=torch.long)
    return places.masked_scatter(~layout.newline[:, None], torch.stack([row, col, window * frame], dim=1))
