"""VidCom2: frames that stand out get more of the budget, and keep the tokens that stand out (arXiv:2505.14454)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.ops.blocks import blocks
from vtc.ops.frames import quotas
from vtc.ops.host import put
from vtc.ops.select import settle, top_k
from vtc.ops.similarity import total

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Of the Gaussians whose sum says how near two tokens are."""


@register
class VidCom2(Compressor):
    """Keep of every frame the tokens least like the video and like the frame; frames least like the video keep more.

    Acts before the LLM; training-free, text-agnostic, reads no attention. Of the projected tokens' D channels it uses
    the D // 2 of lowest variance over the video, each token scaled to unit length there. With their mean g over the
    video, their mean c_f over frame f and ``G(x, c) = sum_a exp(-|x - c|^2 / 2a)`` for a = 1/8, 1/4, 1/2, 1, 2, let
    ``v = G(x, g)`` and ``u = G(x, c_f)``. Frame f of F counts for ``1 + p_f - 1/F``, p being the softmax over frames of
    ``-mean_j(v_fj) / temperature``. It keeps its tokens of smallest v + u. Ties go to the lower index, kept tokens stay
    in raster order.

    temperature: 0.01 in the paper's code, so low that one frame often takes twice what the others do; larger is more
    even.

    Departures from the paper and its code: the budget is met exactly. Shares that follow the weights, at least one
    token for every frame where there are as many to keep, none more than the frame has, are rounded by the largest
    remainder; the code rounds each frame's share by itself and loses what exceeds a frame. A picture is a video of one
    frame, with all of its tiles, where the code leaves pictures alone. Newline tokens stay and are no candidates.

    >>> import vtc
    >>> vtc.create("vidcom2").temperature
    0.01
    """

    temperature: float = 0.01

    name: ClassVar[str] = "vidcom2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise VTCError(
                f"temperature={self.temperature!r} divides what frames differ by; pass a number above 0, the code has "
                "0.01"
            )

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        frames = Frames.of(view)
        parts, sizes = frames.parts, frames.sizes
        calm, scale = directions(view.tokens, view.items.mask)
        calm, scale = calm.repeat_interleave(frames.most, 0), parts.take(scale) * parts.mask
        rows = parts.take(view.tokens).float()
        sums = torch.bmm(scale[:, None], rows)[:, 0] * calm
        whole = sums.view(*sizes.shape, -1).sum(1) / sizes.sum(1, keepdim=True).clamp(min=1)
        own = sums / sizes.view(-1, 1).clamp(min=1)
        like = nearness(rows, scale, torch.stack([whole.repeat_interleave(frames.most, 0), own], 1))
        weight = share(frames.mean(like[:, 0]).view_as(sizes), sizes > 0, self.temperature)
        quota = quotas(weight * sizes, put(view.keep, view.device), sizes, least=1)
        unlike = -like.sum(1)
        return Selection(
            parts.give(top_k(unlike, quota.flatten(), parts.mask)), counts=view.keep, scores=parts.give(unlike)
        )


def directions(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[I, D] bool, the half of the channels whose variance is lowest, and [I, N] what scales tokens to length 1 there.

    tokens: [I, N, D]. mask: [I, N] bool, the tokens there are. Streams over the tokens.
    """
    mean = total(tokens, mask) / mask.sum(1, keepdim=True).clamp(min=1)
    spread = torch.zeros_like(mean)[:, None]
    for some, real in blocks(tokens, mask):
        spread.baddbmm_(real[:, None].float(), (some.float() - mean[:, None]).square_())
    half = torch.full_like(mask[:, 0], tokens.shape[2] // 2, dtype=torch.long)
    calm = top_k(-spread[:, 0], half)
    length = torch.cat([(some.float() * calm[:, None]).norm(dim=2) for (some,) in blocks(tokens)], 1)
    return calm, 1 / length.clamp(min=1e-12)


def nearness(x: Tensor, scale: Tensor, centres: Tensor) -> Tensor:
    """Sums of Gaussians of the distances of scaled tokens to centres; [R, W, D], [R, W], [R, C, D] -> [R, C, W].

    scale: what gives the tokens the length 1 in the channels that the centres have.
    """
    product = torch.bmm(centres, x.transpose(1, 2)).mul_(scale[:, None])
    square = 1 + centres.square().sum(2, keepdim=True) - 2 * product
    return torch.stack([(-square.clamp(min=0) / (2 * width)).exp() for width in WIDTHS]).sum(0)


def share(near: Tensor, real: Tensor, temperature: float) -> Tensor:
    """What frames count for, 1 in the mean: [I, G] how near they are to their video, and which there are -> [I, G].

    >>> share(torch.tensor([[3.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool), 0.01).tolist()
    [[1.0, 1.0]]
    """
    odd = (settle(-near, real) / temperature).softmax(1)
    return torch.where(real, 1 + odd - 1 / real.sum(1, keepdim=True).clamp(min=1), 0)
