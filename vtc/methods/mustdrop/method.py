"""MustDrop: merge uniform windows in the encoder, drop what no text looks at, hand on a short cache (arXiv:2411.10803).

Layers are counted from 0 everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import (
    CacheStage,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Rows,
    Selection,
    Stage,
    StageView,
)
from vtc.method.budget import left_by_stages
from vtc.method.groups import Parts
from vtc.method.readings import AttentionCall, LLMReading, QueryRows, VisionReading
from vtc.method.registry import register
from vtc.method.schedule import scaled
from vtc.methods.mustdrop.dual import (
    attention_sum_and_max,
    dual_filter,
    keep_with_keys,
    key_tokens,
    utilities,
)
from vtc.methods.mustdrop.windows import Windows, by_token, window_count
from vtc.ops.host import put
from vtc.ops.select import front_pack, top_k

Windowing = Literal["threshold", "count", "off"]
Filter = Literal["budget", "threshold", "off"]
Average = Literal["true", "official"]


@dataclass(frozen=True)
class TextAttention(LLMReading):
    """Softmax attention, mean over heads: its sum and its maximum over the text rows; [2, B, K]."""

    name = "text sum and maximum"

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        asking = rows.asking
        index = front_pack(asking, rows.text_count)
        real = torch.arange(rows.text_count, device=index.device) < asking.sum(1, keepdim=True)
        query, key = attention.query, attention.key
        return attention_sum_and_max(query, key, index, real, attention.scaling, mask=rows.mask, causal=True)


TEXT = TextAttention()


@dataclass(frozen=True, eq=False)
class Progress:
    """What the stages of one call share: key set [I, Nin] by token number, tokens left per item and stage."""

    key: Tensor
    left: tuple[tuple[int, ...], ...]


@register
class MustDrop(Compressor):
    """Average uniform windows, drop what no text token looks at, and cache only what is left at the end.

    Training-free, guided by the text. Three steps, each of which can be switched off to compose with other methods:

    1. merge, behind the first encoder layer: the windows of patches whose mean pairwise cosine is at least `tau` become
       one token each, their mean. Each image (or tile) decides for itself.
    2. filter, behind each of `layers` of the LLM: a_tj is the head-mean attention of text token t (of the prompt
       behind the row's first image, later images left out) to visual token j, g_j = sum_t a_tj, m_j = max_t a_tj.
       Token j falls if g_j < gamma * sum_j g_j and m_j < alpha. The key set never falls: of every tile
       ceil(key_rate * tokens) tokens, those with the largest attention from the class token in the encoder's last
       layer.
    3. cache, after the prefill: layers from `layers[0]` on keep only the entries of tokens alive at the end.

    A budget (filter="budget") uses the same ordering with counts: both thresholds times c keep {u_j >= c} with
    u_j = max(g_j / (gamma * sum g), m_j / alpha), so the K key tokens and the largest u_j stay. Stage s leaves
    max(K, round(n0 * x^s)) tokens, with the one x for which the mean over the layers meets the budget.

    merge: "threshold", "count" (as many windows as leave `retain` tokens per tile, or without `retain` as many as the
    budget asks for) or "off". window: rows and columns. tau: mean cosine. retain: as above. keep_raster_order: False
    puts merged tokens in front, the most uniform first, as the code does; True leaves them where they lie; by default
    False where an image is one crop, else True. filter: "budget", "threshold" (no budget, gamma and alpha as they are,
    the count depends on the sample) or "off". key_rate: share of protected tokens. layers, depth: pruning layers of an
    LLM of `depth` layers, scaled to the model's; depth=None takes them as they are. gamma, alpha: as above; published
    on TextVQA are (0.001, 0.001), (0.0012, 0.001) and (0.011, 0.01) for means of 192, 128 and 64 tokens, on VizWiz
    (0.005, 0.001) for 64. cache: step 3. average: what a budget means, "true" the mean over the tokens that enter the
    layers, "official" the code's own, which counts pruning layers as pruned already.

    Departures from the paper and its code: windows of 3 x 3, a key set of 8 % and layers 2, 6, 10 and 14 follow the
    code (the paper's figure draws 2 x 2, 5 % and other layers). The fixed budget is ours; where `tau` merges so few
    windows that the key set alone would exceed it, more windows merge, the most similar first, and as a last resort key
    tokens fall too. No minimum of merged windows over a batch; every item is filtered by its own mass; later images are
    not text; a key set of one token works; incomplete windows at a border stay. Decoded tokens go on behind each
    layer's own prefill length (the code numbers them by the shorter cache, in front of part of the prompt). Encoders
    without a class token use the attention received in the last layer that sees the whole image. Models that join
    patches or pack images merge in front of the LLM, frame by frame or tile by tile; a merged token is as salient as
    its members in the mean. Under multi-axis positions tokens keep theirs. The layout of tiled images, with newlines
    and without margins, stays the model's, so their tokens stay in raster order. Without text behind the image no
    threshold drops a token, and a budget keeps the first ones. With keep=, step 1 grants each tile that many tokens.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("mustdrop").plan(llava).stages
    (EncoderStage(layer=1), 3, 7, 11, 15, CacheStage(from_layer=2))
    >>> vtc.create("mustdrop", merge="off", filter="off").plan(llava).stages
    (CacheStage(from_layer=2),)
    """

    merge: Windowing = "threshold"
    window: tuple[int, int] = (3, 3)
    tau: float = 0.8
    retain: int | None = None
    keep_raster_order: bool | None = None
    filter: Filter = "budget"
    key_rate: float = 0.08
    layers: tuple[int, ...] = (2, 6, 10, 14)
    depth: int | None = 32
    gamma: float = 0.001
    alpha: float = 0.001
    cache: bool = True
    average: Average = "true"

    name = "mustdrop"

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = self._problem()
        if problem:
            raise VTCError(problem)

    def _problem(self) -> str | None:
        """What is wrong with the hyper-parameters."""
        if (self.merge, self.filter, self.cache) == ("off", "off", False):
            return "merge, filter and cache are all off, so nothing would happen; switch one of them on"
        if min(self.window) < 1 or math.prod(self.window) < 2:
            return f"window={self.window!r} holds nothing to merge; pass (rows, columns), the code uses (3, 3)"
        if not -1 <= self.tau <= 1:
            return f"tau={self.tau!r} is no mean cosine; pass a number from -1 to 1, the code uses 0.8"
        if self.retain is not None and (self.merge != "count" or self.retain < 1):
            return f"retain={self.retain!r} is the tokens left per tile for merge='count', at least 1; it needs both"
        if self.merge == "count" and self.retain is None and self.filter == "budget":
            return (
                "the budget cannot fix both steps; pass retain=, the tokens left per tile, or merge='threshold', or "
                "filter='off' or 'threshold'"
            )
        if not 0 <= self.key_rate <= 1:
            return (
                f"key_rate={self.key_rate!r} is no share of the tokens; pass a number from 0 to 1, the code uses 0.08"
            )
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            return f"layers={self.layers!r} are no ascending layer numbers; pass for example (2, 6, 10, 14)"
        if self.depth is not None and self.layers[-1] >= self.depth:
            return (
                f"layers={self.layers!r} exceed depth={self.depth}; raise depth, or pass None to take them as they are"
            )
        if self.gamma <= 0 or self.alpha <= 0:
            return f"gamma={self.gamma!r} and alpha={self.alpha!r} have to be positive, 0.001 and 0.001 for example"
        return None

    @property
    def needs_budget(self) -> bool:
        return self.filter == "budget" or (self.merge == "count" and self.retain is None)

    # --- where it acts
    def after(self, model: ModelSpec) -> tuple[int, ...]:
        """The LLM layers behind which this model's tokens are filtered."""
        depth = model.llm_layers
        return scaled(self.layers, depth, of=self.depth or depth, last=depth - 2)

    def spans(self, model: ModelSpec) -> list[int]:
        """Layers before the first pruning, between prunings, and behind the last, as `average` counts them."""
        starts = [0, *(layer + (self.average == "true") for layer in self.after(model)), model.llm_layers]
        return [end - start for start, end in pairwise(starts)]

    def least_retention(self, model: ModelSpec) -> float:
        return self.spans(model)[0] / model.llm_layers if self.merge == "off" else 0.0

    def salience(self, model: ModelSpec) -> tuple[int, VisionReading]:
        """The encoder layer and the reading that tell the key set."""
        return (
            (model.vision_layers - 1, Rows.CLS) if model.has_cls else (model.full_attention_layers[-1], Rows.RECEIVED)
        )

    def plan(self, model: ModelSpec) -> Plan:
        layers = self.after(model)
        if not layers:
            raise UnsupportedMethod(
                f"layers={self.layers} leave nothing to prune in the {model.llm_layers} layers of this {model.family} "
                "model; pass earlier ones"
            )
        if self.merge != "off" and self.keep_raster_order is False and not model.single_crop:
            raise UnsupportedMethod(
                f"keep_raster_order=False puts merged tokens in front of an image, but images of this {model.family} "
                "model may have several crops, whose layout stays the model's own; leave it out"
            )
        stages: list[Stage] = []
        vision: dict[int, VisionReading] = {}
        if self.merge != "off":
            stages.append(EncoderStage(1) if model.encoder_stages and not model.joins else 0)
        if self.filter != "off":
            stages += [layer + 1 for layer in layers]
            vision = dict([self.salience(model)] if self.key_rate else [])
        if self.cache:
            stages.append(CacheStage(layers[0]))
        needs = Needs(vision, dict.fromkeys(layers if self.filter != "off" else (), TEXT))
        return Plan(tuple(stages), needs, "preserve" if model.mrope else "compact")

    def select(self, view: StageView) -> Selection | None:
        if isinstance(view.stage, CacheStage):
            return Selection(view.items.mask, counts=view.items.counts)
        if isinstance(view.stage, EncoderStage) or view.stage == 0:
            return self._merge(view)
        return self._filter(view, view.stage - 1)

    # --- step 1
    def _merge(self, view: StageView) -> Selection | None:
        if not any(window_count(layout.regions, self.window) for layout in view.items.layouts):
            return None
        windows = Windows.of(view, self.window)
        least = [min(each, most) for each, most in zip(self._fewest(view), windows.counts, strict=True)]
        chosen = top_k(windows.similarity, put(least, view.device), windows.whole)
        if self.merge == "threshold":
            chosen = chosen | windows.whole & (windows.similarity >= self.tau)
        raster = self.keep_raster_order
        in_front = view.model.single_crop if raster is None else not raster
        if view.stage == 0 and self.filter != "off" and self.key_rate:
            scores = windows.average(self._scores(view), chosen, in_front=in_front)
            view.memory[self, "scores"] = by_token(view, scores)
        return windows.merge(chosen, in_front=in_front)

    def _fewest(self, view: StageView) -> list[int]:
        """Windows of each item that merge whatever their similarity."""
        items, saved = view.items, math.prod(self.window) - 1
        if self.merge == "count":
            wanted = list(view.keep) if self.retain is None else [self.retain * each.n_crops for each in items.layouts]
        elif self.filter == "budget":
            first, *later = self.spans(view.model)
            layers = view.model.llm_layers
            bare = [total - fixed for total, fixed in zip(view.granted, items.fixed, strict=True)]
            wanted = [math.floor(layers * total / (first + self.key_rate * sum(later))) for total in bare]
        else:
            return [0] * len(items)
        return [max(0, -((most - now) // saved)) for now, most in zip(items.counts, wanted, strict=True)]

    # --- step 2
    def _filter(self, view: StageView, layer: int) -> Selection:
        items = view.items
        total, peak = self.attention(view, layer)
        if (self, "progress") not in view.memory:
            view.memory[self, "progress"] = self._begin(view)
        progress: Progress = view.memory[self, "progress"]
        key = progress.key.to(items.mask.device).gather(1, items.token) & items.mask
        if self.filter == "threshold":
            return Selection(dual_filter(total, peak, self.gamma, self.alpha, items.mask) | key)
        stage = self.after(view.model).index(layer)
        counts = [min(left[stage], now) for left, now in zip(progress.left, items.counts, strict=True)]
        utility = utilities(total, peak, self.gamma, self.alpha, items.mask)
        kept = keep_with_keys(utility, key, put(counts, key.device), items.mask)
        return Selection(kept, counts=counts, scores=utility)

    def _begin(self, view: StageView) -> Progress:
        """The key set and, under a budget, the schedule; synchronises once for the sizes of the key set."""
        key = self.keys(view)
        table = by_token(view, key)
        if self.filter == "threshold":
            return Progress(table, ())
        items, spans = view.items, tuple(self.spans(view.model))
        columns = zip(items.counts, key.sum(1).tolist(), view.granted, items.fixed, items.input_counts, strict=True)
        return Progress(table, tuple(left_by_stages(*item, spans) for item in columns))

    def attention(self, view: StageView, layer: int) -> Tensor:
        """[2, I, N] sum and maximum over the text of what it pays to each token in LLM layer `layer`."""
        return view.llm_attention(layer, TEXT)

    def keys(self, view: StageView) -> Tensor:
        """[I, N] bool, the tokens that no stage drops."""
        if not self.key_rate:
            return torch.zeros_like(view.items.mask)
        table = view.memory.get((self, "scores"))
        score = self._scores(view) if table is None else table.to(view.items.token.device).gather(1, view.items.token)
        return key_tokens(score, Parts.of(view, "crop"), self.key_rate)

    def _scores(self, view: StageView) -> Tensor:
        return view.vision_attention(*self.salience(view.model))
