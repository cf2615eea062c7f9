"""ToDRE: a few tokens that differ most go into the LLM, and none stays once text and image have parted (2505.18757)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, Stage, StageView
from vtc.method.budget import Budget
from vtc.method.registry import register
from vtc.ops.greedy import best, chosen, k_center, max_sum
from vtc.ops.hashing import uniform
from vtc.ops.host import put
from vtc.ops.similarity import cosine_to_mean

Variant = Literal["max_sum", "k_center"]
Pivot = Literal["cls", "random", "center", "farthest"]


@register
class ToDRE(Compressor):
    """Keep the most diverse tokens before the LLM; inside it, drop all of them when text and image stop attending.

    Training-free, two stages. Stage 1 acts before the LLM on the tokens x of all crops or frames together: it begins
    with a pivot and adds one token at a time. "max_sum" (version 2 of the paper, eq. 4-6) adds the token with the
    lowest sum of cosines to all chosen ones; "k_center" (version 1) the one with the largest distance 1 - cos to its
    nearest chosen token. Ties go to the lower index, kept tokens stay in their order. Stage 2 acts behind an LLM layer
    l. With its head-mean attention A, text rows T and visual rows V, ``a_tv = sum(A[T, V]) / |T|`` and ``a_vt =
    sum(A[V, T]) / |V|``: where both are below `tau`, all visual tokens of that batch row leave after layer l,
    separators too; otherwise nothing happens. The first of several layers that fires wins.

    variant: the rule of stage 1. pivot: "cls" is the token with the highest class-token attention (softmax over the
    patches, mean over heads) of encoder layer `pivot_layer`, by default the last one; of images with an overview it is
    one of the overview's tokens. "center" and "farthest" have the highest and lowest cosine to the mean token, "random"
    depends on `seed` and the pixels. None is "cls", or "center" where the encoder has no class token. check_layers: l,
    0-based, as an index or as a fraction of the LLM's layers. tau: threshold of stage 2, strict. diversity, relevance:
    False turns stage 1 or stage 2 off. Stage 2 alone takes no budget; it is a threshold, so with both stages fewer
    tokens may pass the late layers than the budget allows. A retention of 1 leaves the model untouched.

    Departures from the paper and its code: there is no public code. What the paper leaves open: cosine distance for
    k-center, the mean over heads, 0-based floor(7L/8) (models of up to 8 layers check the last layer but one, since
    nothing would be left to save behind the last), kept tokens in ascending order, "center" for encoders without a
    class token (the paper: random, within 0.2 %). Text is all of the prompt that is neither visual nor system prompt,
    in front of the images too. Since image rows cannot see the question behind them, a_vt is 0 unless text stands in
    front of an image. Positions are renumbered without gaps where the tokens enter the LLM, except under multi-axis
    rotary positions, and stay as they are behind stage 2.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("todre", relevance=False).plan(llava).stages
    (0,)
    >>> vtc.create("todre", check_layers=(0.5, 28)).plan(llava).stages
    (0, 17, 29)
    """

    variant: Variant = "max_sum"
    pivot: Pivot | None = None
    pivot_layer: int | None = None
    seed: int = 0
    check_layers: tuple[int | float, ...] = (7 / 8,)
    tau: float = 0.1
    diversity: bool = True
    relevance: bool = True

    name: ClassVar[str] = "todre"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise VTCError(f"tau={self.tau!r} is no share of attention; pass a value in (0, 1], the paper uses 0.1")
        wrong = [each for each in self.check_layers if not _is_layer(each)]
        if wrong or (self.relevance and not self.check_layers):
            raise VTCError(
                f"check_layers={self.check_layers!r} names no layers; write indices from 0 on or fractions between 0 "
                "and 1, for example (0.875,), or turn the second stage off with relevance=False"
            )
        if not (self.diversity or self.relevance):
            raise VTCError("diversity=False and relevance=False leave nothing to do; turn one of the stages on")

    @property
    def needs_budget(self) -> bool:
        return self.diversity

    def keeps_all(self, budget: Budget | None, tokens: int) -> bool:
        """Where stage 2 runs, an item that happens to fit into the budget must meet it in every batch."""
        if budget is not None and self.relevance:
            return budget.retention is not None and budget.retention >= 1
        return super().keeps_all(budget, tokens)

    def checked(self, model: ModelSpec) -> tuple[int, ...]:
        """The LLM layers behind which stage 2 decides, in ascending order."""
        last = model.llm_layers - 2
        layers = {min(int(each * model.llm_layers), last) if _is_fraction(each) else each for each in self.check_layers}
        if not all(0 <= layer <= last for layer in layers):
            raise UnsupportedMethod(
                f"check_layers={self.check_layers!r} saves nothing on {model.llm_layers} LLM layers: tokens leave "
                f"behind the layer checked; choose among 0 to {last}"
            )
        return tuple(sorted(int(layer) for layer in layers))

    def start(self, model: ModelSpec) -> Pivot:
        """The pivot's rule on this model."""
        if self.pivot == "cls" and not model.has_cls:
            raise UnsupportedMethod(
                f"pivot='cls' needs a class token, which the vision encoder of this {model.family} model lacks; write "
                "pivot='center', 'farthest' or 'random'"
            )
        return self.pivot or ("cls" if model.has_cls else "center")

    def attended(self, model: ModelSpec) -> int:
        """The encoder layer whose class token chooses the pivot."""
        layer = model.vision_layers - 1 if self.pivot_layer is None else self.pivot_layer
        if not 0 <= layer < model.vision_layers:
            raise UnsupportedMethod(
                f"pivot_layer={layer} is not among the encoder layers 0 to {model.vision_layers - 1} of this "
                f"{model.family} model"
            )
        return layer

    def plan(self, model: ModelSpec) -> Plan:
        stages: list[Stage] = [0] if self.diversity else []
        needs = Needs()
        if self.diversity and self.start(model) == "cls":
            needs |= Needs(vision={self.attended(model): Rows.CLS_PATCHES})
        if self.relevance:
            layers = self.checked(model)
            stages += [layer + 1 for layer in layers]
            needs |= Needs(llm=dict.fromkeys(layers, Rows.GROUP_SUMS))
        return Plan(tuple(stages), needs, "compact_input" if self.diversity and not model.mrope else "preserve")

    def select(self, view: StageView) -> Selection | None:
        if view.stage == 0:
            return self.diverse(view)
        assert isinstance(view.stage, int)
        return self.relevant(view, view.stage - 1)

    def diverse(self, view: StageView) -> Selection:
        """Stage 1: `view.keep` tokens of each item, added one at a time."""
        mask = view.items.mask
        walk = max_sum if self.variant == "max_sum" else k_center
        order = walk(view.tokens, self.first(view), max(view.keep), mask)
        keep = put(view.keep, order.device)
        return Selection(chosen(order, keep, mask), counts=view.keep)

    def first(self, view: StageView) -> Tensor:
        """[I] place of the pivot in each item."""
        mask, start = view.items.mask, self.start(view.model)
        if start == "cls":
            return best(view.vision_attention(self.attended(view.model), Rows.CLS_PATCHES), _overview(view))
        if start == "random":
            return best(uniform(view.fingerprint, view.items.token, self.seed), mask)
        cosine = cosine_to_mean(view.tokens, mask)
        return best(cosine if start == "center" else -cosine, mask)

    def relevant(self, view: StageView, layer: int) -> Selection | None:
        """Stage 2: every token of the rows whose text and image still attend to each other."""
        items, separators = view.items, view.separators
        if not any(items.counts) and not any(items.fixed):
            return None
        stay = ~parted(view.llm_rows[layer, Rows.GROUP_SUMS], view.visual, view.text, self.tau)
        alive = stay[separators.row][:, None] & separators.mask if any(items.fixed) else None
        return Selection(stay[items.row][:, None] & items.mask, separators=alive)


