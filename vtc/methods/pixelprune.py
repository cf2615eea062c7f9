"""PixelPrune: patches whose pixels a neighbour predicts never enter the vision encoder (arXiv:2604.00886)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import UnsupportedCall, VTCError
from vtc.method.base import PIXELS, Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.parts import inside_plan
from vtc.method.registry import register
from vtc.ops.host import put
from vtc.ops.select import top_k

Metric = Literal["max", "mae", "rmse"]


@register
class PixelPrune(Compressor):
    """Drop the patches of a picture that equal what their neighbours predict, before the first block of the encoder.

    Training-free, text-agnostic; for encoders that may run on fewer patches. Of a patch X with A on its left, B above
    it and C above A, the prediction is B where C equals A but not B (an edge runs down), and A otherwise; in the first
    row A, in the first column B. X stays where it differs from its prediction, and the first patch always. Two patches
    are equal where the distance of their pixels is at most `tau`. With tau=0 the picture could be rebuilt from what
    stays: flat areas of documents and screens go, photographs keep nearly everything. How many stay is the picture's
    affair.

    tau: a patch that goes counts as its prediction when its neighbours are looked at, so that errors do not add up; 0
    compares for equality alone. None takes a budget instead and keeps the patches that differ most from their
    predictions (of equal ones). metric: distance of pixels, the largest of their differences ("max"), their mean
    ("mae") or the root of their mean square ("rmse").

    Departures from the paper and its code: a patch is the unit where each becomes a token of the LLM; where squares of
    patches do (2 x 2 in Qwen-VL, for which the code was written, and in InternVL), these are compared and leave as a
    whole. The frames of a video are pictures of their own. tau counts in pixels as the processor normalises them, in
    the precision of the encoder, instead of the range 0 to 1; the budget is ours. With tau above 0 the patches are
    visited diagonal by diagonal, which gives the same as one by one.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 encoder layers
    >>> vtc.create("pixelprune").plan(llava).stages
    (EncoderStage(layer=0),)
    """

    tau: float | None = 0.0
    metric: Metric = "max"

    name: ClassVar[str] = "pixelprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not self.tau >= 0:
            raise VTCError(f"tau={self.tau} is no distance; write 0 for equal pixels alone, or None to give a budget")

    @property
    def needs_budget(self) -> bool:
        """True where no distance decides."""
        return self.tau is None

    def plan(self, model: ModelSpec) -> Plan:
        plan = inside_plan("'pixelprune'", model, layers=(0,))
        return dataclasses.replace(plan, needs=Needs({PIXELS: Rows.PIXELS}))

    def select(self, view: StageView) -> Selection:
        assert isinstance(view.stage, EncoderStage)
        items, grid = view.items, view.items.layouts[0].grid
        if grid is None or items.counts[0] != items.layouts[0].n_tokens:
            raise UnsupportedCall("pixelprune needs pictures whose patches form a full raster; use another method here")
        cells = view.vision_attention(PIXELS, Rows.PIXELS).float()
        cells = cells.view(len(items), *grid[1:], -1)
        if self.tau is not None:
            keep = self.scan(cells, self.tau) if self.tau else self.residuals(cells) > 0
            return Selection(keep.flatten(1))
        rest = self.residuals(cells).flatten(1)
        return Selection(top_k(rest, put(view.keep, rest.device)), counts=view.keep)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Of the pixels along the last axis."""
        apart = (one - other).abs()
        if self.metric == "max":
            return apart.amax(-1)
        return apart.mean(-1) if self.metric == "mae" else apart.square().mean(-1).sqrt()

    def residuals(self, cells: Tensor) -> Tensor:
        """[I, R, C] distance of every patch from its prediction, infinite for the first; cells: [I, R, C, pixels]."""
        left = self.distance(cells[:, :, 1:], cells[:, :, :-1])
        above = self.distance(cells[:, 1:], cells[:, :-1])
        down = (above[:, :, :-1] == 0) & (left[:, :-1] != 0)
        rest = cells.new_full(cells.shape[:3], torch.inf)
        rest[:, 0, 1:], rest[:, 1:, 0] = left[:, 0], above[:, :, 0]
        rest[:, 1:, 1:] = torch.where(down, above[:, :, 1:], left[:, 1:])
        return rest

    def scan(self, cells: Tensor, tau: float) -> Tensor:
        """[I, R, C] patches that stay, each compared with what its neighbours count as."""
        height, width = cells.shape[1:3]
        seen, stays = cells.clone(), torch.ones_like(cells[..., 0], dtype=torch.bool)
        for diagonal in range(1, height + width - 1):
            first, last = max(0, diagonal - width + 1), min(height - 1, diagonal)
            row = torch.arange(first, last + 1, device=cells.device)
            column = diagonal - row
            before, over = (column - 1).clamp(min=0), (row - 1).clamp(min=0)
            a, b, c = seen[:, row, before], seen[:, over, column], seen[:, over, before]
            down = (self.distance(c, a) <= tau) & (self.distance(c, b) > tau)
            down = ((down & (row > 0)) | (column == 0))[..., None]
            guess = torch.where(down, b, a)
            own = cells[:, row, column]
            keep = self.distance(own, guess) > tau
            stays[:, row, column] = keep
            seen[:, row, column] = torch.where(keep[..., None], own, guess)
        return stays
