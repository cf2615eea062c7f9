"""DiffRate: in every block the least important tokens are pruned and the next ones merged (arXiv:2305.17997)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Plan, Selection, StageView
from vtc.method.parts import even, inside_plan, merged_inside
from vtc.method.registry import register
from vtc.ops.rank import order_by
from vtc.ops.select import first_best, settle, take_rows

PUBLISHED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "deit_s_2.9g": (
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
}
"""Tokens left by pruning and by merging in each block, class token included: learned for DeiT-S (197 tokens, 12
blocks) at 2.9 GFLOPs, from the authors' released code."""
ALIKE = 1e-5
"""Cosines closer than this count as equal."""


@register
class DiffRate(Compressor):
    """In every block, prune the tail of the patches in the order of importance and merge what is the tail then.

    Training-free with given numbers, text-agnostic; inside the encoder alone, for encoders that allow it. Behind every
    block patches are ranked by the attention the class token pays them, mean over heads (without a class token: by the
    attention they receive). All but the first p are pruned, and of these all but the first m merge: each joins the one
    of the first m with the highest cosine of their features. What merges becomes a plain mean, sizes add up as
    ``size + sum(cosine * size of what joins)``, and later blocks attend to a token in proportion to its size,
    softmax(Q K^T / sqrt(d) + log size). The class token is never a partner.

    prune, merge: p and m of each block up to the feature layer, class token included where there is one; they take no
    budget. lists: published ones by name instead; the paper learns them for one network by gradient descent. share: of
    what leaves a block, the part that is pruned, where a budget says how much that is: then the same number leaves
    every block. proportional: attention in proportion to sizes.

    Departures from the paper and its code: nothing is learned here; the default numbers fall evenly, which is ours.
    Tokens leave behind a block and not between its attention and its MLP, and stay in the order of the picture. A
    budget counts per crop. Sizes below 1e-6, of tokens that others point away from, are raised to it.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 encoder layers
    >>> len(vtc.create("diffrate").plan(llava).stages)
    23
    """

    lists: Literal["deit_s_2.9g"] | None = None
    prune: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    share: float = 0.5
    proportional: bool = True

    name: ClassVar[str] = "diffrate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prune is None) != (self.merge is None) or (self.lists and self.prune):
            raise VTCError(
                f"lists={self.lists!r}, prune={self.prune}, merge={self.merge} do not say once what every block "
                "leaves; pass prune and merge together, or lists alone, or a budget"
            )
        if not 0 <= self.share <= 1:
            raise VTCError(f"share={self.share} is outside [0, 1]; it is the part of what leaves that is pruned")
        if self.given is not None:
            steps = [n for pair in zip(*self.given, strict=False) for n in pair]
            if len(self.given[0]) != len(self.given[1]) or steps != sorted(steps, reverse=True) or steps[-1] < 1:
                raise VTCError(
                    f"prune={self.prune}, merge={self.merge} are no numbers of tokens that fall from block to block; "
                    "write one of each per block, for example prune=(9, 7), merge=(8, 5)"
                )

    @property
    def given(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The lists that are used, None where the budget decides."""
        if self.lists is not None:
            return PUBLISHED[self.lists]
        return None if self.prune is None or self.merge is None else (self.prune, self.merge)

    @property
    def needs_budget(self) -> bool:
        """False where lists say how much leaves."""
        return self.given is None

    def plan(self, model: ModelSpec) -> Plan:
        blocks = model.feature_layer + 1
        if self.given is not None and len(self.given[0]) != blocks:
            raise UnsupportedMethod(
                f"lists of {len(self.given[0])} blocks were given, this {model.family} encoder has {blocks} up to its "
                "features; give as many numbers, or a budget"
            )
        reading = model.patch_attention
        return inside_plan("'diffrate'", model, reading, attention=True, sizes=self.proportional)

    def steps(self, blocks: int, tokens: int, keep: int | None, lead: int) -> list[tuple[int, int]]:
        """(p, m) of patches for each block. keep: patches to be left; None where lists decide. lead: 1 or 0 in them.

        >>> DiffRate().steps(3, 16, 7, 1), DiffRate(prune=(17, 12), merge=(15, 9)).steps(2, 16, None, 1)
        ([(14, 13), (11, 10), (8, 7)], [(16, 14), (11, 8)])
        """
        if self.given is not None:
            return [(p - lead, m - lead) for p, m in zip(*self.given, strict=True)]
        assert keep is not None
        left = [tokens - (tokens - keep) * (block + 1) // blocks for block in range(blocks)]
        gone = [before - after for before, after in zip([tokens, *left], left, strict=False)]
        return [(after + one - math.ceil(one * self.share), after) for after, one in zip(left, gone, strict=True)]

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, EncoderStage)
        items, block, has_cls = view.items, view.stage.layer - 1, view.model.has_cls
        tokens = even(view)
        if block == 0:
            keep = view.keep[0] if self.needs_budget else None
            plan = self.steps(view.model.feature_layer + 1, tokens, keep, int(has_cls))
            if self.given is not None and not 1 <= plan[-1][1] <= plan[0][0] <= tokens:
                raise UnsupportedMethod(
                    f"the lists begin with {plan[0][0]} patches and end with {plan[-1][1]}, this encoder has {tokens}; "
                    "lists belong to one number of patches, give others or a budget"
                )
            view.memory[self] = plan, torch.ones_like(items.token, dtype=torch.float32)
        plan, size = view.memory[self]
        pruned, left = plan[block]
        if left == tokens:
            return None
        score = settle(view.vision_attention(block, view.model.patch_attention))
        order = order_by(best=score)[:, :pruned]
        first = order[:, :left].sort(dim=1).values  # in the order of the picture
        rows, size = merge_tail(view.tokens, size, first, order[:, left:])
        view.memory[self] = plan, size
        sizes = size.clamp(min=1e-6) if self.proportional else None
        return merged_inside(view, rows, items.token.gather(1, first), sizes)


def merge_tail(tokens: Tensor, size: Tensor, first: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Plain means [G, m, D] of the `first` tokens and what of the `tail` joins them, and their sizes [G, m].

    tokens: [G, t, D], size: [G, t]; first [G, m] and tail [G, r] name tokens. Of equal partners the earlier one.
    """
    goal, source = take_rows(tokens, first), take_rows(tokens, tail)
    sizes = size.gather(1, first)
    if not tail.shape[1]:
        return goal, sizes
    alike = functional.normalize(source.detach().float(), dim=-1)
    alike = alike @ functional.normalize(goal.detach().float(), dim=-1).transpose(1, 2)
    into = first_best(alike, ALIKE)
    cosine = alike.gather(2, into[..., None])[..., 0]
    sizes = sizes.scatter_add(1, into, cosine * size.gather(1, tail))
    members = torch.ones_like(sizes).scatter_add(1, into, torch.ones_like(cosine))
    sums = goal.float().scatter_add(1, into[..., None].expand_as(source), source.float())
    return (sums / members[..., None]).to(tokens.dtype), sizes
