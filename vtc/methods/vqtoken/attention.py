"""The attention block of VQToken: queries from the map of cluster numbers, keys and values from the codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VQAttention(nn.Module):
    """One post-norm Transformer decoder layer whose parameters are named as in the official checkpoints.

    places: entries of one row of the index map (query_dim in the released code). width: hidden size of the LLM. heads,
    inner (width of the feed-forward part), dropout: as published 8, 2048 and 0.1.
    """

    def __init__(self, places: int, width: int, *, heads: int = 8, inner: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        self.to_q_proj = nn.Linear(places, width)
        layer = nn.TransformerDecoderLayer(width, heads, inner, dropout, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, num_layers=1)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.to_q_proj.bias)

    def forward(
        self,
        index_map: Tensor,
        codes: Tensor,
        rows: Tensor | None = None,
        sizes: Tensor | None = None,
        *,
        residual: bool = False,
    ) -> Tensor:
        """Rows for the LLM, max(T, K) of each item; the shorter of map rows and codes is repeated cyclically.

        index_map: [I, T, places] cluster numbers. codes: [I, K, width]. rows, sizes: [I] map rows and codes of each
        item, all of them if left out. residual: add code j to query and output row j. Returns [I, max(T, K), width];
        what lies behind an item's own max(rows, sizes) means nothing.
        """
        items, most, _ = index_map.shape
        device, dtype = codes.device, self.to_q_proj.weight.dtype
        rows = torch.full((items,), most, device=device) if rows is None else rows
        sizes = torch.full((items,), codes.shape[1], device=device) if sizes is None else sizes
        steps = torch.arange(max(most, codes.shape[1]), device=device)
        item = torch.arange(items, device=device)[:, None]
        memory = codes.to(dtype)[item, steps % sizes[:, None]]
        queries = self.to_q_proj(index_map.to(dtype))[item, steps % rows[:, None]]
        if residual:
            queries = queries + memory
        behind = steps >= torch.maximum(rows, sizes)[:, None]
        mixed: Tensor = self.transformer_decoder(
            queries, memory, tgt_key_padding_mask=behind, memory_key_padding_mask=behind
        )
        return mixed + memory if residual else mixed
