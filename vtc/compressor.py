"""What a compression method is: a frozen set of hyper-parameters, a plan, and one function that selects tokens.

A method names the *stages* at which it acts and the attention rows it *needs*; the engine provides both on any
supported model and hands over a `StageView` in which all items of the batch lie side by side as dense tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from vtc.budget import Budget
from vtc.errors import VTCError, unknown_name
from vtc.ops.select import top_k, top_k_in_groups

if TYPE_CHECKING:
    from vtc.items import ItemTable

Positions = Literal["preserve", "compact"]


@dataclass(frozen=True)
class EncoderStage:
    """Before vision-encoder layer `layer` (0-based, at least 1): the later encoder layers run on fewer tokens."""

    layer: int


@dataclass(frozen=True)
class CacheStage:
    """After the prefill: rows of dropped tokens leave the KV cache of the layers from `from_layer` on."""

    from_layer: int = 0


Stage = int | EncoderStage | CacheStage
"""An int k is "before LLM layer k"; 0, before the LLM, is also called PRE_LLM."""

PRE_LLM = 0
AFTER_PREFILL = CacheStage()


class Rows(Enum):
    """Which attention rows of a layer a method reads; always softmax in float32 and the mean over heads."""

    CLS = "cls"  # vision: what the class token pays to each patch
    RECEIVED = "received"  # vision: what each patch receives, mean over all queries
    LAST = "last"  # LLM: what the last prompt token pays to each token


@dataclass(frozen=True)
class Needs:
    """Attention rows to record, by 0-based layer of the vision encoder and of the LLM."""

    vision: dict[int, Rows] = field(default_factory=dict)
    llm: dict[int, Rows] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a model that a method may depend on; layers are 0-based.

    feature_layer: the encoder layer whose output is projected for the LLM. full_attention_layers: encoder layers in
    which a patch sees its whole image (all of them unless the encoder uses windows). mrope: multi-axis positions.
    """

    family: str
    vision_layers: int
    feature_layer: int
    has_cls: bool
    full_attention_layers: tuple[int, ...]
    llm_layers: int
    mrope: bool = False


@dataclass(frozen=True)
class Plan:
    """Where a method acts on a given model, what it needs there, and its default position policy."""

    stages: tuple[Stage, ...]
    needs: Needs
    positions: Positions


@dataclass(frozen=True)
class Selection:
    """The outcome of one stage.

    keep: [I, N] bool over the view's items (entries behind an item's end are ignored). counts: kept tokens per item
    when they are known on the host; leave it out for data-dependent counts, at the price of one synchronisation.
    tokens: [I, N, D] replacement rows, read where `keep` is set (merging and pooling put the new token on an anchor).
    merged_into: [I, N] for every token the view position of the anchor that absorbed it, -1 where none did.
    """

    keep: Tensor
    counts: Sequence[int] | None = None
    tokens: Tensor | None = None
    merged_into: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StageView:
    """What a method sees at one stage. I items, N their largest token count, B batch rows of length L.

    stage: the stage reached. model: facts about the model. budget: None for methods without one. items: the table of
    items and where their tokens lie. hidden: [B, L, D] rows entering the stage. visual, valid: [B, L] bool.
    fingerprint: [I] int64 pixel keys.
    """

    stage: Stage
    model: ModelSpec
    budget: Budget | None
    items: ItemTable
    hidden: Tensor
    visual: Tensor
    valid: Tensor
    fingerprint: Tensor
    vision_rows: dict[int, Tensor] = field(default_factory=dict)
    llm_rows: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> Tensor:
        """[I, N, D] hidden rows of the items' tokens."""
        return self.hidden[self.items.row[:, None], self.items.index]

    @cached_property
    def crop(self) -> Tensor:
        """[I, N] crop or frame of each token, -1 behind an item's end."""
        return self.items.geometry("crop")

    @cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """[I, N] row and column of each token inside its crop, in encoder patches; -1 behind an item's end."""
        return self.items.geometry("row"), self.items.geometry("col")

    @cached_property
    def keep(self) -> tuple[int, ...]:
        """Tokens the budget grants each item, of those it had in the input and without its separators."""
        assert self.budget is not None, "this method was planned without a budget"
        return self._grant([self.budget.tokens(count) for count in self.items.input_counts])

    def keep_from_layer(self, layer: int) -> tuple[int, ...]:
        """Tokens each item may keep from LLM layer `layer` on when every layer before it sees them all."""
        assert self.budget is not None, "this method was planned without a budget"
        layers = self.model.llm_layers
        return self._grant([self.budget.tokens_from_layer(n, layer, layers) for n in self.items.input_counts])

    def _grant(self, granted: list[int]) -> tuple[int, ...]:
        columns = zip(granted, self.items.counts, self.items.fixed, strict=True)
        return tuple(min(now, max(1, total - fixed)) for total, now, fixed in columns)

    def vision_attention(self, layer: int) -> Tensor:
        """[I, N] attention of encoder layer `layer`, as the plan's Needs asked for it, packed to the LLM's tokens."""
        return self.vision_rows[layer][self.items.source].gather(1, self.items.token)

    def llm_attention(self, layer: int) -> Tensor:
        """[I, N] attention that the needed row of LLM layer `layer` pays to the items' tokens."""
        return self.llm_rows[layer][self.items.row[:, None], self.items.index]


@dataclass(frozen=True)
class Compressor(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the method's hyper-parameters.

    name: registered name. version: raised whenever results change. trained: needs learned weights. needs_budget:
    takes retention or keep. stages: where it acts on every model; override `plan` where that depends on the model.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    trained: ClassVar[bool] = False
    needs_budget: ClassVar[bool] = True
    stages: ClassVar[tuple[Stage, ...]] = (PRE_LLM,)

    def plan(self, model: ModelSpec) -> Plan:
        """Stages, needs and position policy on this model; raises UnsupportedMethod where it cannot run.

        The default policy follows the released implementations: what is removed before the LLM leaves no gap in the
        positions, except under multi-axis rotary positions and after pruning inside the LLM.
        """
        inside = any(isinstance(stage, int) and stage > 0 for stage in self.stages)
        return Plan(self.stages, Needs(), "preserve" if inside or model.mrope else "compact")

    @abstractmethod
    def select(self, view: StageView) -> Selection | None:
        """Choose the tokens that pass `view.stage`; None keeps everything."""


Scope = Literal["item", "crop"]


@dataclass(frozen=True)
class ScoringCompressor(Compressor):
    """A method that keeps the highest-scoring tokens of each item before the LLM.

    scope: "item" ranks all tokens of an image or video together; "crop" ranks inside every crop, tile or frame and
    keeps the same share of each (sizes differ after unpadding; largest remainders make the total exact). The two agree
    on images of one crop. Subclasses set the default that suits their scores.
    """

    scope: Scope = field(default="item", kw_only=True)

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise VTCError(str(unknown_name("scope", self.scope, get_args(Scope))))

    @abstractmethod
    def score(self, view: StageView) -> Tensor:
        """[I, N] scores, higher is kept; entries behind an item's end may hold anything."""

    def select(self, view: StageView) -> Selection:
        """Keep the `view.keep` best tokens of each item, in their original order."""
        keep = torch.tensor(view.keep, device=view.hidden.device)
        crops = max((layout.n_crops for layout in view.items.layouts), default=1)
        if self.scope == "item" or crops == 1:
            chosen = top_k(self.score(view), keep, view.items.mask)
        else:
            chosen = top_k_in_groups(self.score(view), view.crop, crops, keep, view.items.mask)
        return Selection(chosen, counts=view.keep)
