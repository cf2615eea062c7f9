"""AIM: similar tokens are averaged before the LLM, the rest leaves it layer by layer (arXiv:2412.03248)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import (
    PRE_LLM,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Order,
    Plan,
    Positions,
    Scope,
    Selection,
    Stage,
    StageView,
)
from vtc.method.budget import tokens_to_keep
from vtc.method.parts import groups, merge_items
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.method.registry import register
from vtc.method.rows import Rows
from vtc.methods.aim.schedule import entering_tokens, falling_shares, layer_tokens, moved_tokens
from vtc.ops.host import put
from vtc.ops.merge import merge_plan
from vtc.ops.pagerank import pagerank
from vtc.ops.select import top_k

Metric = Literal["auto", "keys", "features"]
Votes = Literal["alive", "masked"]


@dataclass(frozen=True)
class Importance(LLMReading):
    """PageRank mass of every token after a few steps on the sharpened attention of the layer: [B, K]."""

    tau: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    name: ClassVar[str] = "PageRank importance"

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        return pagerank(
            attention.query, attention.key, attention.scaling, tau=self.tau, iterations=self.iterations,
            damping=self.damping, mask=rows.mask, causal=True, voters=rows.prompt,
        )  # fmt: skip


@register
class AIM(Compressor):
    """Average similar tokens before the LLM, then remove tokens inside it on a falling schedule.

    Training-free, no class token. *Merging* is bipartite soft matching, repeated: in each crop or frame every even
    token proposes the odd token of highest cosine similarity, the best pairs become plain means, a merged token
    counting once. It halves the tokens until the wanted number is left. *Pruning* keeps the share
    ``r(l) = min(1, max(0, 1 - (l - l1) / (l2 - l1)))`` of the tokens that entered the LLM at its layer l, those of
    highest importance in the layer before: ``p <- p softmax(S / tau)`` five times from a uniform start, S the scaled
    attention logits, root mean square over heads. Newlines and other separators are ranked with the tokens and leave
    with them. Ties go to the lower position; nothing is ranked where everything goes.

    Budget: the mean over the LLM layers. Merging and pruning share it: with the schedule's mean share sigma (0.661 of
    28 layers, 0.547 of 32), each item keeps the merged tokens whose layer counts come closest to the budget. A budget
    above sigma merges nothing and starts to prune later. Merging alone has all of it; pruning alone moves the schedule.

    merge, prune: the two halves; switch one off to compose the other with another method. schedule: (l1, l2); by
    default half of the layers and, beginning there, a fall over 2/7 of them (14, 22 of 28), but 13, 21 of 32. Given,
    it is not moved. merge_ratio: share of tokens left by merging, instead of what the budget says; with 0.25 and the
    default schedule this is the published OneVision setting. steps: tokens merged away at each step instead, (98, 49)
    or (288, 36) in the released code; both take no budget. metric: "keys" matches on the keys of the encoder's last
    layer, "features" on what enters the LLM; "auto" takes keys where the encoder has a class token and the image is one
    crop (CLIP in LLaVA, where the released code does so and merges before the projector). scope: merge in each "crop"
    or frame, or over the whole "item". order: "official" lays merged tokens out as the algorithm lists them (unmerged
    ones by falling similarity, then the others), "raster" leaves each where its target was. tau, iterations, damping:
    of the importance. votes: "alive" removes tokens for good; "masked" is the released code's way, which only hides
    them: nothing is saved, and hidden tokens go on voting. It is there for comparison; separators stay then.

    Departures from the paper and its code: tokens are removed, not hidden, so only survivors vote; importance is
    computed in the layers whose schedule ranks by it (and in the first of them) and not in all, streamed, in
    float32; in batches every image or video has its own count; images are merged on every model, not only on
    LLaVA-1.5; the last visual token of Qwen is visual; decoding sees what its layer kept (the released Qwen2 path
    overwrites its mask after the first token); schedules move by fractions of a layer to meet the budget; fewer
    tokens than frames are merged across frames; under multi-axis rotary positions merged tokens keep the ids of the
    places they are laid on, where the released code takes those of a grid of half the size (elsewhere positions are
    numbered without gaps where the tokens enter the LLM, and unchanged inside it, as released).

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("aim", prune=False).plan(llava).stages
    (EncoderStage(layer=23),)
    >>> vtc.create("aim", schedule=(14, 22)).plan(llava).stages[:3]
    (EncoderStage(layer=23), 15, 16)
    """

    merge: bool = True
    prune: bool = True
    schedule: tuple[int, int] | None = None
    merge_ratio: float | None = None
    steps: tuple[int, ...] | None = None
    metric: Metric = "auto"
    scope: Scope = "crop"
    order: Order = "official"
    tau: float = 0.1
    iterations: int = 5
    damping: float = 0.0
    votes: Votes = "alive"

    name: ClassVar[str] = "aim"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.merge or self.prune):
            raise VTCError("merge=False and prune=False leave nothing to do; switch one of them on")
        if self.schedule is not None and not 0 <= self.schedule[0] < self.schedule[1]:
            raise VTCError(
                f"schedule={self.schedule} is no pair of layers l1 < l2 from 0 on; write for example (14, 22)"
            )
        if self.merge_ratio is not None and self.steps is not None:
            raise VTCError("merge_ratio and steps both say how much to merge; pass one of them")
        if self.merge_ratio is not None and not 0 < self.merge_ratio <= 1:
            raise VTCError(f"merge_ratio={self.merge_ratio} is outside (0, 1]; the paper uses 0.25")
        if self.steps is not None and not all(r >= 0 for r in self.steps):
            raise VTCError(f"steps={self.steps} holds negative counts; write for example (98, 49)")
        if self.tau <= 0 or self.iterations < 1 or not 0 <= self.damping < 1:
            raise VTCError(
                f"tau={self.tau}, iterations={self.iterations}, damping={self.damping} rank nothing; use a positive "
                "tau, at least one iteration and a damping in [0, 1); the paper uses 0.1, 5 and 0"
            )

    @property
    def needs_budget(self) -> bool:
        """False where hyper-parameters alone decide: a given merge, or pruning alone on a given schedule."""
        if self.merge:
            return self.merge_ratio is None and self.steps is None
        return self.schedule is None

    @property
    def reading(self) -> Importance:
        """What is recorded of the LLM layers."""
        return Importance(self.tau, self.iterations, self.damping)

    # --- where
    def bounds(self, model: ModelSpec) -> tuple[int, int]:
        """l1 and l2 on this model."""
        if self.schedule is not None:
            return self.schedule
        if model.llm_layers == 32:
            return 13, 21
        start = model.llm_layers // 2
        return start, start + max(1, round(model.llm_layers * 2 / 7))

    def moves(self, budgeted: bool) -> bool:
        """True when the budget may move the schedule."""
        return budgeted and self.prune and self.schedule is None

    def merge_stage(self, model: ModelSpec) -> Stage:
        """Before the projector where matching uses keys and a patch is a token of the LLM, else before the LLM."""
        before = self.use_keys(model) and model.encoder_stages and model.single_crop
        return EncoderStage(model.feature_layer + 1) if before else PRE_LLM

    def use_keys(self, model: ModelSpec) -> bool:
        """True when matching uses the encoder's keys on this model."""
        return self.metric == "keys" or (
            self.metric == "auto" and model.has_cls and model.encoder_stages and model.single_crop
        )

    def key_layer(self, model: ModelSpec) -> int:
        """The encoder layer behind the features, whose keys are made of them, or the last one."""
        return min(model.feature_layer + 1, model.vision_layers - 1)

    def plan(self, model: ModelSpec) -> Plan:
        stages: list[Stage] = []
        vision: dict[int, Any] = {}
        llm: dict[int, Any] = {}
        if self.merge:
            stages.append(self.merge_stage(model))
            vision = {self.key_layer(model): Rows.KEYS} if self.use_keys(model) else {}
        if self.prune:
            # A schedule that the budget may move has to be able to prune at every layer behind its earliest start.
            first, end = self.bounds(model)
            if self.moves(self.needs_budget):
                first, end = (first if self.merge else 0), model.llm_layers
            stages += range(first + 1, min(end, model.llm_layers - 1) + 1)
            llm = dict.fromkeys(range(first, min(end, model.llm_layers) - 1), self.reading)
        if not stages:
            raise UnsupportedMethod(
                f"schedule={self.schedule} begins behind the {model.llm_layers} layers of this {model.family} model "
                "and leaves nothing to do without merging; start it earlier or leave it open"
            )
        positions: Positions = "compact_input" if self.merge and not model.mrope else "preserve"
        return Plan(tuple(stages), Needs(vision, llm), positions)

    def reads(self, model: ModelSpec, layer: int, memory: dict[Any, Any]) -> bool:
        schedule: list[list[int]] | None = memory.get(self)
        if schedule is None:
            return True
        ranked = any(counts[layer + 1] < counts[layer] for counts in schedule)
        return ranked and any(counts[layer + 1] for counts in schedule)

    # --- how much
    def shares(self, model: ModelSpec) -> tuple[float, ...]:
        """Share of the entered tokens that each LLM layer sees."""
        return falling_shares(model.llm_layers, *self.bounds(model))

    def layer_counts(self, model: ModelSpec, entered: int, granted: int | None) -> list[int]:
        """Tokens of an item that each LLM layer sees; granted: the mean it may have, None for the schedule as it is."""
        counts = layer_tokens(entered, self.shares(model))
        if granted is None or not self.moves(True):
            return counts
        total = granted * model.llm_layers
        if self.merge and sum(counts) >= total - model.llm_layers / 2:
            return counts
        return list(moved_tokens(entered, total, model.llm_layers, *self.bounds(model)))

    def merged_count(self, model: ModelSpec, count: int, fixed: int, granted: int) -> int:
        """Tokens to which merging brings an item of `count` tokens and `fixed` separators, granted a mean."""
        if not self.prune:
            return max(1, min(count, granted - fixed))
        total, shares = granted * model.llm_layers, self.shares(model)
        most = sum(layer_tokens(count + fixed, shares))
        if self.schedule is not None and total - most > model.llm_layers:
            raise BudgetError(
                f"a mean of {granted} visual tokens per layer cannot be met: schedule={self.schedule} leaves "
                f"{most / model.llm_layers:.1f} of {count + fixed} without any merging; ask for less, leave the "
                "schedule open or prune later"
            )
        return entering_tokens(count, fixed, total, shares)

    # --- selecting
    def select(self, view: StageView) -> Selection | None:
        if self.merge and view.stage == self.merge_stage(view.model):
            return self._merge(view)
        assert isinstance(view.stage, int)
        return self._prune(view, view.stage)

    def _merge(self, view: StageView) -> Selection | None:
        items, model = view.items, view.model
        plan: Callable[[int, int], Sequence[int]] = merge_plan
        if self.steps is not None:
            steps = self.steps
            keep = [sum(_after(count, steps) for count in row) for row in groups(view, self.scope)[1]]
            plan = lambda count, share: steps  # noqa: E731
        elif self.merge_ratio is not None:
            keep = [tokens_to_keep(count, self.merge_ratio) for count in items.counts]
        else:
            columns = zip(items.counts, items.fixed, view.granted, strict=True)
            keep = [self.merged_count(model, *each) for each in columns]
        if list(keep) == list(items.counts):
            return None
        metric = view.vision_attention(self.key_layer(model), Rows.KEYS) if self.use_keys(model) else view.tokens
        return merge_items(view, keep, metric, scope=self.scope, plan=plan, raster=self.order == "raster")

    def _schedule(self, view: StageView) -> list[list[int]]:
        """Tokens of each item that every layer sees, separators included; fixed when the first layer prunes."""
        if self not in view.memory:
            items = view.items
            granted: Sequence[int | None] = view.granted if view.budget is not None else [None] * len(items)
            columns = zip(items.counts, items.fixed, granted, strict=True)
            view.memory[self] = [self.layer_counts(view.model, now + fixed, mean) for now, fixed, mean in columns]
        counts: list[list[int]] = view.memory[self]
        return counts

    def _prune(self, view: StageView, layer: int) -> Selection | None:
        items, separators = view.items, view.separators
        schedule = self._schedule(view)
        wanted = [counts[layer] for counts in schedule]
        if self.votes == "masked":
            same = all(counts[layer] == counts[layer - 1] for counts in schedule)
            return None if same else self._hide(view, layer, wanted)
        now = [a + b for a, b in zip(items.counts, items.fixed, strict=True)]
        if all(count >= have for count, have in zip(wanted, now, strict=True)):
            return None
        if not any(wanted):
            return Selection(torch.zeros_like(items.mask), counts=wanted, separators=False)
        keep = put(wanted, view.device)
        scores = view.llm_attention(layer - 1, self.reading)
        if not any(items.fixed):
            counts = [min(count, have) for count, have in zip(wanted, now, strict=True)]
            return Selection(top_k(scores, keep, items.gaps, most=max(counts)), counts=counts, scores=scores)
        others = view.llm_rows[layer - 1, self.reading][separators.row[:, None], separators.index]
        mask = torch.cat([items.mask, separators.mask], 1)
        index = torch.cat([items.index, separators.index], 1)
        order = torch.where(mask, index, view.hidden.shape[1]).argsort(dim=1)  # by place in the prompt
        chosen = top_k(torch.cat([scores, others], 1).gather(1, order), keep, mask.gather(1, order))
        chosen = torch.zeros_like(mask).scatter(1, order, chosen)
        width = items.mask.shape[1]
        return Selection(chosen[:, :width], separators=chosen[:, width:])

    def _hide(self, view: StageView, layer: int, wanted: list[int]) -> Selection | None:
        items = view.items
        seen = view.memory.get((self, "seen"), items.mask).to(items.mask.device)
        if layer - 1 in view.needs.llm and any(wanted):
            scores = view.llm_attention(layer - 1, self.reading)
        else:
            scores = torch.zeros_like(items.mask, dtype=torch.float32)
        left = put([max(0, n - m) for n, m in zip(wanted, items.fixed, strict=True)], seen.device)
        stay = top_k(scores, left, seen)
        view.memory[self, "seen"] = stay
        return Selection(items.mask, counts=items.counts, hide=seen & ~stay)


def _after(count: int, steps: tuple[int, ...]) -> int:
    for r in steps:
        count -= min(r, count // 2)
    return count
