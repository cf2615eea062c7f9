"""Videos: where the same place lies in another frame, how alike the two tokens are, and what each frame may keep."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.blocks import blocks, lengths
from vtc.ops.checks import numbers
from vtc.ops.rank import order_by, run_starts
from vtc.ops.select import take_rows, top_k


def places(row: Tensor, col: Tensor, mask: Tensor) -> Tensor:
    """[I, N] number of each token's place in its frame: those of an item's different (row, col), in raster order.

    row, col: [I, N]. mask: [I, N] bool; what is outside gets numbers behind the others.

    >>> row, col = torch.tensor([[0.5, 0.5, 2.5, 0.5]]), torch.tensor([[0.5, 2.5, 0.5, 0.5]])
    >>> places(row, col, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[0, 1, 2, 0]]
    """
    order = order_by(~mask, row, col)
    starts = run_starts((~mask).gather(1, order)) | run_starts(row.gather(1, order)) | run_starts(col.gather(1, order))
    return torch.empty_like(order).scatter_(1, order, starts.cumsum(1) - 1)


def earlier(frame: Tensor, place: Tensor, lag: Tensor, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """[I, N] index of the token that lies at the same place `lag` frames before each token, -1 where there is none.

    frame, place, lag: [I, N]. mask: [I, N] bool, the tokens there are. shape: frames and places that no item exceeds.

    >>> frame, place = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 1, 1]])
    >>> earlier(frame, place, torch.ones_like(frame), torch.ones(1, 4, dtype=torch.bool), (3, 2)).tolist()
    [[-1, -1, 1, 2]]
    """
    frames, width = shape
    spare = frames * width
    token = torch.arange(frame.shape[1], device=frame.device).expand_as(frame)
    table = torch.full((len(frame), spare + 1), -1, device=frame.device)
    table = table.scatter(1, torch.where(mask, frame * width + place, spare), token)
    table = torch.nn.functional.pad(table[:, :spare], (0, 1), value=-1)
    wanted = frame - lag
    return table.gather(1, torch.where(mask & (wanted >= 0), wanted * width + place, spare))


def latest(frame: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """[I, N] index of the last token in front of each one at its place, whichever frame it is of; -1: there is none.

    frame, place: [I, N]. mask: [I, N] bool, the tokens there are.

    >>> frame, place = torch.tensor([[0, 0, 1, 3]]), torch.tensor([[0, 1, 1, 0]])
    >>> latest(frame, place, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[-1, -1, 1, 0]]
    """
    order = order_by(~mask, place, frame)
    before = torch.nn.functional.pad(order[:, :-1], (1, 0))
    starts = run_starts(place.gather(1, order)) | ~mask.gather(1, order)
    return torch.empty_like(order).scatter_(1, order, torch.where(starts, -1, before))


def likeness(x: Tensor, other: Tensor) -> Tensor:
    """[I, N] cosine of each token with another of its item; x: [I, N, D], other: [I, N] index, -1 for none: -inf.

    Streams over the tokens.

    >>> likeness(torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([[-1, 0]])).tolist()
    [[-inf, 0.6000000238418579]]
    """
    length, there = lengths(x).clamp(min=1e-12), other.clamp(min=0)
    found = [(take_rows(x, spots).float() * some.float()).sum(2) for some, spots in blocks(x, there)]
    cosine = torch.cat(found, 1) / length / length.gather(1, there)
    return torch.where(other >= 0, numbers(cosine, other >= 0), -torch.inf)


def segments(features: Tensor, real: Tensor, count: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Cut videos where neighbouring frames differ; [I, G] segment of each frame, and frames behind it in its segment.

    features: [I, G, C]. real: [I, G] bool, the frames there are, at the front. A segment ends behind frame f where
    ``cos(f, f + 1) < threshold``, and at the `count` - 1 smallest cosines, of equals the lower f.

    >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    >>> segments(features, torch.ones(1, 3, dtype=torch.bool), 1, 0.9)
    (tensor([[0, 0, 1]]), tensor([[1, 0, 0]]))
    """
    unit = torch.nn.functional.normalize(features.float(), dim=2)
    alike, pair = (unit[:, 1:] * unit[:, :-1]).sum(2), real[:, 1:]
    cut = pair & (alike < threshold)
    cut |= top_k(-alike, torch.full_like(pair.sum(1), count - 1), pair)
    segment = torch.nn.functional.pad(cut.cumsum(1), (1, 0))
    frame = torch.arange(features.shape[1], device=features.device)
    end = torch.nn.functional.pad(cut | ~pair, (0, 1), value=True)
    last = torch.where(end, frame, features.shape[1]).flip(1).cummin(1).values.flip(1)
    return segment, last - frame


