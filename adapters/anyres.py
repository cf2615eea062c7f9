"""AnyRes images: an overview and high-resolution tiles, stitched to a map, cut to the picture, a newline per row."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapters.compat import media
from vtc.adapters.llava import LlavaAdapter
from vtc.batch.context import VisionContext
from vtc.cost.shapes import Encoded
from vtc.method.layout import VisualItem
from vtc.ops.hashing import fingerprint, joint_fingerprint
from vtc.ops.host import put

Size = tuple[int, int]
Packing = Callable[[Tensor], Tensor]
"""Per-patch values [crops, P, C] of one item -> [n, C] per token, NaN on newlines."""


class AnyResAdapter(LlavaAdapter):
    """Base of the families that cut images into tiles.

    Crop 0 of an image is the overview, the others are its tiles row by row. In the prompt the overview comes first,
    then the tiles stitched to one map of patches, without the margins that padded the picture to its tiling, every
    row of the map followed by a newline. An image of one crop is its patches and one newline.
    """

    single_crop: ClassVar[bool] = False
    usual_crops: ClassVar[int] = 5

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @abstractmethod
    def pack_images(self, crops: list[Tensor], sizes: list[Size], arguments: dict[str, Any]) -> list[Tensor]:
        """The model's own packing: [crops, P, C] and pixel size (height, width) per image -> [n, C], newlines NaN."""

    def is_tiled(self, arguments: Mapping[str, Any], images: int) -> list[bool]:
        """Which of the images of a call were cut into tiles."""
        return [True] * images

    def prefix(self, arguments: dict[str, Any]) -> int:
        """Encoder rows that the model cuts off in front of the patches."""
        strategy = arguments.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        return 1 if strategy == "default" else 0

    def describe_images(self, arguments: dict[str, Any]) -> VisionContext:
        """Items of one get_image_features call."""
        pixels, first = media("image", arguments), self.prefix(arguments)
        sizes, tilings, counts = self._tilings(arguments)

        def geometry(size: Size, tiling: Size | None) -> VisualItem:
            pack: Packing = lambda values: self.pack_images([values], [size], arguments)[0]  # noqa: E731
            return anyres_item(pack, tiling, self.side, pixels.device)

        kinds = list(zip(sizes, tilings, strict=True))
        layouts = {kind: geometry(*kind) for kind in dict.fromkeys(kinds)}
        return VisionContext(
            kind="image",
            items=[layouts[kind] for kind in kinds],
            fingerprint=_fingerprints(pixels, counts),
            to_tokens=lambda values: self.pack_images(list(torch.split(values[:, first:], counts)), sizes, arguments),
        )

    def describe_videos(
        self, arguments: dict[str, Any], pool: Callable[[Tensor], Tensor], *, newline: bool
    ) -> VisionContext:
        """Items of one get_video_features call; pool: [frames, P, C] -> [frames, P', C], newline: one per video."""
        pixels, first = media("video", arguments), self.prefix(arguments)
        videos, frames = pixels.shape[:2]
        side = self.side

        def to_tokens(values: Tensor) -> list[Tensor]:
            """[videos * frames, T, C] -> one [n, C] per video."""
            tokens = pool(values[:, first:]).reshape(videos, -1, values.shape[-1])
            return list(torch.nn.functional.pad(tokens, (0, 0, 0, int(newline)), value=math.nan))

        item = frames_item(pool, frames, side, newline=newline, device=pixels.device)
        return VisionContext(kind="video", items=[item] * videos, fingerprint=fingerprint(pixels), to_tokens=to_tokens)

    def _tilings(self, arguments: Mapping[str, Any]) -> tuple[list[Size], list[Size | None], list[int]]:
        """Pixel size, rows and columns of tiles, and number of crops of each image of a call."""
        sizes: list[Size] = [(height, width) for height, width in arguments["image_sizes"].tolist()]
        tilings = [
            self._tiling(size) if tiled else None
            for size, tiled in zip(sizes, self.is_tiled(arguments, len(sizes)), strict=True)
        ]
        return sizes, tilings, [1 if tiling is None else 1 + tiling[0] * tiling[1] for tiling in tilings]

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded:
        total, images, videos = Encoded(), inputs.get("pixel_values"), inputs.get("pixel_values_videos")
        if images is not None:
            total += self._crops(images, sum(self._tilings(inputs)[2]))
        if videos is not None:
            total += self._crops(videos, videos.shape[0] * videos.shape[1], self.projected_per_frame)
        return total

    @property
    def projected_per_frame(self) -> int | None:
        """Tokens of a video's frame behind the projector, None for those of any picture."""
        return None

    def _tiling(self, size: Size) -> Size:
        from transformers.image_processing_utils import select_best_resolution

        crop = self.model.config.vision_config.image_size
        height, width = select_best_resolution(size, self.model.config.image_grid_pinpoints)
        return height // crop, width // crop


