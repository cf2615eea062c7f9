"""FastVID: attended tokens of every frame, and anchors of each segment that take up the rest (arXiv:2503.11187)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.ops.density import peaks
from vtc.ops.frames import quotas, segments
from vtc.ops.host import put
from vtc.ops.select import apportion, first_best, front_pack, take_rows, top_k

NEIGHBOURS = 4
"""Tokens that a density looks at."""
BLOCK = 1 << 24
"""Similarities held at a time."""


@register
class FastVID(Compressor):
    """Keep the attended tokens of every frame, and merge a segment's others into dense, distinct ones of few frames.

    Acts before the LLM; training-free, text-agnostic. A segment ends behind frame f where the cosine of the features of
    frames f and f + 1 is below `threshold`, and at the `segments` - 1 smallest ones. Of its share R of the budget a
    frame keeps R - int(R * context) tokens of largest attention as they are. What the frames of a segment have left
    goes in equal parts to its anchor frames, every `step`-th one, counted from its last frame. Anchors are the tokens,
    among those of an anchor frame that were not kept, of largest density (of 4 nearest tokens) times distance to a
    denser one. All tokens of the segment that were not kept join the most similar anchor of each anchor frame; an
    anchor x that n tokens of mean m joined, itself among them, becomes ``w x + (1 - w) m`` with
    ``w = max(own, 1 / (n + 1))``. Ties go to the lower index, kept tokens stay in raster order.

    segments, threshold: c and tau, 8 and 0.9 in the paper. context: d, 0.4. step: p, 4. own: beta, 0.6.

    Departures from the paper and its code: no encoder here shows the pooling head that the code takes frame features
    and attention from. The feature of a frame is the mean of its projected tokens; attention is the class token's or,
    without one, what a patch receives, mean over heads and queries, in the last layer up to the features that sees the
    whole image. Frames' shares are rounded by the largest remainder and the budget is met exactly; what anchor frames
    cannot hold goes in equal parts to the other frames of the segment, which are anchor frames then. The second
    threshold of the code for Qwen2.5-VL is left out. A picture is a video of one frame, with all of its tiles. In
    traces a token counts as merged into the most similar of its anchors. Newline tokens stay and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava-next-video"].references[0]  # 24 and 32 layers
    >>> vtc.create("fastvid", threshold=0.84).plan(llava).needs.vision
    {22: ClassRow()}
    """

    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    step: int = 4
    own: float = 0.6

    name: ClassVar[str] = "fastvid"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, paper in (("segments", 1, 8), ("step", 1, 4)):
            if getattr(self, name) < least:
                raise VTCError(f"{name}={getattr(self, name)!r} has to be at least {least}; the paper uses {paper}")
        for name, paper_share in (("context", 0.4), ("own", 0.6)):
            if not 0 <= getattr(self, name) <= 1:
                raise VTCError(f"{name}={getattr(self, name)!r} is no share of 1; the paper uses {paper_share}")

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(vision={model.key_layer: model.patch_attention})
        return dataclasses.replace(super().plan(model), needs=needs, positions="preserve")

    def select(self, view: StageView) -> Selection:
        frames, mask = Frames.of(view), view.items.mask
        parts, sizes = frames.parts, frames.sizes
        score = view.vision_attention(view.model.key_layer).detach()
        x = parts.take(view.tokens.detach())
        segment, behind = segments(frames.mean(x).view(*sizes.shape, -1), sizes > 0, self.segments, self.threshold)
        share = apportion(put(view.keep, view.device), sizes)
        left = (share.double() * self.context + 1e-9).floor().long()
        quota = placed(left, sizes - share + left, segment, behind % self.step == 0)
        attended = top_k(parts.take(score).float(), (share - left).flatten(), parts.mask)
        free = parts.mask & ~attended
        most = max((self._most(k, n) for k, n in zip(view.keep, self._lengths(view), strict=True)), default=0)
        most = min(frames.width, most)
        near = free.sum(1).clamp(max=NEIGHBOURS)
        anchor = peaks(x, quota.flatten(), near, free, most=most, nearest=NEIGHBOURS)
        place = front_pack(anchor, most).view(*sizes.shape, -1)
        place = parts.numbers.view(*sizes.shape, -1).gather(2, place)
        real = torch.arange(most, device=mask.device) < quota[..., None]
        own = segment.gather(1, frames.number)
        joins = parts.give(free) & mask
        tokens, into = absorb(view.tokens, joins, own, place, real, segment, self.own)
        kept = parts.give(attended | anchor)
        into = torch.where(kept, torch.arange(mask.shape[1], device=mask.device), into)
        return Selection(kept, counts=view.keep, tokens=tokens, merged_into=into, scores=score)

    @staticmethod
    def _lengths(view: StageView) -> list[int]:
        """Frames of each item."""
        return [layout.n_crops if layout.kind == "video" else 1 for layout in view.items.layouts]

    def _most(self, keep: int, frames: int) -> int:
        """No frame of an item has more anchors: `step` times what one frame leaves, and what rounding adds."""
        return self.step * int(math.ceil(keep / frames) * self.context + 1e-9) + 1


def placed(left: Tensor, room: Tensor, segment: Tensor, anchor: Tensor) -> Tensor:
    """How many anchors each frame has; all [I, G].

    left: what each frame leaves to the anchors of its segment. room: what it can hold. segment: its segment's number.
    anchor: bool, which frames come first.

    >>> left, room = torch.tensor([[2, 2, 2]]), torch.tensor([[9, 9, 4]])
    >>> placed(left, room, torch.zeros_like(left), torch.tensor([[False, False, True]])).tolist()
    [[1, 1, 4]]
    """
    items, groups = left.shape
    member = segment[:, None] == torch.arange(groups, device=left.device)[:, None]
    total = (member * left[:, None]).sum(2)
    first = member & anchor[:, None]
    held = []
    for some in (first, member & ~first):
        size = (some * room[:, None]).flatten(0, 1)
        count = quotas(some.flatten(0, 1).double(), total.flatten().minimum(size.sum(1)), size).view(items, -1, groups)
        total = total - count.sum(2)
        held.append(count.sum(1))
    return held[0] + held[1]


def absorb(
    x: Tensor, joins: Tensor, own: Tensor, place: Tensor, real: Tensor, segment: Tensor, least: float
) -> tuple[Tensor, Tensor]:
    """Add to the anchors of each segment the means of what is like them (see `FastVID`).

    x: [I, N, D]. joins: [I, N] bool, what is absorbed, anchors included. own: [I, N] segment of each token. place,
    real: [I, G, Q] tokens that are anchors of each frame, and which there are. segment: [I, G] of each frame. least:
    weight that an anchor keeps. Returns the tokens, and [I, N] the most similar anchor of each token that joins, -1 of
    others. Streams over the tokens.
    """
    seats = place.flatten(1)
    unit = torch.nn.functional.normalize(x.detach().float(), dim=2)
    anchors = take_rows(unit, seats).transpose(1, 2)
    sums, into = x.new_zeros(*seats.shape, x.shape[2], dtype=torch.float32), []
    counts = torch.zeros_like(seats, dtype=torch.float32)
    size = max(1, BLOCK // max(1, seats.numel()))
    for first in range(0, x.shape[1], size):
        some = slice(first, first + size)
        open_ = (joins[:, some, None] & (own[:, some, None] == segment[:, None]))[..., None] & real[:, None]
        cosine = torch.bmm(unit[:, some], anchors).view(open_.shape).masked_fill(~open_, -torch.inf)
        nearest = first_best(cosine)
        joined = torch.zeros_like(cosine).scatter(3, nearest[..., None], 1) * open_.any(3, keepdim=True)
        joined = joined.flatten(2)
        sums = sums + torch.bmm(joined.transpose(1, 2), x[:, some].float())
        counts = counts + joined.sum(1)
        best = first_best(cosine.flatten(2))
        into.append(torch.where(open_.flatten(2).any(2), seats.gather(1, best), -1))
    weight = (1 / (counts + 1)).clamp(min=least)[..., None]
    mean = sums / counts.clamp(min=1)[..., None]
    rows = (weight * take_rows(x, seats).float() + (1 - weight) * mean).to(x.dtype)
    seat = torch.where(real.flatten(1), seats, x.shape[1])
    spare = torch.nn.functional.pad(x, (0, 0, 0, 1)).scatter(1, seat[..., None].expand_as(rows), rows)
    return spare[:, :-1], torch.cat(into, 1)
