"""Images of an overview and crops: how many tokens each crop is worth, and which of them count there and overall.

Groups are crops (overview included), C of them; `group` [I, N] names the crop of each token and is ignored where `mask`
is False; results are zero there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.rank import inverse, order_by, rank_in_group
from vtc.ops.select import settle, top_k

CHUNK = 1024


def cell_sums(overview: Tensor, tiling: tuple[int, int]) -> Tensor:
    """Sum of an overview's scores over the part that every crop covers.

    overview: [I, Gh, Gw]. tiling: (h, w) rows and columns of crops; cells have floor(G / h) rows, the last one takes
    what is left. Returns float64 [I, h * w] in raster order.

    >>> cell_sums(torch.arange(9.0).view(1, 3, 3), (2, 2)).tolist()
    [[0.0, 3.0, 9.0, 24.0]]
    """
    height, width = overview.shape[1:]
    rows, columns = tiling
    device = overview.device
    row = (torch.arange(height, device=device) // max(1, height // rows)).clamp(max=rows - 1)
    column = (torch.arange(width, device=device) // max(1, width // columns)).clamp(max=columns - 1)
    cell = (row[:, None] * columns + column).flatten().expand(len(overview), -1)
    return group_sums(overview.flatten(1), cell, rows * columns, torch.ones_like(cell, dtype=torch.bool))


def crop_ratios(sums: Tensor, guided: Tensor, ratio: Tensor, tau: float) -> Tensor:
    """Retention of every crop: r_c = min(1, R * (1 + sigma_c - mean(sigma))), sigma the softmax of the sums over tau.

    sums: [I, C]. guided: [I, C] bool, the crops that take part; all others get R. ratio: [I], R. Computed in float64;
    the softmax's denominator has 1e-8 added. Returns float64 [I, C].
    """
    sums, ratio = sums.double(), ratio.double()[:, None]
    highest = torch.where(guided, sums, -torch.inf).amax(1, keepdim=True)
    power = torch.where(guided, ((sums - highest) / tau).exp(), 0.0)
    sigma = power / (power.sum(1, keepdim=True) + 1e-8)
    mean = sigma.sum(1, keepdim=True) / guided.sum(1, keepdim=True).clamp(min=1)
    return torch.where(guided, ratio * (1 + sigma - mean), ratio).clamp(max=1)


def floored_shares(ratios: Tensor, sizes: Tensor, first: Tensor) -> Tensor:
    """floor(n_c * r_c) tokens of every crop, at least one of the crop `first` [I]; [I, C] -> long [I, C]."""
    share = (sizes * ratios.double()).floor().long()
    at_least = torch.zeros_like(share).scatter_(1, first[:, None], 1)
    return torch.maximum(share, torch.minimum(at_least, sizes))


def exact_shares(ratios: Tensor, sizes: Tensor, total: Tensor, fixed: Tensor) -> Tensor:
    """Split `total` tokens over the crops: n_c * r_c scaled to the total, nowhere above n_c, by largest remainder.

    ratios, sizes: [I, C], r_c and n_c. total: [I], at most the sum of the sizes. fixed: [I, C] bool, crops that get
    n_c * r_c as it stands, at least one (the overview); the others share the rest. Equal remainders go to the lower
    crop. Returns long [I, C].

    >>> sizes = torch.tensor([[4, 4, 4]])
    >>> exact_shares(torch.tensor([[0.5, 0.3, 0.7]]), sizes, torch.tensor([7]), sizes < 0).tolist()
    [[2, 2, 3]]
    """
    ratios = ratios.double()
    own = torch.minimum((sizes * ratios).clamp(min=1.0), torch.minimum(sizes, total[:, None]))
    own = torch.where(fixed, own, 0.0)
    rest = total - own.sum(1)
    free = torch.where(fixed, 0, sizes)
    quota = own + torch.minimum(free, _scale(ratios, free, rest)[:, None] * free * ratios)
    quota = (quota * 2**20).round() / 2**20  # sums in another order must not decide between equal remainders
    share = quota.floor()
    return (share + top_k(quota - share, (total - share.sum(1)).long())).long()


def _scale(ratios: Tensor, sizes: Tensor, total: Tensor) -> Tensor:
    """[I] the factor s at which the sum of n_c * min(1, s * r_c) is the total."""
    highest, order = torch.where(sizes > 0, ratios, torch.inf).sort(dim=1, descending=True)
    size = sizes.gather(1, order).double()
    wanted = size * ratios.gather(1, order)
    full = size.cumsum(1) - size  # tokens of the crops in front of this one, all of them kept
    left = wanted.flip(1).cumsum(1).flip(1)
    scale = (total[:, None] - full) / left.clamp(min=1e-12)
    filled = (scale * highest > 1).cummin(1).values.sum(1, keepdim=True)
    return scale.gather(1, filled.clamp(max=scale.shape[1] - 1))[:, 0]


def stretch(overview: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize without antialiasing, half-pixel centres: [I, Gh, Gw] -> [I, rows, columns] in float32."""
    return torch.nn.functional.interpolate(overview.float()[:, None], size=size, mode="bilinear", antialias=False)[:, 0]


