"""The learned part of QueCC: one query for each block, which attends to the tokens of its block alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtc.ops.select import take_rows

EPSILON = 1e-6
LOUD, SHARP = 3.0, 2.0
"""Of a fresh module: the size of an entry of the projected question, which would be small beside a token at 1, and how
many times larger than usual the attention's weights of queries and keys begin, which would begin nearly flat."""


def projection(inputs: int, width: int) -> nn.Sequential:
    """Two linear layers with GELU between and a LayerNorm behind them."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=EPSILON))


class BlockAttention(nn.Module):
    """Queries from tokens and question by a depthwise convolution, keys and values from the encoder, block by block.

    hidden: width of the tokens and of the question. features: width of what the encoder says of a token. width, heads:
    of the attention. stride: side of a block and of the kernel. A fresh one gives the mean of each block.
    """

    def __init__(self, hidden: int, features: int, width: int, heads: int, stride: int) -> None:
        super().__init__()
        linear, norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, eps=EPSILON)
        nn.init.zeros_(linear.bias)  # it would be most of what the norm sees, and all questions alike
        nn.init.constant_(norm.weight, LOUD)
        self.text_projection = nn.Sequential(linear, norm)
        self.q_proj = projection(hidden, width)
        self.k_proj, self.v_proj = projection(features, width), projection(features, width)
        self.conv = nn.Conv2d(width, width, stride, stride, groups=width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = nn.Linear(width, hidden)
        with torch.no_grad():
            self.attention.in_proj_weight[: 2 * width] *= SHARP
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, tokens: Tensor, features: Tensor, question: Tensor, taps: Tensor, place: Tensor, real: Tensor
    ) -> Tensor:
        """Rows for the LLM, one for each block: [I, G, hidden] float32.

        tokens: [I, N, hidden]. features: [I, N, features]. question: [I, hidden]. taps: [I, G, stride * stride] tokens
        under the kernel. place, real: [I, G, W] tokens of each block, and which of them there are. What is returned of
        a block without tokens means nothing.
        """
        asked = tokens + self.text_projection(question)[:, None]
        kernel, bias = self.conv.weight.flatten(1).T, self.conv.bias
        assert bias is not None
        query = (grouped(self.q_proj(asked), taps) * kernel).sum(2) + bias
        key, value = (grouped(part(features), place).flatten(0, 1) for part in (self.k_proj, self.v_proj))
        unseen = (~real & real.any(2, keepdim=True)).flatten(0, 1)  # a softmax needs something to see
        mixed, _ = self.attention(query.flatten(0, 1)[:, None], key, value, key_padding_mask=unseen, need_weights=False)
        mean = torch.where(real[..., None], grouped(tokens, place), 0).sum(2) / real.sum(2, keepdim=True).clamp(min=1)
        added: Tensor = self.out(mixed.view_as(query))
        return mean + added


def grouped(rows: Tensor, place: Tensor) -> Tensor:
    """[I, G, W, C] rows [I, N, C] at the places [I, G, W]."""
    return take_rows(rows, place.flatten(1)).view(*place.shape, rows.shape[2])
