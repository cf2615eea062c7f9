"""Windows of neighbouring tokens: how alike their members are, and averaging the uniform ones to one token each.

Every function works on all items at once. An item is any number of full rasters one behind the other (frames, tiles, an
overview and a stitched map); a window lies inside one frame of one raster. Rows and columns that fill no whole window
at a raster's lower and right border belong to none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.ops.checks import numbers
from vtc.ops.select import take_rows

EPSILON = 1e-8
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
             [1, 4],
             [4, 2]]]), tensor([[ True, False, False]]))
    """
    items, length = window.shape
    number = torch.where(window < 0, windows, window)
    order = number.argsort(dim=1, stable=True)
    counts = window.new_zeros(items, windows + 1).scatter_add(1, number, torch.ones_like(number))
    first = (counts.cumsum(1) - counts)[:, :windows]
    slots = first[..., None] + torch.arange(size, device=window.device)
    members = order.gather(1, slots.clamp(max=length - 1).flatten(1)).view(items, windows, size)
    return members, counts[:, :windows] == size


def window_similarity(x: Tensor, members: Tensor, whole: Tensor) -> Tensor:
    """Mean cosine over the pairs of different members of each window: [I, W] float32, `APART` where it is not whole.

    x: [I, N, D]. members: [I, W, k], whole: [I, W] from `window_members`. The sum over pairs is the squared length of
    the sum of unit vectors minus the sum of their squared lengths, so memory is one row per window.
    """
    size = members.shape[2]
    total = x.new_zeros(*members.shape[:2], x.shape[2], dtype=torch.float32)
    own = x.new_zeros(members.shape[:2], dtype=torch.float32)
    for member in members.unbind(2):
        row = take_rows(x, member).float()
        row = row / row.norm(dim=-1, keepdim=True).clamp(min=EPSILON)
        total, own = total + row, own + row.square().sum(-1)
    return numbers((total.square().sum(-1) - own) / (size * (size - 1)), whole).masked_fill(~whole, APART)


def merge_windows(x: Tensor, members: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the members of every chosen window by their mean, which takes the place of the first of them.

    x: [I, N, D]. members: [I, W, k]. chosen: [I, W] bool, whole windows only. Returns the tokens [I, N, D] with the
    means in place, which of them are left, bool [I, N], and for every token the place of the one that took it in, -1
    where none did.
    """
    items, length, _ = x.shape
    anchor = torch.where(chosen, members[..., 0], length)  # a spare row takes what must not be written
    mean = sum(take_rows(x, member).float() for member in members.unbind(2)) / members.shape[2]
    assert isinstance(mean, Tensor)
    spare = torch.cat([x, x.new_zeros(items, 1, x.shape[2])], dim=1)
    tokens = spare.scatter(1, anchor[..., None].expand_as(mean), mean.to(x.dtype))[:, :length]
    place = torch.where(chosen[..., None], members, length).flatten(1)
    taken = anchor[..., None].expand_as(members).flatten(1)
    into = members.new_full((items, length + 1), -1).scatter(1, place, taken)[:, :length]
    keep = (into < 0) | (into == torch.arange(length, device=x.device))
    return tokens, keep, into


def merged_first(keep: Tensor, members: Tensor, chosen: Tensor, similarity: Tensor) -> Tensor:
    """The order with the merged tokens in front, the most uniform window first, then all others in token order.

    keep: [I, N] bool of what is left after `merge_windows` (without padding); members, chosen, similarity as there and
    in `window_similarity`. Returns [I, N]: the token that goes to each place. Kept places in ascending order receive
    the tokens in the new order; the other places and tokens are matched somehow.
    """
    items, length = keep.shape
    windows = chosen.shape[1]
    tokens = torch.arange(length, device=keep.device)
    value = similarity.masked_fill(~chosen, -torch.inf)
    rank = value.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    key = torch.where(keep, tokens + windows, tokens + windows + length)
    key = torch.cat([key, key.new_zeros(items, 1)], dim=1)
    key = key.scatter(1, torch.where(chosen, members[..., 0], length), rank)[:, :length]
    order = key.argsort(dim=1)
    places = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter(1, places, order)