def blend(local: Tensor, overall: Tensor, group: Tensor, groups: int, mask: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * l / max(|l|, 1e-12) + alpha * g / max(|g|, 1e-12), norms over each crop's tokens; float32.

    local, overall: [I, N], what a token counts in its crop and what its place counts in the overview.
    """
    parts = []
    for values in (local.float(), overall.float()):
        norm = group_sums(values.double().square(), group, groups, mask).sqrt().clamp(min=1e-12)
        parts.append(values / _of_token(norm, group, mask).float())
    return torch.where(mask, parts[0] * (1 - alpha) + parts[1] * alpha, 0.0)


def released_order(
    kept: Tensor, scores: Tensor, group: Tensor, tiling: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """The order in which the released GlobalCom2 lines up an image.

    kept: [I, N] bool; scores: [I, N], crop 0 being the overview whose kept tokens come first, best first, and crops 1
    to h * w following with all their tokens in raster order. A kept token's number inside its crop is taken for a
    number in the crop's full grid (Gh, Gw), which misplaces the tokens of crops that were cut. The tokens then lie
    in h * Gh rows and every row ends with a newline. Returns [I, N + h * Gh]: places in the sequence "tokens,
    newlines", everything kept and all newlines in front.
    """
    rows, columns = tiling
    height, width = grid
    rank, inside = inverse(order_by(best=settle(scores))), rank_in_group(group)
    tile = (group - 1).clamp(min=0)
    row = tile // columns * height + inside // width
    line = columns * width + 1
    place = row * line + tile % columns * width + inside % width
    place = torch.where(group == 0, rank - kept.shape[1], place)
    place = torch.where(kept, place, rows * height * line)
    newlines = torch.arange(rows * height, device=kept.device) * line + line - 1
    return torch.cat([place, newlines.expand(len(kept), -1)], dim=1).argsort(dim=1, stable=True)


def standardise(values: Tensor, group: Tensor, groups: int, mask: Tensor) -> Tensor:
    """(x - mean) / max(deviation, 1e-12) over each crop's tokens, computed in float64; [I, N] -> float32 [I, N]."""
    values = values.double()
    size = group_sums(torch.ones_like(values), group, groups, mask).clamp(min=1)
    centred = values - _of_token(group_sums(values, group, groups, mask) / size, group, mask)
    deviation = (group_sums(centred.square(), group, groups, mask) / size).sqrt().clamp(min=1e-12)
    return torch.where(mask, centred / _of_token(deviation, group, mask), 0.0).float()


def unlike_mean(features: Tensor, group: Tensor, groups: int, mask: Tensor, chunk: int = CHUNK) -> Tensor:
    """-cos(x_j, mean of the features of j's crop) for features [I, N, C]; float32 [I, N]. Streams over the tokens."""
    index = torch.where(mask, group, groups)
    means = features.new_zeros(len(features), groups + 1, features.shape[2], dtype=torch.float64)
    for x, of in zip(torch.split(features, chunk, 1), torch.split(index, chunk, 1), strict=True):
        means.scatter_add_(1, of[..., None].expand_as(x), x.double())  # the direction of the sum is the mean's
    means = torch.nn.functional.normalize(means, dim=2).float()
    batch = torch.arange(len(features), device=features.device)[:, None]
    # Filled in place: small results kept between the large blocks of a chunk would split the heap.
    cosine = torch.empty(index.shape, dtype=torch.float32, device=features.device)
    for start in range(0, index.shape[1], chunk):
        x, of = features[:, start : start + chunk], index[:, start : start + chunk]
        cosine[:, start : start + chunk] = (torch.nn.functional.normalize(x.float(), dim=2) * means[batch, of]).sum(2)
    return torch.where(mask, -cosine, 0.0)


def group_sums(values: Tensor, group: Tensor, groups: int, mask: Tensor) -> Tensor:
    """Sum of the values [I, N] of every crop in float64, [I, C]; order of summation does not show at float32."""
    total = values.new_zeros(len(values), groups + 1, dtype=torch.float64)
    return total.scatter_add(1, torch.where(mask, group, groups), values.double())[:, :groups]


def _of_token(values: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """[I, C] -> [I, N] value of each token's crop, one where there is no token."""
    return torch.where(mask, values.gather(1, torch.where(mask, group, 0)), 1.0)