def anyres_item(pack: Packing, tiling: Size | None, side: int, device: torch.device) -> VisualItem:
    """Geometry of one image: places of its patches, sent through the model's own packing.

    The places of tiles are those on the stitched map, so that they stay meaningful where the packing shrinks the map:
    there they are fractional, and a token belongs to the tile that its centre lies in.
    """
    count = side * side
    places = raster(side, side)[None]
    if tiling is not None:
        rows, cols = tiling
        stitched = raster(rows * side, cols * side).view(rows, side, cols, side, 2)
        places = torch.cat([places, stitched.transpose(1, 2).reshape(rows * cols, count, 2)])
    tokens = pack(places)
    newline = tokens[:, 0].isnan()
    newlines = int(newline.sum())
    corner = ((tokens + 0.5) / side).floor()  # the tile's row and column
    crop = torch.zeros(len(tokens))
    regions = [(1, side, side)]
    if tiling is not None:
        crop[count:] = 1 + corner[count:, 0] * tiling[1] + corner[count:, 1]
        width = (len(tokens) - count) // newlines - 1 if newlines else 0
        regions += [(1, newlines, width)] if width else []
    inside = (tokens - corner * side).nan_to_num(-1)
    crop = crop.masked_fill(newline, -1).long()
    return VisualItem(
        kind="image",
        n_tokens=len(tokens),
        crop=crop.to(device, non_blocking=True),
        row=inside[:, 0].to(device, non_blocking=True),
        col=inside[:, 1].to(device, non_blocking=True),
        newline=newline.to(device, non_blocking=True),
        n_crops=len(places),
        crop_grid=(side, side),
        newlines=newlines,
        thumbnail=None if tiling is None else 0,
        tiling=tiling,
        regions=tuple(regions),
        crop_sizes=tuple(crop[~newline].bincount(minlength=len(places)).tolist()),
    )


def frames_item(
    pool: Callable[[Tensor], Tensor], frames: int, side: int, *, newline: bool, device: torch.device
) -> VisualItem:
    """Geometry of a video: every frame's patches pooled by `pool`, [1, P, C] -> [1, P', C]; newline: one at the end."""
    place = pool(raster(side, side)[None])[0]
    pooled = math.isqrt(len(place))
    frame = torch.arange(frames).repeat_interleave(len(place))
    end = int(newline)

    def with_end(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, end), value=-1).to(device, non_blocking=True)

    crop = with_end(frame)
    raster_of_tokens = (frames, pooled, pooled)
    return VisualItem(
        kind="video",
        n_tokens=len(crop),
        crop=crop,
        row=with_end(place[:, 0].repeat(frames)),
        col=with_end(place[:, 1].repeat(frames)),
        newline=crop < 0,
        n_crops=frames,
        crop_grid=(side, side),
        newlines=end,
        grid=None if newline else raster_of_tokens,
        regions=(raster_of_tokens,),
    )


def raster(rows: int, cols: int) -> Tensor:
    """[rows * cols, 2] row and column of every place of a raster."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()


def _fingerprints(pixels: Tensor, counts: list[int]) -> Tensor:
    """[images] keys of [images, crops, ...] (each padded to the largest number of crops) or [crops, ...] pixels."""
    if pixels.ndim == 4:
        return joint_fingerprint(fingerprint(pixels), counts)
    most = pixels.shape[1]
    real = [image * most + crop for image, count in enumerate(counts) for crop in range(count)]
    keys = fingerprint(pixels.flatten(0, 1))[put(real, pixels.device)]
    return joint_fingerprint(keys, counts)
