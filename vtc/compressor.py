"""What a compression method is: a frozen set of hyper-parameters, a plan, and one function that selects tokens.

A method names the *stages* at which it acts and the attention rows it *needs*; the engine provides both on any
supported model and hands over a `StageView` in which all items of the batch lie side by side as dense tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from vtc.budget import Budget
from vtc.errors import VTCError, unknown_name
from vtc.ops.select import top_k, top_k_in_groups
from vtc.readings import LLMReading, VisionReading
from vtc.readings import Rows as Rows

if TYPE_CHECKING:
    from vtc.items import ItemTable

Positions = Literal["preserve", "compact"]


@dataclass(frozen=True)
class EncoderStage:
    """Before vision-encoder layer `layer` (0-based, at least 1): the later encoder layers run on fewer tokens.

    The layer behind the feature layer means before the projector.
    """

    layer: int


@dataclass(frozen=True)
class CacheStage:
    """After the prefill: rows of dropped tokens leave the KV cache of the layers from `from_layer` on."""

    from_layer: int = 0


Stage = int | EncoderStage | CacheStage
"""An int k is "before LLM layer k"; 0, before the LLM, is also called PRE_LLM."""

PRE_LLM = 0
AFTER_PREFILL = CacheStage()


@dataclass(frozen=True)
class Needs:
    """What to record: 0-based layer of the vision encoder or of the LLM -> a reading or several."""

    vision: Mapping[int, VisionReading | tuple[VisionReading, ...]] = field(default_factory=dict)
    llm: Mapping[int, LLMReading | tuple[LLMReading, ...]] = field(default_factory=dict)

    @property
    def vision_pairs(self) -> tuple[tuple[int, VisionReading], ...]:
        """(layer, reading) of everything recorded in the vision encoder."""
        return tuple((layer, one) for layer, some in self.vision.items() for one in _each(some))

    @property
    def llm_pairs(self) -> tuple[tuple[int, LLMReading], ...]:
        """(layer, reading) of everything recorded in the LLM."""
        return tuple((layer, one) for layer, some in self.llm.items() for one in _each(some))

    def __or__(self, other: Needs) -> Needs:
        """Both together."""
        return Needs(_grouped([*self.vision_pairs, *other.vision_pairs]), _grouped([*self.llm_pairs, *other.llm_pairs]))


R = TypeVar("R")


def _each(some: R | tuple[R, ...]) -> tuple[R, ...]:
    return some if isinstance(some, tuple) else (some,)


def _grouped(pairs: Sequence[tuple[int, R]]) -> dict[int, R | tuple[R, ...]]:
    layers: dict[int, dict[R, None]] = {}
    for layer, reading in pairs:
        layers.setdefault(layer, {})[reading] = None
    return {layer: tuple(readings) for layer, readings in layers.items()}


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a model that a method may depend on; layers are 0-based.

    feature_layer: the encoder layer whose output is projected for the LLM. full_attention_layers: encoder layers in
    which a patch sees its whole image (all of them unless the encoder uses windows). mrope: multi-axis positions.
    encoder_stages: methods may act inside the encoder, whatever the modality. single_crop: an image is one crop.
    width: hidden size of the LLM, 0 where no model is loaded.
    """

    family: str
    vision_layers: int
    feature_layer: int
    has_cls: bool
    full_attention_layers: tuple[int, ...]
    llm_layers: int
    mrope: bool = False
    encoder_stages: bool = False
    single_crop: bool = False
    width: int = 0


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
    separators: [I, M] bool over `view.separators`, which of them stay (one synchronisation); False drops all of them,
    None keeps them.
    hide: [I, N] bool, tokens that stay in the sequence while no row of a later layer attends to them (a reference mode;
    it saves nothing). weights: [I, N] in (0, 1], soft masks for training: the token's key counts so much in every
    later layer, except for the token itself; multiplied over the stages. loss: added to `Handle.auxiliary_loss`.
    """

    keep: Tensor
    counts: Sequence[int] | None = None
    tokens: Tensor | None = None
    merged_into: Tensor | None = None
    separators: Tensor | Literal[False] | None = None
    hide: Tensor | None = None
    weights: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StageView:
    """What a method sees at one stage. I items, N their largest token count, B batch rows of length L.

    stage: the stage reached. model: facts about the model. budget: None for methods without one. items: the table of
    items and where their tokens lie; separators: the same for their separators. hidden: [B, L, D] rows entering the
    stage. visual, valid: [B, L] bool; text: [B, L] bool, the question behind the first visual token, without the
    answer in training. fingerprint: [I] int64 pixel keys. memory: what the method left there at earlier stages of the
    same call. module: its learned parts.
    """

    stage: Stage
    model: ModelSpec
    budget: Budget | None
    items: ItemTable
    separators: ItemTable
    hidden: Tensor
    visual: Tensor
    valid: Tensor
    text: Tensor
    fingerprint: Tensor
    vision_rows: dict[tuple[int, VisionReading], Tensor] = field(default_factory=dict)
    llm_rows: dict[tuple[int, LLMReading], Tensor] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    memory: dict[Any, Any] = field(default_factory=dict)
    module: nn.Module | None = None

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

    @property
    def granted(self) -> tuple[int, ...]:
        """Tokens of each item, separators included, that may enter an LLM layer in the mean over all layers."""
        assert self.budget is not None, "this method was planned without a budget"
        return tuple(self.budget.tokens(count) for count in self.items.input_counts)

    def _grant(self, granted: list[int]) -> tuple[int, ...]:
        columns = zip(granted, self.items.counts, self.items.fixed, strict=True)
        return tuple(min(now, max(1, total - fixed)) for total, now, fixed in columns)

    def vision_attention(self, layer: int, reading: VisionReading | None = None) -> Tensor:
        """[I, N] or [I, N, C] what the plan's Needs recorded of encoder layer `layer`, packed to the LLM's tokens.

        reading: which of several.
        """
        rows = self.vision_rows[layer, reading or _only(self.needs.vision[layer])][self.items.source]
        index = self.items.token
        if rows.ndim == 2:
            return rows.gather(1, index)
        return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))

    def llm_attention(self, layer: int, reading: LLMReading | None = None) -> Tensor:
        """[..., I, N] what was recorded of LLM layer `layer`, at the items' tokens. reading: which of several."""
        rows = self.llm_rows[layer, reading or _only(self.needs.llm[layer])]
        return rows[..., self.items.row[:, None], self.items.index]


def _only(some: R | tuple[R, ...]) -> R:
    (one,) = _each(some)
    return one


@dataclass(frozen=True)
class Compressor(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the method's hyper-parameters.

    name: registered name. version: raised whenever results change. trained: needs learned weights. stages: where it
    acts on every model; override `plan` where that depends on the model.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    trained: ClassVar[bool] = False
    stages: ClassVar[tuple[Stage, ...]] = (PRE_LLM,)

    @property
    def needs_budget(self) -> bool:
        """True when it takes retention or keep; override it where hyper-parameters can decide instead."""
        return True

    def keeps_all(self, budget: Budget | None, tokens: int) -> bool:
        """True when an item of so many tokens passes whole; where all do, the model runs untouched, bit for bit."""
        return budget is not None and budget.tokens(tokens) >= tokens

    def module(self, model: ModelSpec) -> nn.Module | None:
        """The learned parts with their weights; None for training-free methods."""
        return None

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
