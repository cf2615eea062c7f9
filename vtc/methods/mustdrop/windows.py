"""Windows of neighbouring tokens: how alike their members are, and averaging the uniform ones to one token each.

Every function works on all items at once. An item is any number of full rasters one behind the other (frames, tiles, an
overview and a stitched map); a window lies inside one frame of one raster. Rows and columns that fill no whole window
at a raster's lower and right border belong to none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.method.base import Selection, StageView
from vtc.ops.checks import numbers
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import in_groups, settle, take_rows

EPSILON = 1e-8
BLOCK = 2**22
"""Numbers of the members held at once (16 MiB in float32)."""
APART = -2.0
"""Below every mean cosine: the similarity of a window that is not whole."""


def window_count(regions: Sequence[tuple[int, int, int]], window: tuple[int, int]) -> int:
    """Whole windows of (rows, columns) in rasters of (frames, rows, columns).

    >>> window_count([(1, 24, 24)], (3, 3)), window_count([(2, 4, 7), (1, 2, 9)], (3, 3))
    (64, 4)
    """
    return sum(frames * (height // window[0]) * (width // window[1]) for frames, height, width in regions)


def raster_windows(
    regions: Sequence[tuple[int, int, int]], window: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """[n] number of the window each token lies in, -1 for tokens of incomplete windows.

    regions: rasters (frames, rows, columns) one behind the other, n tokens in all. Windows are numbered raster by
    raster, frame by frame, and along the rows inside a frame.

    >>> raster_windows([(1, 2, 5)], (2, 2)).tolist()
    [0, 0, 1, 1, -1, 0, 0, 1, 1, -1]
    """
    parts: list[Tensor] = []
    before = 0
    for frames, height, width in regions:
        rows, cols = height // window[0], width // window[1]
        row = torch.arange(height, device=device)[:, None] // window[0]
        col = torch.arange(width, device=device) // window[1]
        frame = torch.arange(frames, device=device)[:, None, None]
        number = before + (frame * rows + row) * cols + col
        parts.append(torch.where((row < rows) & (col < cols), number, -1).flatten())
        before += frames * rows * cols
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=device)


def window_members(window: Tensor, windows: int, size: int) -> tuple[Tensor, Tensor]:
    """List the members of every window: indices [I, W, size] in token order, and which windows are whole, bool [I, W].

    window: [I, N] window number of each token, -1 for none (padding and removed tokens too). A window that lost a
    member is not whole; its list holds harmless indices.

    >>> window_members(torch.tensor([[0, 1, -1, 0, 2]]), 3, 2)
    (tensor([[[0, 3],
             [1, 0],
             [4, 0]]]), tensor([[ True, False, False]]))
    """
    members, real = in_groups(window, windows, size, window >= 0)
    return members, real.all(2)


def window_similarity(x: Tensor, members: Tensor, whole: Tensor) -> Tensor:
    """Mean cosine over the pairs of different members of each window: [I, W] float32, `APART` where it is not whole.

    x: [I, N, D]. members: [I, W, k], whole: [I, W] from `window_members`. The sum over pairs is the squared length of
    the sum of unit vectors minus the sum of their squared lengths, so memory is one row per window.
    """
    size = members.shape[2]
    length = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32)
    inverse = 1 / length.clamp(min=EPSILON)
    flat = members.flatten(1)
    weights, own = (each.gather(1, flat).view_as(members) for each in (inverse, (length * inverse).square()))
    total, own = _window_sums(x, members, weights), own.sum(2)
    return numbers((total.square().sum(-1) - own) / (size * (size - 1)), whole).masked_fill(~whole, APART)


def merge_windows(x: Tensor, members: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the members of every chosen window by their mean, which takes the place of the first of them.

    x: [I, N, D]. members: [I, W, k]. chosen: [I, W] bool, whole windows only. Returns the tokens [I, N, D] with the
    means in place, which of them are left, bool [I, N], and for every token the place of the one that took it in, -1
    where none did.
    """
    items, length, _ = x.shape
    anchor = torch.where(chosen, members[..., 0], length)  # a spare row takes what must not be written
    mean = _window_sums(x, members) / members.shape[2]
    spare = torch.cat([x, x.new_zeros(items, 1, x.shape[2])], dim=1)
    tokens = spare.scatter_(1, anchor[..., None].expand_as(mean), mean.to(x.dtype))[:, :length]
    place = torch.where(chosen[..., None], members, length).flatten(1)
    taken = anchor[..., None].expand_as(members).flatten(1)
    into = members.new_full((items, length + 1), -1).scatter(1, place, taken)[:, :length]
    kept = (into < 0) | (into == torch.arange(length, device=x.device))
    return tokens, kept, into


