"""EVS, Efficient Video Sampling: what changed since the frame before stays (arXiv:2510.14624)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vtc.method.base import Compressor, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.ops.frames import likeness
from vtc.ops.host import put
from vtc.ops.select import evenly, top_k


@register
class EVS(Compressor):
    """Keep the first frame and, of all later ones together, the tokens least like what lay there a frame before.

    Acts before the LLM; training-free, text-agnostic, reads no attention. With the projected tokens X of frame t at
    place (y, x), ``d = 1 - cos(X[t, y, x], X[t - 1, y, x])`` for t >= 1, and the first frame before all others; the
    tokens of largest d stay. Ties go to the lower index, kept tokens stay in raster order and, under multi-axis
    positions, at their positions. A frame is what the model makes one of: a pair of them in Qwen-VL.

    Departures from the paper and its code: a retention is one minus the paper's pruning rate q, rounded as everywhere
    here. A budget below one frame, for which the code keeps the whole first frame, takes tokens of it that are spread
    evenly over its raster order, and nothing else; so do pictures, which are videos of one frame, and which the code
    leaves alone. What this paper says holds for budgets above one frame. Of tokens that an earlier stage removed,
    those at their places in the next frame count as new. Newline tokens stay and are no candidates.

    >>> import vtc
    >>> vtc.create("evs").plan(vtc.adapters.families()["qwen2.5-vl"].references[0]).positions
    'preserve'
    """

    name: ClassVar[str] = "evs"

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        frames, mask = Frames.of(view), view.items.mask
        alike = likeness(view.tokens, frames.earlier(torch.ones_like(frames.number)))
        keep, first = put(view.keep, view.device), mask & (frames.number == 0)
        whole = keep.minimum(first.sum(1))
        # Not of 1 - cos: near zero, where nothing moves, rounding would rank.
        kept = evenly(first, whole) | top_k(-alike, keep - whole, mask & ~first)
        return Selection(kept, counts=view.keep, scores=-alike)
