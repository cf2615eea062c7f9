"""QueCC: the question looks at the picture block by block, and each block becomes one token (arXiv:2411.03312)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc.errors import BudgetError, UnsupportedCall, VTCError
from vtc.method.base import ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.budget import tokens_to_keep
from vtc.method.learned import LearnedCompressor
from vtc.method.registry import register
from vtc.method.schedule import scaled
from vtc.methods.quecc.attention import BlockAttention
from vtc.methods.quecc.blocks import Blocks, blocks
from vtc.ops.host import put
from vtc.ops.select import in_groups, put_rows
from vtc.ops.similarity import total

LEVELS, PROJECTED = (12, 16, 22, 23), 23
"""The published hidden states of a CLIP whose hidden state 23 is the one that is projected; 0 are the embeddings."""


@register
class QueCC(LearnedCompressor):
    """QueCC: each block of s x s tokens becomes one, mixed by a trained attention whose queries know the question.

    Acts before the LLM, needs weights and the hidden states of several encoder layers, text-aware (arXiv:2411.03312).
    With X the tokens, M what the encoder layers say of them, one behind the other, and u the question:
    ``Q = conv(q_proj(X + text_projection(u)))``, a depthwise convolution with kernel and stride s over the raster;
    ``K, V = k_proj(M), v_proj(M)``; each query attends to the keys of its own block alone, which gives one row per
    block. Projections are Linear, GELU, Linear, LayerNorm.

    weights: a file or embedded name, see `vtc train --method quecc`. stride: s, for which the weights are trained; the
    budget has to be what it gives, retention ``1 / s^2`` (0.25 for 2, 0.111 for 3, 0.0625 for 4), and others are
    refused. width, heads: of the attention.

    Departures from the paper and its code: the published module sits in front of the projector and is trained together
    with projector and LLM; here it sits behind the projector, X are the projected tokens, and ``out`` (a linear layer
    that starts at zero) adds the attention to the mean of each block, so that a fresh module pools and a frozen model
    has to learn the difference alone. u is the mean of the embedded text of the prompt, not the LLM's last hidden state
    of its last token, which costs another pass of the LLM. Encoder layers are the published ones scaled to the
    encoder's depth; where the model makes one token of several patches, M is their mean. Sides that s does not divide,
    and budgets that newlines share, give blocks as `pool` lays its cells, their sides differing by at most one: shorter
    blocks are padded and masked, the kernel reads the nearest tokens. Videos are taken frame by frame, tiles one by
    one. Weights are stored in half precision, the module computes in float32.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> sorted(vtc.create("quecc", stride=2, training=True).plan(llava).needs.vision)
    [11, 15, 21, 22]
    """

    stride: int = 4
    width: int = 1024
    heads: int = 8

    name: ClassVar[str] = "quecc"
    small: ClassVar[Mapping[str, Any]] = {"stride": 2, "width": 32}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 2:
            raise VTCError(f"stride={self.stride} makes no block of several tokens; write 2 or more, the paper's is 4")
        if min(self.width, self.heads) < 1 or self.width % self.heads:
            raise VTCError(
                f"width={self.width} cannot be split over heads={self.heads}; write for example width=1024, heads=8"
            )

    @property
    def only_retention(self) -> float:
        """One token of each block."""
        return 1 / self.stride**2

    # --- the module and its weights
    def layers(self, model: ModelSpec) -> tuple[int, ...]:
        """Encoder layers whose output is read: the published ones scaled to the model's feature layer."""
        depth = model.feature_layer + 1
        return tuple(level - 1 for level in scaled(LEVELS, depth, of=PROJECTED, first=1, last=depth))

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(vision=dict.fromkeys(self.layers(model), Rows.HIDDEN))
        return dataclasses.replace(super().plan(model), needs=needs)

    def build(self, model: ModelSpec) -> nn.Module:
        features = len(self.layers(model)) * model.vision_width
        return BlockAttention(model.width, features, self.width, self.heads, self.stride)

    def settings(self, model: ModelSpec) -> dict[str, str]:
        return {
            "stride": str(self.stride),
            "width": str(self.width),
            "heads": str(self.heads),
            "layers": ",".join(map(str, self.layers(model))),
        }

    def save(
        self, path: str | Path, module: nn.Module, model: ModelSpec, notes: Mapping[str, str] | None = None
    ) -> Path:
        return super().save(path, copy.deepcopy(module).half(), model, notes)

    # --- one call
    def select(self, view: StageView) -> Selection:
        assert view.module is not None
        items, device = view.items, view.device
        whole = self._whole(view)
        found = self._blocks(view)
        owner, centre, taps = (
            pad_sequence(parts, batch_first=True, padding_value=fill).to(device, non_blocking=True)
            for parts, fill in (
                ([each.owner for each in found], -1),
                ([each.centre for each in found], 0),
                ([each.taps for each in found], 0),
            )
        )
        counts = [len(each.centre) for each in found]
        there = torch.arange(centre.shape[1], device=device) < put(counts, device)[:, None]
        place, real = in_groups(owner, centre.shape[1], max(each.widest for each in found), owner >= 0)
        rows = view.module(view.tokens.float(), self.features(view), self.question(view), taps, place, real)
        kept = put_rows(torch.zeros_like(items.mask), centre, there, there)
        mixed = there & ~put(whole, device)[:, None]  # alone, an item that stays whole would not reach the method
        tokens = put_rows(view.tokens, centre, mixed, rows.to(view.tokens.dtype))
        into = torch.where(owner < 0, -1, centre.gather(1, owner.clamp(min=0)))
        return Selection(kept, counts=counts, tokens=tokens, merged_into=into)

    def features(self, view: StageView) -> Tensor:
        """[I, N, layers * C] what the encoder layers say of each token, side by side."""
        return torch.cat([view.vision_attention(layer).float() for layer in self.layers(view.model)], 2)

    def question(self, view: StageView) -> Tensor:
        """[I, D] mean of the embedded text of the prompt that an item belongs to."""
        mean = total(view.hidden, view.text) / view.text.sum(1, keepdim=True).clamp(min=1)
        return mean[view.items.row]

    def _blocks(self, view: StageView) -> list[Blocks]:
        """The blocks of every item; raises UnsupportedCall for items that are no full rasters."""
        items = view.items
        for item, held in zip(items.layouts, items.counts, strict=True):
            if not item.regions or held != item.selectable:
                raise UnsupportedCall(
                    f"{self.name!r} needs items whose tokens form full rasters, this {item.kind} has {held} of "
                    f"{item.selectable} in {len(item.regions)} rasters; choose another method here"
                )
        pairs = zip(items.layouts, view.keep, strict=True)
        return [blocks(item.regions, keep, self.stride) for item, keep in pairs]

    def _whole(self, view: StageView) -> list[bool]:
        """Which items stay whole; raises BudgetError where others get more or fewer than one token of s x s."""
        share = self.only_retention
        for granted, given in zip(view.granted, view.items.input_counts, strict=True):
            wanted = tokens_to_keep(given, share)
            if granted not in (given, wanted):
                others = ", ".join(f"{1 / side**2:.4g} (stride={side})" for side in range(2, 7) if side != self.stride)
                raise BudgetError(
                    f"the weights of {self.name!r} make one token of {self.stride} x {self.stride}, and the budget "
                    f"grants {granted} of {given}; ask for retention={share:.4g} (keep={wanted}), or train weights for "
                    f"{others}"
                )
        return [granted == held for granted, held in zip(view.keep, view.items.counts, strict=True)]
