"""Expediting ViT: later blocks run on clusters of patches, and every patch gets a row again (arXiv:2210.01035)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vtc.errors import UnsupportedCall, UnsupportedMethod, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Plan, Selection, StageView
from vtc.method.parts import inside_plan, merged_inside
from vtc.method.registry import register
from vtc.ops.grid import cell_centres, output_grid
from vtc.ops.select import top_k


@register
class ExpeditingViT(Compressor):
    """Cluster the patches in front of one block, run the rest on the clusters, and rebuild all patches at the end.

    Training-free, text-agnostic; inside the encoder alone, for encoders that allow it. The clusters form a small raster
    and begin as means of its cells. Five times, every patch is shared among the clusters in a window of 5 x 5 cells
    around its own, ``softmax(-temperature |x - c|^2)``, and every cluster becomes the mean of the patches, weighted by
    their shares. Behind the last block, patch j becomes the mean of the refined clusters with the weights
    ``exp(-temperature |x_j - c_i|^2)`` of the 20 largest, from the rows and clusters before the blocks between.

    clusters: rows and columns of the small raster; it then takes no budget. Otherwise the raster closest in shape to
    the picture's that the budget pays for: retention and keep are about the blocks behind the clustering. layer: the
    block in front of which patches are clustered, by default a quarter of the way up (8 of 32, as released for SAM).
    reconstruct: False leaves the clusters as they are, each at the centre of its cell, which makes fewer tokens for
    whatever follows. temperature, iterations, window, neighbours: as above. norm: weights of the reconstruction sum
    to one ("sum"), or their squares do ("l2", as in the released code for SAM).

    Departures from the paper and its code: for encoders with a class token as well, which stays apart; the budget;
    reconstruct=False is ours. A budget that is no product of two sides is undershot. The scale of features, on which
    the temperature acts, is the encoder's.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 encoder layers
    >>> [stage.layer for stage in vtc.create("expediting_vit", layer=8).plan(llava).stages]
    [8, 23]
    """

    clusters: tuple[int, int] | None = None
    layer: int | None = None
    reconstruct: bool = True
    temperature: float = 0.01
    iterations: int = 5
    window: int = 5
    neighbours: int = 20
    norm: Literal["sum", "l2"] = "sum"

    name: ClassVar[str] = "expediting_vit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and min(self.clusters) < 1:
            raise VTCError(f"clusters={self.clusters} is no raster; write its rows and columns, such as (9, 9)")
        if self.window < 1 or self.window % 2 == 0 or min(self.neighbours, self.iterations) < 1:
            raise VTCError(
                f"window={self.window}, neighbours={self.neighbours}, iterations={self.iterations} cluster nothing; "
                "use an odd window and at least one of each, the paper uses 5, 20 and 5"
            )

    @property
    def needs_budget(self) -> bool:
        """False where the raster of clusters is given."""
        return self.clusters is None

    def first(self, model: ModelSpec) -> int:
        """The block in front of which patches are clustered."""
        return max(1, (model.feature_layer + 1) // 4) if self.layer is None else self.layer

    def plan(self, model: ModelSpec) -> Plan:
        layer, blocks = self.first(model), model.feature_layer + 1
        if not 0 <= layer <= blocks - self.reconstruct:
            raise UnsupportedMethod(
                f"layer={self.layer}: this {model.family} encoder has blocks 0 to {blocks - 1} up to its features; "
                "cluster in front of one of them"
            )
        layers = (layer, blocks) if self.reconstruct else (layer,)
        return inside_plan("'expediting_vit'", model, layers=layers, restores=self.reconstruct)

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, EncoderStage)
        items = view.items
        if view.stage.layer != self.first(view.model):
            before, centres = view.memory.pop(self, (None, None))
            if before is None:
                return None
            return Selection(items.mask, restored=self.rebuilt(view.tokens, before, centres))
        grid = items.layouts[0].grid
        if grid is None or items.counts[0] != items.layouts[0].n_tokens:
            raise UnsupportedCall("expediting_vit needs pictures whose patches form a full raster; use another method")
        height, width = grid[1:]
        small = self.clusters or output_grid(height, width, view.keep[0])
        if small[0] > height or small[1] > width:
            raise UnsupportedMethod(
                f"clusters={self.clusters} are more than the {height} x {width} patches of this encoder; give fewer"
            )
        if small == (height, width):
            return None
        centres = self.clustered(view.tokens.float(), (height, width), small)
        if self.reconstruct:
            view.memory[self] = view.tokens, centres
        place = cell_centres(grid, (1, *small), centres.device).expand(len(items), -1)
        return merged_inside(view, centres.to(view.tokens.dtype), place, None)

    def clustered(self, tokens: Tensor, grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
        """[G, h * w, D] clusters of the tokens [G, H * W, D] of a raster H x W, for a small one h x w."""
        pooled = functional.adaptive_avg_pool2d(tokens.transpose(1, 2).reshape(len(tokens), -1, *grid), small)
        centres = pooled.flatten(2).transpose(1, 2)
        reach = self.window // 2
        lines = []
        for length, cells in zip(grid, small, strict=True):
            own = torch.arange(length, device=tokens.device) * cells // length
            lines.append((own[:, None] - torch.arange(cells, device=tokens.device)).abs() <= reach)
        near = (lines[0][:, None, :, None] & lines[1][None, :, None, :]).flatten(2).flatten(0, 1)
        far = ~near
        origin = tokens.mean(1, keepdim=True)  # what all share would only cost digits
        tokens, centres = tokens - origin, centres - origin
        for _ in range(self.iterations):
            share = (self.temperature * _nearness(tokens, centres)).masked_fill_(far, -torch.inf).softmax(-1)
            total = share.sum(1)[..., None].clamp(min=torch.finfo(torch.float32).tiny)
            centres = share.transpose(1, 2) @ tokens / total
        return centres + origin

    def rebuilt(self, refined: Tensor, before: Tensor, centres: Tensor) -> Tensor:
        """[G, t, D] rows of all tokens `before` [G, t, D] from the `refined` clusters [G, K, D] that were `centres`."""
        count = min(self.neighbours, centres.shape[1])
        before = before.float()
        origin = before.mean(1, keepdim=True)
        near = self.temperature * _nearness(before - origin, centres - origin)
        flat = near.flatten(0, 1)
        some = top_k(flat, torch.full((len(flat),), count, device=flat.device)).view_as(near)
        weight = (near - near.amax(-1, keepdim=True)).exp() * some
        total = weight.sum(-1, keepdim=True) if self.norm == "sum" else weight.norm(dim=-1, keepdim=True)
        return ((weight / total) @ refined.float()).to(refined.dtype)


def _nearness(tokens: Tensor, centres: Tensor) -> Tensor:
    """[G, t, K] how much nearer than the origin, in squares, a centre [G, K, D] is to a token [G, t, D]."""
    return torch.baddbmm(centres.square().sum(-1)[:, None], tokens, centres.transpose(1, 2), beta=-1, alpha=2)
