"""DyCoke's first stage: of every four frames one stays whole, the others keep what changed (arXiv:2411.15024)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vtc.method.base import Compressor, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.ops.frames import likeness, quotas
from vtc.ops.host import put
from vtc.ops.select import apportion, evenly, top_k

GROUP = 4
"""Frames of which the first stays whole."""


@register
class DyCoke(Compressor):
    """Keep the first of every four frames and, of the others, the tokens least like those of the frame they follow.

    Acts before the LLM; training-free, text-agnostic, reads no attention. Frames 4 i + 1 and 4 i + 3 are compared with
    the frame in front of them, frame 4 i + 2 with frame 4 i: by the cosine of the projected tokens at the same place.
    Each of these three keeps the same number of tokens, those of lowest cosine; frame 4 i stays whole. With q, the
    share that thinned frames keep, a retention is (1 + 3 q) / 4 of whole groups. Ties go to the lower index, kept
    tokens stay in raster order.

    Departures from the paper and its code: this is its first stage, temporal token merging, alone. The second, which
    chooses anew at each decoding step what of the KV cache a step attends to, is left out: here rows leave the cache
    once, after the prefill. Counts are exact, shares of thinned frames being rounded by the largest remainder. The last
    group is thinned like all others, and a last frame without a partner takes part (the code leaves the former and
    loses the latter). Kept tokens stay in raster order, not by rising cosine. A budget below that of the whole frames,
    a quarter, takes tokens of these alone, spread evenly over the raster order of each; so do pictures, which are
    videos of one frame. Newline tokens stay and are no candidates.

    >>> import vtc
    >>> q = 0.3  # the paper removes K = 0.7 of what a thinned frame has
    >>> vtc.Budget(retention=(1 + 3 * q) / 4).tokens(8 * 196)
    745
    >>> vtc.create("dycoke").name
    'dycoke'
    """

    name: ClassVar[str] = "dycoke"

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        frames = Frames.of(view)
        parts, sizes, keep = frames.parts, frames.sizes, put(view.keep, view.device)
        alike = likeness(view.tokens, frames.earlier(1 + (frames.number % GROUP == 2)))
        first = torch.arange(frames.most, device=view.device) % GROUP == 0
        whole, rest = sizes * first, sizes * ~first
        paid = keep.minimum(whole.sum(1))
        thinned = quotas(rest.double(), keep - paid, rest).flatten()
        leading = first.repeat(len(sizes))[:, None]
        spread = evenly(parts.mask & leading, apportion(paid, whole).flatten())
        changed = top_k(-parts.take(alike), thinned, parts.mask & ~leading)
        return Selection(parts.give(spread | changed), counts=view.keep, scores=-alike)
