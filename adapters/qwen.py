"""What the Qwen-VL families share: one packed sequence of patches, merging of neighbours, multi-axis positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.adapters.compat import media
from vtc.adapters.shapes import llm_shape
from vtc.batch.context import VisionContext
from vtc.cost.shapes import Encoded, ModelShape, ProjectorShape, TowerShape
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind, VisualItem
from vtc.ops.grid import Grid
from vtc.ops.hashing import fingerprint


class QwenVLAdapter(Adapter):
    """Base of the Qwen-VL families.

    model
    ├── visual .blocks[i].attn, .merger
    └── language_model .layers[i].self_attn
    lm_head

    The encoder runs the patches of all items as one sequence [P, C], frame by frame, in which every `merge` x `merge`
    neighbours follow one another; attention stays inside a frame. The merger makes one LLM token of each such group.
    """

    modalities: ClassVar[tuple[Kind, ...]] = ("image", "video")
    towers: ClassVar[tuple[str, ...]] = ("ViT",)

    @property
    def packed(self) -> bool:
        return True

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return list(self.backbone.visual.blocks)

    @property
    def vision_attention(self) -> Sequence[nn.Module]:
        return [block.attn for block in self.vision_layers]  # type: ignore[misc]

    @property
    def projector(self) -> nn.Module:
        return self.backbone.visual.merger  # type: ignore[no-any-return]

    @property
    def spec(self) -> ModelSpec:
        depth = self.model.config.vision_config.depth
        return ModelSpec(
            family=self.family,
            vision_layers=depth,
            feature_layer=depth - 1,
            has_cls=False,
            full_attention_layers=self.full_attention_layers(depth),
            llm_layers=self.model.config.text_config.num_hidden_layers,
            mrope=True,
            encoder_stages=True,
            packed=True,
            joins=True,
            width=self.model.config.text_config.hidden_size,
            vision_width=self.tower(self.model.config.vision_config).hidden,
        )

    @classmethod
    def tower(cls, vision: Any) -> TowerShape:
        """The tower's sizes, under the names most of the families give them."""
        patch = vision.temporal_patch_size * vision.in_channels * vision.patch_size**2
        return TowerShape(vision.hidden_size, vision.intermediate_size, vision.depth, vision.hidden_size, patch)

    @classmethod
    def window(cls, vision: Any) -> int | None:
        """Patches along a side of an attention window, None where there are none."""
        return None

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        vision, llm = config.vision_config, llm_shape(config)
        tower, merged = cls.tower(vision), vision.spatial_merge_size**2
        deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        wide = tower.hidden * merged
        projector = ProjectorShape(wide, wide, llm.hidden, merged, copies=1 + deep)
        return ModelShape("", llm, tower, projector, None, 1024, window=cls.window(vision), family=cls.family)

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded:
        shape, total = self.shape(self.model.config), Encoded()
        for kind in self.modalities:
            grids = inputs.get(f"{kind}_grid_thw")
            for frames, height, width in [] if grids is None else grids.tolist():
                total += shape.frames(frames, height, width)
        return total

    def unit(self, kind: Kind) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    @property
    def projectors(self) -> Sequence[nn.Module]:
        return (self.projector, *getattr(self.backbone.visual, "deepstack_merger_list", ()))

    @property
    def patch_source(self) -> nn.Module | None:
        return self.backbone.visual.patch_embed  # type: ignore[no-any-return]

    def packing(self, kind: Kind, arguments: dict[str, Any]) -> tuple[list[tuple[int, int]], Tensor | None]:
        table: Tensor = arguments[f"{kind}_grid_thw"]
        merge = self.unit(kind)
        frames = [(height // merge, width // merge) for t, height, width in table.tolist() for _ in range(t)]
        return frames, self.raster_order(table)

    def with_rows(self, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cosine, sine = kwargs["position_embeddings"]
        marks = torch.zeros(len(cosine) + 1, dtype=torch.int32, device=rows.device)
        before = marks.index_fill(0, rows + 1, 1).cumsum(0, dtype=torch.int32)  # rows left in front of each place
        segments = torch.unique_consecutive(before[kwargs["cu_seqlens"].long()])
        less = {"cu_seqlens": segments, "position_embeddings": (cosine[rows], sine[rows])}
        return args, {name: value for name, value in kwargs.items() if name != "max_seqlen"} | less

    def full_attention_layers(self, depth: int) -> tuple[int, ...]:
        """Encoder layers in which a patch sees its whole frame."""
        return tuple(range(depth))

    def raster_order(self, grids: Tensor) -> Tensor | None:
        """[P / merge²] place in the encoder's sequence of each token in raster order, None where these are the same.

        grids: [I, 3] frames, rows and columns of patches.
        """
        return None

    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        pixels = media(kind, arguments)
        table: Tensor = arguments[f"{kind}_grid_thw"]
        grids: list[Grid] = [(t, h, w) for t, h, w in table.tolist()]
        merge = self.model.config.vision_config.spatial_merge_size
        layouts = {grid: _item(kind, grid, merge, pixels.device) for grid in set(grids)}
        items = [layouts[grid] for grid in grids]
        order = self.raster_order(table)
        order = None if order is None else order.to(pixels.device, non_blocking=True)

        def to_tokens(values: Tensor) -> list[Tensor]:
            """[P, C] or [1, P, C] -> one [n_i, C] per item: the mean over the patches that make a token."""
            units = values.reshape(-1, merge * merge, values.shape[-1]).mean(1)
            units = units if order is None else units[order.to(units.device)]
            return list(torch.split(units, [item.n_tokens for item in items]))

        return VisionContext(kind=kind, items=items, fingerprint=_fingerprints(pixels, grids), to_tokens=to_tokens)


def _item(kind: Kind, grid: Grid, merge: int, device: torch.device) -> VisualItem:
    """Geometry of an item of `grid` patches; a token sits at the centre of the patches it was merged from."""
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    place = torch.arange(frames * height * width, device=device)
    row, col = place % (height * width) // width, place % width
    return VisualItem(
        kind=kind,
        n_tokens=place.numel(),
        crop=place // (height * width),
        row=row * merge + (merge - 1) / 2,
        col=col * merge + (merge - 1) / 2,
        newline=torch.zeros_like(place, dtype=torch.bool),
        n_crops=frames,
        crop_grid=grid[1:],
        grid=(frames, height, width),
    )


def _fingerprints(pixels: Tensor, grids: list[Grid]) -> Tensor:
    """[P, C] packed pixels -> [I] keys, each of its item's pixels alone; neighbours of one size go together."""
    keys: list[Tensor] = []
    start = 0
    for patches, run in groupby(t * h * w for t, h, w in grids):
        count = len(list(run))
        keys.append(fingerprint(pixels[start : start + count * patches].reshape(count, -1)))
        start += count * patches
    return torch.cat(keys)
