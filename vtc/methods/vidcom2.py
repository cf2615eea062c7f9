"""VidCom2: frames that stand out get more of the budget, and keep the tokens that stand out (arXiv:2505.14454)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.ops.frames import quotas
from vtc.ops.host import put
from vtc.ops.select import settle, top_k

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
        parts = frames.parts
        x = unit(view)
        rows = parts.take(x)
        whole = view.mean(x).repeat_interleave(frames.most, 0)
        like_video, like_frame = nearness(rows, whole), nearness(rows, frames.mean(rows))
        weight = share(frames.mean(like_video).view_as(frames.sizes), frames.sizes > 0, self.temperature)
        quota = quotas(weight * frames.sizes, put(view.keep, view.device), frames.sizes, least=1)
        unlike = -(like_video + like_frame)
        return Selection(
            parts.give(top_k(unlike, quota.flatten(), parts.mask)), counts=view.keep, scores=parts.give(unlike)
        )


def unit(view: StageView) -> Tensor:
    """[I, N, D] the tokens at unit length, channels of high variance set to zero."""
    x = view.tokens.float()
    variance = view.mean((x - view.mean(x)[:, None]).square())
    half = torch.full_like(variance[:, 0], x.shape[2] // 2, dtype=torch.long)
    return torch.nn.functional.normalize(x * top_k(-variance, half)[:, None], dim=2)


def nearness(x: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussians of the distances to a centre; [R, W, D] of unit length, [R, D] -> [R, W]."""
    square = 1 + centre.square().sum(1, keepdim=True) - 2 * torch.bmm(x, centre[..., None]).squeeze(2)
    return torch.stack([(-square.clamp(min=0) / (2 * width)).exp() for width in WIDTHS]).sum(0)


def share(near: Tensor, real: Tensor, temperature: float) -> Tensor:
    """What frames count for, 1 in the mean: [I, G] how near they are to their video, and which there are -> [I, G].

    >>> share(torch.tensor([[3.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool), 0.01).tolist()
    [[1.0, 1.0]]
    """
    odd = (settle(-near, real) / temperature).softmax(1)
    return torch.where(real, 1 + odd - 1 / real.sum(1, keepdim=True).clamp(min=1), 0)