def shares(sums: Tensor, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What a text row pays to the visual tokens and a visual row to the text, in the mean over the rows: [B] each.

    sums: [2, B, L] attention summed over the text rows and over the visual rows. visual, text: [B, L] bool. Rows of
    attention sum to one, so the sum over all keys is the number of rows.
    """
    to_visual = (sums[0].float() * visual).sum(1) / text.sum(1).clamp(min=1)
    to_text = (sums[1].float() * text).sum(1) / visual.sum(1).clamp(min=1)
    return to_visual, to_text


def parted(sums: Tensor, visual: Tensor, text: Tensor, tau: float) -> Tensor:
    """[B] bool, True where both shares lie below `tau`; never without text or without visual tokens."""
    to_visual, to_text = shares(sums, visual, text)
    return (to_visual < tau) & (to_text < tau) & text.any(1) & visual.any(1)


def _overview(view: StageView) -> Tensor:
    """[I, N] the overview's tokens of the images that have one (and some of it left), all tokens of the others."""
    overviews = [-1 if layout.thumbnail is None else layout.thumbnail for layout in view.items.layouts]
    if max(overviews, default=-1) < 0:
        return view.items.mask
    inside = view.items.mask & (view.crop == put(overviews, view.crop.device)[:, None])
    return torch.where(inside.any(1, keepdim=True), inside, view.items.mask)


def _is_fraction(layer: int | float) -> bool:
    return isinstance(layer, float) and 0 < layer < 1


def _is_layer(layer: int | float) -> bool:
    return _is_fraction(layer) or (isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0)
