"""Rows and columns of a picture's tiles, which InternVL's processor decides and does not tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vtc.errors import UnsupportedCall

Tiling = tuple[int, int]
"""Rows and columns of tiles, the overview not counted."""
Canvas = Callable[[tuple[int, int]], Tiling | None]
"""Height and width of a picture in pixels -> its tiling, None where it cannot be told."""


def canvas(processor: Any) -> Canvas:
    """What a processor makes of a picture of any size, by its own settings."""
    images: Any = getattr(processor, "image_processor", None)

    def tiling(size: tuple[int, int]) -> Tiling | None:
        if not all(hasattr(images, name) for name in ("crop_to_patches", "min_patches", "max_patches", "size")):
            return None
        # It brings in torchvision, as the processor did.
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        if not images.crop_to_patches or images.max_patches <= 1:
            return 1, 1
        tile = images.size["height"], images.size["width"]
        columns, rows = get_optimal_tiled_canvas(size, tile, images.min_patches, images.max_patches)
        return rows, columns

    return tiling


def tilings(
    tiles: Sequence[int], sizes: Sequence[tuple[int, int]] | None, canvas: Canvas | None
) -> list[Tiling | None]:
    """The tiling of every picture, None where it has one tile or nobody knows.

    tiles: how many each has, its overview included. sizes: height and width of each in pixels, None where they are not
    given. Raises UnsupportedCall where the sizes do not explain the tiles.
    """
    if sizes is None:
        return [None] * len(tiles)
    if canvas is None:
        raise UnsupportedCall(
            "image_sizes tell how pictures were cut into tiles only together with the processor that cut them; pass "
            "processor=processor to vtc.compress as well"
        )
    if len(sizes) != len(tiles):
        raise UnsupportedCall(
            f"image_sizes has {len(sizes)} entries, the prompts hold {len(tiles)} pictures; give (height, width) of "
            "each in the order of the prompts, or image_sizes=None"
        )
    found: list[Tiling | None] = []
    for count, (height, width) in zip(tiles, sizes, strict=True):
        tiling = canvas((height, width))
        cut = 1 if tiling is None else math.prod(tiling)
        if tiling is not None and count != (cut + 1 if cut > 1 else 1):
            raise UnsupportedCall(
                f"this processor cuts a picture of {height} x {width} pixels (height x width) into {tiling[0]} x "
                f"{tiling[1]} tiles, the picture in the prompt has {count} with its overview; give the sizes that the "
                "processor was given, or image_sizes=None where it was called with other settings than its own"
            )
        found.append(tiling if cut > 1 else None)
    return found
