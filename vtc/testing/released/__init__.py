"""Selections as the released implementations compute them, to time ours against: no raggedness, no ties, no trace.

Every method has two forms. `batched` is the algorithm in plain batched torch for items of one shape, written from its
description; `loop` treats image after image as the released code does. Both return what stays: marks [I, N], or [I, H,
N] where KV heads choose on their own; or the rows [I, K, D] of methods that merge, of a cache [I, H, K, 2 W], its
keys and values side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.method.base import CacheStage, EncoderStage, ModelSpec, Rows, Selection, StageView
from vtc.method.pairs import PairFeatures
from vtc.method.readings import LLMReading
from vtc.method.registry import create
from vtc.method.states import States
from vtc.methods.fitprune.method import SUMS
from vtc.methods.mustdrop.method import TEXT
from vtc.methods.prumerge import ONE_HEAD
from vtc.methods.sparsevlm import TEXT as WORDS
from vtc.methods.vlcache import PostVision
from vtc.methods.zero_tprune import GRAPH
from vtc.testing.views import CLIP_L, Shape, make_view

TILED = Shape(((5, 24, 24),), tiling=(2, 2))
SHAPES = {576: Shape(((1, 24, 24),)), 2880: TILED, 6272: Shape(((32, 14, 14),))}
"""An image, a thumbnail with four tiles, and a video of 32 frames."""
NARROW, WIDE, KEYS, HEADS = 6, 896, 64, 4
"""Width of the rows where nobody looks at them, of a small LLM, and of keys; KV heads."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What a released implementation is given: one shape for all items, and how many tokens stay.

    shape: (crops, rows, columns). tokens: [I, N, D]. values: what the method's plan recorded at the tokens, [..., I, N]
    or [I, N, C]. keep: tokens of an item. ours: the selection of this library, for numbers that only it knows. before:
    what the method saw at the earlier stage that it remembers; where there is none, the same as `view`.
    """

    method: Any
    view: StageView
    shape: tuple[int, int, int]
    tokens: Tensor
    values: tuple[Tensor, ...]
    keep: int
    ours: Selection
    before: StageView

    @property
    def items(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def item(self, index: int) -> tuple[Tensor, ...]:
        """The recorded values of one item."""
        return tuple(v[index] if v.ndim == 2 or v.shape[0] == self.items else v[:, index] for v in self.values)


Form = Callable[[Scene], Tensor]


@dataclass(frozen=True)
class SelectionCase:
    """One stage of one method with its released forms.

    stage: where it acts. earlier: the stage whose rows it remembers there. wide: it looks at the tokens themselves,
    after the prefill at their keys and values. share: of the tokens that stay, keep: instead, how many. tolerance: of
    rows, relative to the largest; None where draws differ, so that only the number of tokens is the same. largest:
    items with more tokens are not timed. one_crop: nor are those of several crops. video: it compares frames, so that
    only videos are timed, and their frames resemble each other. steps: what it goes step by step through, the tokens
    that are "kept" or those that are "gone"; None where the number of its steps does not depend on the budget.
    """

    name: str
    batched: Form
    loop: Form
    stage: Any = 0
    options: dict[str, Any] = field(default_factory=dict)
    wide: bool = False
    share: float = 1 / 9
    keep: int | None = None
    tolerance: float | None = 0.0
    largest: int = 6272
    earlier: int | None = None
    one_crop: bool = False
    video: bool = False
    steps: Literal["kept", "gone"] | None = None

    @property
    def method(self) -> Any:
        """The method with the options of the case."""
        return create(self.name.split(" ")[0], **self.options)

    def fits(self, shape: Shape) -> bool:
        """Whether items of a shape are timed."""
        crops = shape.regions[0][0]
        few = math.prod(shape.regions[0]) <= self.largest and (crops == 1 or not self.one_crop)
        return few and ((crops > 1 and shape.tiling is None) or not self.video)

    def seen(
        self, shape: Shape, batch: int, *, keep: int | None = None, width: int | None = None
    ) -> tuple[Any, StageView]:
        """The method, and what it sees of `batch` items of a shape; it remembers its earlier stage."""
        method, view, _ = self._seen(shape, batch, keep, width)
        return method, view

    def _seen(self, shape: Shape, batch: int, keep: int | None, width: int | None) -> tuple[Any, StageView, StageView]:
        ((crops, rows, columns),) = shape.regions
        if self.video:
            shape = dataclasses.replace(shape, kind="video", tiling=None)
        length = crops * rows * columns
        method = self.method
        entries = None
        if isinstance(self.stage, CacheStage):
            entries, width = (HEADS, width or KEYS) if self.wide else None, NARROW
        width = width or (WIDE if self.wide else NARROW)
        inside = isinstance(self.stage, EncoderStage)
        spec = dataclasses.replace(CLIP_L, width=width, single_crop=crops == 1, clip=True, encoder_stages=inside)
        wanted = keep or self.keep or max(1, int(length * self.share) // crops) * crops
        budget: dict[str, Any] = {"keep": wanted} if method.needs_budget else {}
        view = make_view([shape] * batch, stage=self.stage, spec=spec, width=width, entries=entries, **budget)
        if self.video:
            view = dataclasses.replace(view, states=States(moving(view, crops)))
        view = recorded(view, method, spec)
        if self.earlier is None:
            return method, view, view
        hidden = torch.randn(view.hidden.shape, generator=torch.Generator().manual_seed(4))
        before = dataclasses.replace(view, stage=self.earlier, states=States(hidden), memory={})
        method.select(before)
        return method, dataclasses.replace(view, memory=before.memory), before

    def scene(self, shape: Shape, batch: int, *, keep: int | None = None, width: int | None = None) -> Scene:
        """The case on `batch` items of a shape, with what our selection keeps of them."""
        method, view, before = self._seen(shape, batch, keep, width)
        ours = method.select(fresh(view))
        ((crops, rows, columns),) = shape.regions
        values = _values(view)
        kept = int(ours.by_head[0, 0].sum())
        return Scene(method, view, (crops, rows, columns), view.tokens, values, kept, ours, before)


def moving(view: StageView, frames: int) -> Tensor:
    """[B, L, D] rows of a view whose frames resemble the first of every four, at some places more than at others."""
    tokens = view.tokens.view(len(view.items), frames, -1, view.tokens.shape[2])
    change = torch.rand(tokens.shape[:3], generator=torch.Generator().manual_seed(5))
    moved = tokens[:, torch.arange(frames) // 4 * 4] + change[..., None] * tokens
    hidden = view.hidden.clone()
    hidden[view.items.row[:, None], view.items.index] = moved.flatten(1, 2)
    return hidden


def recorded(view: StageView, method: Any, spec: ModelSpec) -> StageView:
    """The view with random readings for all that the method plans, its CLIP pairs and its learned parts.

    One row stands in front of the patches inside the encoder, the same for all items.
    """
    generator = torch.Generator().manual_seed(3)
    plan, items = method.plan(spec), view.items
    longest = max(layout.n_tokens for layout in items.layouts)
    vision: dict[Any, Tensor] = {}
    llm: dict[Any, Tensor] = {}
    for layer, readings in plan.needs.vision.items():
        for reading in readings if isinstance(readings, tuple) else (readings,):
            wide = () if reading in FLAT else (2, HEADS, KEYS) if reading == GRAPH else (KEYS,)
            vision[layer, reading] = torch.rand(len(items), longest, *wide, generator=generator)
    said = view.asking.sum(1)
    for at, asked in plan.needs.llm.items():
        for each in asked if isinstance(asked, tuple) else (asked,):
            lead = _lead(each, int(said.max()))
            llm[at, each] = torch.rand(*lead, *view.hidden.shape[:2], generator=generator)
            if each == WORDS:  # a row of fewer words has nothing behind them
                llm[at, each] *= (torch.arange(*lead)[:, None] < said)[..., None]
            elif isinstance(each, PostVision):  # a density between a quarter and three quarters, at every key the same
                llm[at, each][0] = llm[at, each][0, :, :1] / 2 + 1 / 4
    said = torch.randn(1, KEYS, generator=generator).expand(len(view.text), -1)
    pairs = {name: PairFeatures(said, lambda rows: rows) for name in plan.needs.pairs}  # one question for all
    torch.manual_seed(0)
    module = method.build(spec).eval() if method.trained else None
    front = {key: rows[:1, :1].expand(len(items), *rows[:1, :1].shape[1:]) for key, rows in vision.items()}
    return dataclasses.replace(
        view, vision_rows=vision, vision_prefix=front, llm_rows=llm, pairs=pairs, needs=plan.needs, module=module
    )


def _lead(reading: LLMReading, words: int) -> tuple[int, ...]:
    """How many numbers a reading has of every token."""
    if reading == WORDS:
        return (words,)
    if isinstance(reading, PostVision):
        return (1 + HEADS,)
    return (HEADS,) if getattr(reading, "per_head", False) else (2,) if reading in PAIRS else ()


FLAT = (Rows.CLS, Rows.RECEIVED, Rows.CLS_LOGITS, Rows.CLS_PATCHES, ONE_HEAD)
PAIRS = (Rows.GROUP_SUMS, Rows.TRANSITION, SUMS, TEXT)


def _values(view: StageView) -> tuple[Tensor, ...]:
    seen = list(view.vision_rows)
    if isinstance(view.stage, EncoderStage):
        seen = [key for key in seen if key[0] == view.stage.layer - 1]
    if isinstance(view.stage, CacheStage):
        return tuple(view.llm_attention(*key) for key in view.llm_rows if key[0] == view.stage.from_layer)
    if isinstance(view.stage, int) and view.stage > 0:
        now = [key for key in view.llm_rows if key[0] in (view.stage - 1, view.stage)]
        return tuple(view.llm_attention(*key) for key in now[:1]) + tuple(view.vision_attention(*key) for key in seen)
    return tuple(view.vision_attention(*key) for key in seen)


def fresh(view: StageView) -> StageView:
    """The view as a method meets it first, its tokens gathered already: those of the released form are a slice."""
    new = dataclasses.replace(view, memory=dict(view.memory))
    new.__dict__["tokens"] = view.tokens
    return new
