"""DART: a few pivot tokens, and the tokens that duplicate them least (arXiv:2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.method.registry import register
from vtc.method.staged import ScheduledCompressor
from vtc.ops.host import put
from vtc.ops.rank import order_by
from vtc.ops.select import settle, take_rows, top_k
from vtc.ops.similarity import alignments


@dataclass(frozen=True)
class KeySizes(LLMReading):
    """L1 norm of each key vector, all heads together, in the mean over all rotary angles: [B, K].

    The mean of ``|a cos t - b sin t| + |a sin t + b cos t|`` over t is ``4 sqrt(a^2 + b^2) / pi``; the factor ranks
    nothing and is left out.
    """

    name: ClassVar[str] = "key sizes"

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        first, second = attention.key.float().chunk(2, dim=3)  # the two numbers of a rotated pair
        return torch.hypot(first, second).sum((1, 3))


SIZES = KeySizes()


@register
class DART(ScheduledCompressor):
    """Keep pivots, the tokens with the largest keys, and for each pivot the tokens that resemble it least.

    Acts inside the LLM, before layer K; training-free, reads no attention. Pivots of an image are the visual tokens and
    the text tokens whose keys in layer K - 1 have the largest L1 norm, all heads together.
    Tokens are compared by the cosine of ``y = norm(h_K)``, norm being the one behind the LLM's last layer. The visual
    pivots stay. Then each pivot in turn, visual ones first, the largest first, takes the tokens of lowest cosine that
    are still free: of what is left of the budget its equal share, rounded up, so that the count is exact. Ties go to
    the lower index, kept tokens stay in their order and at their positions.

    layer: K, 2 in the paper. 0 acts before the LLM, on its input embeddings: their L1 norms choose the pivots, their
    cosines the tokens. schedule: instead of it, tokens leave before several layers, at each by new pivots; such as
    "sigmoid(8)", "cosine" or a rate for every layer, which takes no budget. pivots: how many visual and how many text
    tokens.

    Departures from the paper and its code: the code gives each of eight pivots floor(k / 8) tokens, so that it keeps 4
    more than it is asked for (68 for 64, 132 for 128, 196 for 192), and takes pivots in the order of a Python set,
    which is arbitrary. Its L1 norm is that of the rotated keys, which changes with the padding in front of the prompt;
    here it is the mean over all rotations, which does not. Every image has its own pivots and its own share. Text is
    all of the prompt that is neither visual nor system prompt, in front of the images too. The budget is the mean over
    all layers, as for every method here. Newline tokens stay and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("dart").plan(llava).needs.llm
    {1: KeySizes()}
    >>> vtc.create("dart", layer=0).plan(llava).stages
    (0,)
    """

    layer: int = 2
    pivots: tuple[int, int] = (4, 4)

    name: ClassVar[str] = "dart"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 0:
            raise VTCError(f"layer={self.layer!r} is no LLM layer; pass 0 for the LLM's input or 2 as in the paper")
        if self.pivots[0] < 1 or self.pivots[1] < 0:
            raise VTCError(
                f"pivots={self.pivots!r} has to name at least one visual pivot and no fewer than 0 text pivots; the "
                "paper uses (4, 4)"
            )
        self.alone("layer")

    def plan(self, model: ModelSpec) -> Plan:
        stages = self.starts(model) or (self.layer,)
        return Plan(stages, Needs(llm={stage - 1: SIZES for stage in stages if stage}), "preserve")

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        items, layer = view.items, view.stage
        if self.schedule is not None:
            counts = self.left(view, layer)
            if counts == items.counts:
                return None
        else:
            counts = view.keep_from_layer(layer) if layer else view.keep
        keep = put(counts, view.device)
        if layer:
            rows = view.llm_rows[layer - 1, SIZES]
            tokens, sizes = view.final_norm(view.tokens), view.llm_attention(layer - 1, SIZES)
        else:
            rows = view.hidden.float().abs().sum(2)
            tokens, sizes = view.tokens, view.tokens.float().abs().sum(2)
        place, own = largest(sizes, items.mask, self.pivots[0])
        own &= torch.arange(place.shape[1], device=place.device) < keep[:, None]
        spoken, said = largest(rows, view.text, self.pivots[1])
        text = view.states.take(spoken)
        text = view.final_norm(text) if layer else text
        pivots = torch.cat([take_rows(tokens, place), text[items.row]], 1)
        cosine = alignments(tokens, torch.nn.functional.normalize(pivots.float(), dim=2))
        first = torch.zeros_like(items.mask).scatter(1, place, own)
        kept = least_alike(
            cosine, torch.cat([own, said[items.row]], 1), first, keep, items.mask, max(counts, default=0)
        )
        return Selection(kept, counts=counts)


def largest(sizes: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places of the `count` largest unmasked entries, falling, and which of them exist; [R, N] -> two [R, count]."""
    order = order_by(best=settle(sizes, mask))[:, :count]
    return order, torch.arange(order.shape[1], device=order.device) < mask.sum(1, keepdim=True)


def least_alike(
    cosine: Tensor, real: Tensor, kept: Tensor, keep: Tensor, mask: Tensor, most: int | None = None
) -> Tensor:
    """Add to `kept` what resembles the pivots least, pivot by pivot, until each item has `keep` tokens.

    cosine: [I, P, N] to the pivots. real: [I, P] bool, which of them there are. kept, mask: [I, N] bool. keep: [I].
    most: no item keeps more, where the host knows. Returns [I, N] bool.
    """
    for pivot in range(real.shape[1]):
        waiting = real[:, pivot:].sum(1).clamp(min=1)
        share = -(-(keep - kept.sum(1)) // waiting) * real[:, pivot]
        kept = kept | top_k(-cosine[:, pivot], share, mask & ~kept, most=most)
    return kept
