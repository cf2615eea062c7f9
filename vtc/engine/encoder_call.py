"""The state of one encoder call: it begins and ends with the call, and each thread has its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtc.method.readings import VisionReading


@dataclass(frozen=True, eq=False)
class Left:
    """What an encoder stage left: [crops, M] raster index of each patch (the raster's size behind a crop's last one).

    layer: the stage's. valid: [crops, M] bool, None where all crops kept the same number. counts: per crop.
    """

    layer: int
    places: Tensor
    valid: Tensor | None
    counts: tuple[int, ...]


@dataclass(eq=False)
class EncoderCall:
    """What one call of get_image_features or get_video_features gathered so far.

    rows: what each layer and reading recorded, one entry per attention call. patches: of each crop before the first
    stage. left: what each stage left that removed something. memory: the method's own, from stage to stage.
    """

    rows: dict[tuple[int, VisionReading], list[Tensor]] = field(default_factory=dict)
    patches: int = 0
    left: list[Left] = field(default_factory=list)
    memory: dict[Any, Any] = field(default_factory=dict)
