"""ToMe: bipartite merging of similar tokens, weighted by what they already stand for (arXiv:2210.09461)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from vtc.errors import VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Plan, Scope, Selection, StageView
from vtc.method.parts import even, merge_items, merged_inside, merging_plan
from vtc.method.registry import register
from vtc.method.vision_readings import MeanKeys
from vtc.ops.merge import bipartite_merge, merge_plan, merge_rows
from vtc.ops.select import take_rows

Metric = Literal["keys", "features"]


KEYS = MeanKeys()


@register
class ToMe(Compressor):
    """Merge the pairs of tokens whose keys are most alike, as means weighted by the number of patches in them.

    Training-free, text-agnostic. Every other token proposes its best partner among the rest by the cosine of their
    keys (mean over heads, section 3 of the paper); the best pairs merge, sizes add up. By default it acts before the
    LLM: the projected tokens of each crop or frame are merged by halves until the budget is met, with the keys of the
    feature layer (the last one up to it that sees the whole image), a merged token staying where its target was.

    inside: merge in the vision encoder instead, a few tokens after every block up to the feature layer, spread evenly;
    for encoders that allow it, the budget then being counted per crop. r: tokens to merge after every block instead,
    one number or a list of them (blocks behind its end merge nothing); takes no budget, the paper uses 8 to 16.
    inflection: -1 to 1, how the number falls (negative) or rises over the blocks around r. proportional: later blocks
    attend to a merged token as often as it has patches, softmax(Q K^T / sqrt(d) + log size) (equation 1 of the paper;
    inside the encoder only; the authors leave it out for encoders trained by masking, such as MAE's). metric: "keys",
    or "features" for the tokens themselves. scope: merge in each "crop" or frame or over the whole "item", before the
    LLM.

    Departures from the paper and its code: the default acts behind the encoder, which is no faster inside it but works
    on every model; inside, tokens merge after a block and not between its attention and its MLP, and behind the last
    block tokens return to the order of their targets (the code leaves them as even, then odd ones); a retention makes
    r as even over the blocks as whole tokens allow. The class token stays out of it, as in the code. Keys carry rotary
    positions where the encoder has them.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("tome", inside=True, r=16).plan(llava).stages[:2]
    (EncoderStage(layer=1), EncoderStage(layer=2))
    """

    inside: bool = False
    r: int | tuple[int, ...] | None = None
    inflection: float = 0.0
    metric: Metric = "keys"
    scope: Scope = "crop"
    proportional: bool = True

    name: ClassVar[str] = "tome"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and not self.inside:
            raise VTCError(f"r={self.r} counts tokens per encoder block; pass inside=True, or leave r out")
        if self.r is not None and min(self.r if isinstance(self.r, tuple) else (self.r,), default=0) < 0:
            raise VTCError(f"r={self.r} is negative; write for example r=16")
        if not -1 <= self.inflection <= 1 or (self.inflection and not isinstance(self.r, int)):
            raise VTCError(f"inflection={self.inflection} has to lie in [-1, 1] and needs one number r")

    @property
    def needs_budget(self) -> bool:
        """False where r says how much to merge."""
        return self.r is None

    def plan(self, model: ModelSpec) -> Plan:
        reading = KEYS if self.metric == "keys" else None
        return merging_plan(model, reading, inside=self.inside, sizes=self.proportional)

    def steps(self, blocks: int, tokens: int, keep: int | None) -> list[list[int]]:
        """Tokens to merge after each of `blocks` blocks, a list of steps each; keep: how many are to be left.

        >>> ToMe(inside=True).steps(3, 10, 5), ToMe(inside=True, r=4).steps(3, 10, None)
        ([[1], [2], [2]], [[4], [3], [1]])
        """
        if keep is not None:
            gone = tokens - keep
            wanted = [gone * (block + 1) // blocks - gone * block // blocks for block in range(blocks)]
        elif isinstance(self.r, tuple):
            wanted = [*self.r, *[0] * blocks][:blocks]
        else:
            assert self.r is not None
            low = int(self.r * (1 - self.inflection))
            rise = (2 * self.r - 2 * low) / max(1, blocks - 1)
            wanted = [int(low + rise * block) for block in range(blocks)]
        plans: list[list[int]] = []
        for r in wanted:
            plans.append([min(r, tokens // 2)])
            tokens -= plans[-1][0]
        if keep is not None:  # more than half of the tokens cannot merge at once
            plans[-1] += merge_plan(tokens, keep)
        return plans

    def select(self, view: StageView) -> Selection | None:
        if isinstance(view.stage, EncoderStage):
            return self._inside(view, view.stage.layer - 1)
        if view.keep == view.items.counts:
            return None
        metric = view.vision_attention(view.model.key_layer, KEYS) if self.metric == "keys" else view.tokens
        return merge_items(view, view.keep, metric, scope=self.scope, weighted=True, raster=True)

    def _inside(self, view: StageView, block: int) -> Selection | None:
        """After encoder block `block`. Rows stay in the order of the algorithm until the last block."""
        items, blocks, patches = view.items, view.model.feature_layer + 1, even(view)
        keep = view.keep[0] if self.needs_budget and block == 0 else None
        if block == 0:
            view.memory[self, "plans"] = self.steps(blocks, patches, keep)
            view.memory[self, "rows"] = torch.ones_like(items.token, dtype=torch.float32), items.token
        (size, origin), plan = view.memory[self, "rows"], view.memory[self, "plans"][block]
        last = block == blocks - 1
        if not sum(plan) and not last:
            return None
        metric = view.vision_attention(block, KEYS) if self.metric == "keys" else view.tokens
        # The class token takes the first place among those that propose, which decides who the others are.
        lead, groups = int(view.model.has_cls), len(items)
        merge = bipartite_merge(
            torch.nn.functional.pad(metric, (0, 0, lead, 0)),
            [patches + lead] * groups,
            [plan] * groups,
            size=torch.nn.functional.pad(size, (lead, 0), value=1.0),
            order="index" if lead else "similarity",
            protected=lead,
        )
        left = merge.counts[0] - lead
        rows = merge_rows(view.tokens, merge.target[:, lead:] - lead, merge.weight[:, lead:], left)
        size, origin = merge.size[:, lead:], origin.gather(1, merge.anchor[:, lead:] - lead)
        if last:
            order = origin.argsort(dim=1)
            rows, size, origin = take_rows(rows, order), take_rows(size, order), take_rows(origin, order)
        view.memory[self, "rows"] = size, origin
        return merged_inside(view, rows, origin, size if self.proportional else None)