def _window_sums(x: Tensor, members: Tensor, weights: Tensor | None = None) -> Tensor:
    """[I, W, D] float32 sums over the members of each window, weighted by [I, W, k]. Streams over the windows."""
    (items, windows, size), width = members.shape, x.shape[2]
    result = x.new_empty(items, windows, width, dtype=torch.float32)
    chunk = max(1, BLOCK // max(1, items * size * width))
    for first in range(0, windows, chunk):
        part = slice(first, first + chunk)
        rows = take_rows(x, members[:, part].flatten(1)).float().view(items, -1, size, width)
        sums = rows.sum(2) if weights is None else (weights[:, part, None] @ rows)[:, :, 0]
        result[:, part] = sums
    return result


def merged_first(kept: Tensor, members: Tensor, chosen: Tensor, similarity: Tensor) -> Tensor:
    """The order with the merged tokens in front, the most uniform window first, then all others in token order.

    kept: [I, N] bool of what is left after `merge_windows` (without padding); members, chosen, similarity as there and
    in `window_similarity`. Returns [I, N]: the token that goes to each place. Kept places in ascending order receive
    the tokens in the new order; the other places and tokens are matched somehow.
    """
    items, length = kept.shape
    windows = chosen.shape[1]
    tokens = torch.arange(length, device=kept.device)
    rank = inverse(order_by(best=settle(similarity, chosen)))
    key = torch.where(kept, tokens + windows, tokens + windows + length)
    key = torch.cat([key, key.new_zeros(items, 1)], dim=1)
    key = key.scatter(1, torch.where(chosen, members[..., 0], length), rank)[:, :length]
    order = key.argsort(dim=1)
    return torch.empty_like(order).scatter(1, order_by(~kept), order)


# --- of a view
@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of all items of a view.

    members: [I, W, k] tokens of each window, whole: [I, W] bool, similarity: [I, W]; see `window_members` and
    `window_similarity`. counts: windows per item in its layout, on the host.
    """

    view: StageView
    members: Tensor
    whole: Tensor
    similarity: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, view: StageView, window: tuple[int, int]) -> Windows:
        """Cut the rasters of the view's items into windows of (rows, columns)."""
        counts = tuple(window_count(layout.regions, window) for layout in view.items.layouts)
        members, whole = window_members(_numbers(view, window), max(counts), math.prod(window))
        return cls(view, members, whole, window_similarity(view.tokens, members, whole), counts)

    def merge(self, chosen: Tensor, *, in_front: bool = False) -> Selection:
        """Average the chosen windows [I, W]; in_front: the merged tokens become the first ones of their item."""
        items = self.view.items
        tokens, kept, into = merge_windows(self.view.tokens, self.members, chosen)
        kept = kept & items.mask
        if in_front:
            order = merged_first(kept, self.members, chosen, self.similarity)
            tokens = take_rows(tokens, order)
            steps = torch.arange(kept.shape[1], device=kept.device).expand_as(order)
            place = torch.empty_like(order).scatter(1, order, steps)
            into = place.gather(1, torch.where(into < 0, steps, into))
        return Selection(kept, tokens=tokens, merged_into=into)

    def average(self, values: Tensor, chosen: Tensor, *, in_front: bool = False) -> Tensor:
        """[I, N] values of the tokens as they are after `merge`."""
        merged, kept, _ = merge_windows(values[..., None], self.members, chosen)
        if in_front:
            kept = kept & self.view.items.mask
            merged = take_rows(merged, merged_first(kept, self.members, chosen, self.similarity))
        return merged[..., 0]


def _numbers(view: StageView, window: tuple[int, int]) -> Tensor:
    """[I, N] window of each token, -1 for none."""
    device = view.device
    known: dict[object, Tensor] = {}
    # Without newlines the rasters say everything, whoever made the layout.
    keys = [id(layout) if layout.newlines else layout.regions for layout in view.items.layouts]
    for key, layout in zip(keys, view.items.layouts, strict=True):
        if key not in known:
            newline = layout.newline.to(device, non_blocking=True)
            number = raster_windows(layout.regions, window, device)
            number = torch.nn.functional.pad(number, (0, layout.n_tokens - len(number)), value=-1)
            rank = (~newline).cumsum(0).clamp(min=1) - 1
            known[key] = number.gather(0, rank).masked_fill(newline, -1)
    numbers = pad_sequence([known[key] for key in keys], batch_first=True, padding_value=-1)
    return numbers.gather(1, view.items.token).masked_fill(~view.items.mask, -1)


def by_token(view: StageView, values: Tensor) -> Tensor:
    """[I, N] values of the tokens there are -> [I, Nmax] by the token's number in its item; zero for the others."""
    items = view.items
    width = max(layout.n_tokens for layout in items.layouts)  # input_counts may be what another method left
    table = values.new_zeros(len(items), width + 1)
    return table.scatter(1, torch.where(items.mask, items.token, width), values)[:, :width]
