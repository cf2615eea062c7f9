"""What the engine shows a method at a stage, and what the method answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vtc.errors import VTCError
from vtc.method.budget import Budget, ItemBudgets
from vtc.method.items import ItemTable
from vtc.method.patches import Patches, patches
from vtc.method.plan import ModelSpec, Needs, R, Stage, each
from vtc.method.readings import LLMReading, PromptRows, VisionReading
from vtc.method.states import States
from vtc.ops.host import put
from vtc.ops.select import in_groups, take_rows

if TYPE_CHECKING:
    from vtc.method.pairs import PairFeatures


@dataclass(frozen=True)
class Selection:
    """The outcome of one stage.

    keep: [I, N] bool over the view's items (entries behind an item's end are ignored); after the prefill also
    [I, H, N], a set for each of a layer's H KV heads, all of one size. counts: kept tokens per item, in every head,
    when they are known on the host; leave it out for data-dependent counts, at the price of one synchronisation.
    tokens: [I, N, D] replacement rows, read where `keep` is set (merging and pooling put the new token on an anchor).
    merged_into: [I, N] for every token the view position of the anchor that absorbed it, -1 where none did.
    separators: [I, M] bool over `view.separators`, which of them stay (one synchronisation); False drops all of them,
    None keeps them.
    hide: [I, N] bool, tokens that stay in the sequence while no row of a later layer attends to them (a reference mode;
    it saves nothing). weights: [I, N] in (0, 1], soft masks for training: the token's key counts so much in every
    later layer, except for the token itself; multiplied over the stages. near: [I, N, C], limits what visual rows see
    of each other in every later layer: a token attends to text, to itself, and of the visual tokens in front of it to
    those of its own item that lie at most 1 away in each of C numbers; separators to no other visual token, text to
    all (a mask; it saves nothing). What a later stage says takes its place. gains: [I, N], where tokens skip one layer
    and the plan says so: the number that multiplies what the layer's MLP adds to the row of a token that goes through,
    and the whole row of a token that goes around. sizes: [I, N], at encoder stages: what
    each token stands for. Later encoder layers attend to its key as often, softmax(Q K^T / sqrt(D) + log sizes); said
    anew at every stage that has it. restored: [I, P, D], at encoder stages: rows for all patches that entered the
    encoder, in the order of the picture; every patch has a row again, and of all else said here nothing is read.
    entries: after the prefill, at a stage about one layer, keys and values [I, H, N, W] in the place of those of
    `StageView.entries`, read where `keep` is set. loss: added to `Handle.auxiliary_loss`. scores: [I, N] what the
    tokens were ranked by, higher stays; for traces alone.

    >>> Selection(keep=torch.tensor([[True, False, True]]), counts=(2,)).counts
    (2,)
    """

    keep: Tensor
    counts: Sequence[int] | None = None
    tokens: Tensor | None = None
    merged_into: Tensor | None = None
    separators: Tensor | Literal[False] | None = None
    hide: Tensor | None = None
    weights: Tensor | None = None
    near: Tensor | None = None
    gains: Tensor | None = None
    sizes: Tensor | None = None
    restored: Tensor | None = None
    entries: tuple[Tensor, Tensor] | None = None
    loss: Tensor | None = None
    scores: Tensor | None = None

    @property
    def by_head(self) -> Tensor:
        """[I, H, N] what every KV head keeps; H is 1 where all of them keep the same.

        >>> Selection(keep=torch.tensor([[True, False, True]])).by_head.shape
        torch.Size([1, 1, 3])
        """
        return self.keep if self.keep.ndim == 3 else self.keep[:, None]


@dataclass(frozen=True, eq=False)
class StageView(PromptRows):
    """What a method sees at one stage. I items, N their largest token count, B batch rows of length L.

    stage: the stage reached. model: facts about the model. budget: None for methods without one. items: the table of
    items and where their tokens lie; separators: the same for their separators. states: of the rows entering the
    stage, `tokens` of the items alone and `hidden` of all; what is not asked for is not put together. visual, valid,
    prompt, text: [B, L] bool; the prompt is what is valid and no answer, whether generated, drafted or given with
    labels, the text what in it is neither visual nor system prompt. fingerprint: [I] int64 pixel keys. pairs: what
    `pair` shows. memory: what the method left there at earlier stages of the same call. module: its learned parts.
    final_norm: the norm behind the LLM's last layer, for rows of any shape [..., D]; at encoder stages it leaves them
    as they are. cached: what `entries` asks for.

    What a method of one line sees of two images, the budget being a quarter of 16 tokens each:

    >>> import vtc
    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> class Look(vtc.ScoringCompressor):
    ...     def score(self, view):
    ...         print(view.stage, view.tokens.shape, view.items.counts, view.keep)
    ...         return view.tokens[..., 0]
    >>> model = tiny_model("llava-clip")
    >>> with torch.no_grad(), vtc.compress(model, Look(), retention=0.25):
    ...     output = model(**tiny_inputs("llava-clip", [[3, "image", 5], ["image", 9]], model=model))
    0 torch.Size([2, 16, 64]) (16, 16) (4, 4)
    """

    stage: Stage
    model: ModelSpec
    budget: Budget | ItemBudgets | None
    items: ItemTable
    separators: ItemTable
    states: States
    visual: Tensor
    valid: Tensor
    prompt: Tensor
    text: Tensor
    fingerprint: Tensor
    vision_rows: dict[tuple[int, VisionReading], Tensor] = field(default_factory=dict)
    llm_rows: dict[tuple[int, LLMReading], Tensor] = field(default_factory=dict)
    vision_prefix: dict[tuple[int, VisionReading], Tensor] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    pairs: Mapping[str | None, PairFeatures] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    final_norm: Callable[[Tensor], Tensor] = field(default=lambda rows: rows)
    cached: Callable[[], tuple[Tensor, Tensor]] | None = None
    unpooled: tuple[Tensor, tuple[int, ...]] | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """[I, N, D] hidden rows of the items' tokens."""
        return self.states.of(self.items)

    @cached_property
    def patches(self) -> Patches:
        """What the projector made of the items' patches, where the model pools these to tokens; elsewhere the tokens.

        Before the LLM, for a method whose Needs say `unpooled`.
        """
        return patches(self.tokens, self.items, self.unpooled)

    @cached_property
    def hidden(self) -> Tensor:
        """[B, L, D] hidden rows of everything, text included."""
        return self.states.all()

    @property
    def device(self) -> torch.device:
        """Where everything here lies."""
        return self.states.device

    @cached_property
    def crop(self) -> Tensor:
        """[I, N] crop or frame of each token, -1 behind an item's end."""
        return self.items.geometry("crop")

    @cached_property
    def most_crops(self) -> int:
        """Crops or frames of the item that has most of them, on the host; 1 where there are no items."""
        return max((layout.n_crops for layout in self.items.layouts), default=1)

    @cached_property
    def framed(self) -> bool:
        """Whether every crop of every item is a raster of its own and no token has left it; known on the host."""
        columns = zip(self.items.layouts, self.items.counts, strict=True)
        return all(layout.framed and count == layout.selectable for layout, count in columns)

    @cached_property
    def crops(self) -> tuple[Tensor, Tensor]:
        """The tokens of each crop side by side: places [I, G, W] in the item, and which of them are real."""
        sizes, mask = [layout.crop_sizes for layout in self.items.layouts], self.items.mask
        width = min(mask.shape[1], max(map(max, sizes), default=0))
        if not self.framed:
            return in_groups(self.crop, self.most_crops, width, mask)
        rows = [[*row, *[0] * (self.most_crops - len(row))] for row in sizes]
        first = [[0, *accumulate(row[:-1])] for row in rows]
        begin, size = put([first, rows], mask.device)[..., None]
        step = torch.arange(width, device=mask.device)
        real = step < size
        return (begin + step) * real, real

    @cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """[I, N] row and column of each token inside its crop, in encoder patches; -1 behind an item's end."""
        return self.items.geometry("row"), self.items.geometry("col")

    @cached_property
    def keep(self) -> tuple[int, ...]:
        """Tokens the budget grants each item, of those it had in the input and without its separators."""
        return self._grant(list(self.granted))

    def keep_from_layer(self, layer: int) -> tuple[int, ...]:
        """Tokens each item may keep from LLM layer `layer` on when every layer before it sees them all."""
        columns = zip(self.budgets, self.items.input_counts, strict=True)
        return self._grant([each.tokens_from_layer(n, layer, self.model.llm_layers) for each, n in columns])

    @property
    def granted(self) -> tuple[int, ...]:
        """Tokens of each item, separators included, that may enter an LLM layer in the mean over all layers."""
        return tuple(each.tokens(n) for each, n in zip(self.budgets, self.items.input_counts, strict=True))

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """The budget of each item."""
        assert self.budget is not None, "this method was planned without a budget"
        return self.budget.each(self.items.sources)

    def _grant(self, granted: list[int]) -> tuple[int, ...]:
        columns = zip(granted, self.items.counts, self.items.fixed, strict=True)
        return tuple(min(now, max(1, total - fixed)) for total, now, fixed in columns)

    def vision_attention(self, layer: int, reading: VisionReading | None = None) -> Tensor:
        """[I, N] or [I, N, C] what the plan's Needs recorded of encoder layer `layer`, packed to the LLM's tokens.

        reading: which of several.
        """
        rows = self.vision_rows[layer, reading or _only(self.needs.vision[layer])]
        if self.items.sources != tuple(range(len(rows))):
            rows = rows[self.items.source]
        return take_rows(rows, self.items.token)

    def vision_lead(self, layer: int, reading: VisionReading | None = None) -> Tensor:
        """[I, P, ...] what was recorded of the P rows in front of the patches, such as a class token.

        At encoder stages alone; P is 0 where the encoder has no such rows. reading: which of several.
        """
        return self.vision_prefix[layer, reading or _only(self.needs.vision[layer])][self.items.source]

    def llm_attention(self, layer: int, reading: LLMReading | None = None) -> Tensor:
        """[..., I, N] what was recorded of LLM layer `layer`, at the items' tokens. reading: which of several."""
        return self.items.take(self.llm_rows[layer, reading or _only(self.needs.llm[layer])])

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [I, H, N, W] each, of the items' tokens in the cache of the first layer the stage is about.

        As they lie there: keys are behind the rotary embedding. After the prefill alone.
        """
        if self.cached is None:
            raise VTCError(
                f"entries of the KV cache were asked for at stage {self.stage}; ask for them at a CacheStage, where "
                "the prefill is over"
            )
        return self.cached()

    def pair(self, name: str | None) -> PairFeatures:
        """What the pair `name` of the plan's Needs says of the question, and what makes tokens comparable with it.

        At LLM stages alone: the encoder may run before the prompt is known.
        """
        if name not in self.pairs:
            raise VTCError(
                f"the pair {name!r} was asked for at stage {self.stage}; name it in Needs(pairs=...) of the plan, and "
                "ask before the LLM, inside it or after the prefill"
            )
        return self.pairs[name]

    def mean(self, values: Tensor) -> Tensor:
        """[I, N, ...] one value per token -> [I, ...] mean over the real tokens of each item, in float32.

        Items are padded to the largest of the batch: `values.mean(1)` would average the padding too.
        """
        mask = self.items.mask.reshape(*self.items.mask.shape, *(1,) * (values.ndim - 2))
        return torch.where(mask, values, 0).sum(1, dtype=torch.float32) / mask.sum(1).clamp(min=1)


def _only(some: R | tuple[R, ...]) -> R:
    readings = each(some)
    if len(readings) > 1:
        raise VTCError(f"this layer has several readings, {', '.join(map(repr, readings))}; say which one is wanted")
    return readings[0]