def roots(parent: Tensor, depth: int) -> Tensor:
    """[I, N] where the chain of every token's parents ends; parent: [I, N] index, of a root its own.

    depth: no chain is longer, as the host knows.

    >>> roots(torch.tensor([[0, 0, 1, 3, 2]]), 3).tolist()
    [[0, 0, 0, 3, 0]]
    """
    for _ in range(depth.bit_length()):  # each time twice as far
        parent = parent.gather(1, parent)
    return parent


def windows(same: Tensor) -> tuple[Tensor, Tensor]:
    """Cut videos into windows so that as many tokens as possible say nothing new (HoliTom, arXiv:2505.21334).

    same: [I, G, P] bool, where a place looks as it did in the frame before; False in the first frame and behind the
    last. In a window of frames s to e a place is still if it is the same in all of s + 1 to e, and saves e - s tokens.
    The partition that saves most, by dynamic programming; of equals the one whose last window is shortest, and so on
    to the front. Returns [I, G] the first frame of each frame's window, and [I, G, P] bool the places that are still in
    windows of several frames. Memory is that of `same` and of all pairs of frames; one step for each frame.

    >>> first, still = windows(torch.tensor([[[0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1]]]).bool())
    >>> first.tolist(), still[0].int().tolist()
    ([[0, 0, 2, 2]], [[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 1]])
    """
    items, frames, _ = same.shape
    frame = torch.arange(frames, device=same.device)
    changed = torch.where(same, 0, frame[:, None]).cummax(1).values  # the last frame in which a place was not the same
    counts = torch.zeros(items, frames, frames, dtype=torch.long, device=same.device)
    counts = counts.scatter_add(2, changed, torch.ones_like(changed)).cumsum(2)  # by last and first frame of a window
    saved = counts * (frame[:, None] - frame)
    best = frame.new_zeros(items, frames + 1)
    begins = torch.zeros(items, frames + 1, frames, dtype=torch.bool, device=same.device)
    item = torch.arange(items, device=same.device)
    for end in range(frames):
        value = ((best[:, : end + 1] + saved[:, end, : end + 1]) * frames + frame[: end + 1]).amax(1)
        best[:, end + 1], start = value // frames, value % frames
        begins[:, end + 1] = begins[item, start].scatter(1, start[:, None], True)
    first = torch.where(begins[:, -1], frame, 0).cummax(1).values
    ends = torch.nn.functional.pad(begins[:, -1, 1:], (0, 1), value=True)
    last = torch.where(ends, frame, frames).flip(1).cummin(1).values.flip(1)
    since = changed.gather(1, last[..., None].expand_as(changed))
    return first, (since <= first[..., None]) & (first < last)[..., None]


def quotas(weight: Tensor, keep: Tensor, size: Tensor, *, least: int = 0) -> Tensor:
    """Split `keep` [R] over groups by their weights [R, G], none more than its size [R, G]; whole numbers [R, G].

    Exactly: ``min(size, max(low, s * weight))`` with the one factor s at which the sum is `keep`, then rounded by the
    largest remainder, of equals the lower group first. low is `least`, or the size where that is smaller, in rows that
    can pay it for every group, else 0. Groups of weight 0 get no more than low, so that less than `keep` may be spent.

    >>> quotas(torch.tensor([[6.0, 1.0, 2.0]]), torch.tensor([9]), torch.tensor([[4, 4, 4]])).tolist()
    [[4, 2, 3]]
    """
    weight = numbers(weight, size > 0).double().masked_fill(size <= 0, 0)
    low = size.clamp(max=least)
    low = torch.where(low.sum(1, keepdim=True) <= keep[:, None], low, 0).double()
    high = torch.maximum(torch.where(weight > 0, size, 0).double(), low)

    def shares(factor: Tensor) -> Tensor:
        """[R, F] -> [R, F, G]."""
        return torch.minimum(torch.maximum(factor[..., None] * weight[:, None], low[:, None]), high[:, None])

    # The sum is a broken line: it bends where a group leaves its lower bound and where it meets its upper one.
    leaves, meets = (torch.where(weight > 0, bound / weight, torch.inf) for bound in (low, high))
    bends = torch.cat([torch.zeros_like(low[:, :1]), leaves, meets], 1)
    bends = torch.where(bends < torch.inf, bends, 0)
    sums = shares(bends).sum(2)
    below = sums <= keep[:, None]
    start = torch.where(below, bends, 0).amax(1, keepdim=True)
    paid = torch.where(below, sums, 0).amax(1, keepdim=True)
    rising = torch.where((leaves <= start) & (start < meets), weight, 0).sum(1, keepdim=True)
    factor = start + (keep[:, None] - paid).clamp(min=0) / rising.clamp(min=torch.finfo(torch.double).tiny)
    exact = shares(torch.where(rising > 0, factor, start))[:, 0]
    whole = exact.floor()
    return (whole + top_k(exact - whole, keep - whole.sum(1).long(), whole < high)).long()
