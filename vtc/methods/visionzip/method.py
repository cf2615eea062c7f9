"""VisionZip: dominant tokens by attention, contextual tokens that collect the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Order, Plan, Selection, StageView
from vtc.method.layout import VisualItem
from vtc.method.parts import seated
from vtc.method.registry import register
from vtc.method.vision_readings import MeanKeys
from vtc.methods.visionzip.contextual import add_mean, dominant_and_targets
from vtc.ops.host import put
from vtc.ops.nearest import nearest_target
from vtc.ops.rank import order_by
from vtc.ops.select import apportion, in_groups, out_of_groups, take_rows

Place = Literal["llm", "projector"]


MEAN_KEYS = MeanKeys(rounded=True)


@register
class VisionZip(Compressor):
    """Keep the patches the class token looks at, and merge all others into a few evenly spaced contextual tokens.

    Training-free, text-agnostic (arXiv:2412.04467). Of k tokens, D = round(k * share) are dominant: those with the
    highest ``sum_h A_p[h, CLS, j]``, p being the encoder layer whose output is projected (the last but one of CLIP).
    Of the R others, in raster order, C = k - D are targets: numbers 0, step, 2 step, ... with step = max(1, R // C).
    Every other token goes to the target with the highest cosine of ``m_j = mean_h K_p[h, j]``, and the contextual
    token is ``x_target + mean(x assigned)``, a sum of two terms. Tiles and frames are treated one by one and share k
    in proportion to their sizes. Ties go to the lower index.

    share: part of the tokens that is dominant; the paper's budgets have 54 of 64. before: "llm" acts on projected
    features; "projector" on the encoder's, as the released code does, on models with one crop per image whose encoder
    may lose patches. layout: "raster" leaves a contextual token at its target's place; "official" puts contextual
    tokens behind the dominant ones, a thumbnail and the other tiles each as one block, and drops all newlines, which
    gives their share of the budget to patches (on multi-axis positions the order in the prompt decides).

    Departures from the paper and its code: features behind the projector unless before="projector"; the class token
    itself does not reach the LLM, D patches do; exact k; encoders without a class token rank by the attention a patch
    receives, mean over heads and queries, in the last layer up to p that sees the whole image; where encoders rotate
    keys, rotated ones are compared; tiled images are unpadded, and ranked after that, also under layout="official".

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("visionzip", before="projector").plan(llava).stages
    (EncoderStage(layer=23),)
    """

    share: float = 54 / 64
    before: Place = "llm"
    layout: Order = "raster"

    name: ClassVar[str] = "visionzip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise VTCError(f"share={self.share} is outside (0, 1]; it is the dominant part, the paper's is 54/64")

    def plan(self, model: ModelSpec) -> Plan:
        plan = super().plan(model)
        if self.before == "projector":
            if not (model.encoder_stages and model.single_crop):
                raise UnsupportedMethod(
                    f"before='projector' merges patches of the encoder, which this {model.family} model does not allow "
                    "(its images are several crops, or its tokens several patches); use before='llm'"
                )
            plan = dataclasses.replace(plan, stages=(EncoderStage(model.feature_layer + 1),))
        attention = model.patch_attention
        return dataclasses.replace(plan, needs=Needs(vision={model.key_layer: (attention, MEAN_KEYS)}))

    def select(self, view: StageView) -> Selection:
        items, layer = view.items, view.model.key_layer
        official = self.layout == "official"
        keep = view.keep
        if official:
            keep = tuple(max(1, min(n, now)) for n, now in zip(view.granted, items.counts, strict=True))
        score = view.vision_attention(layer, view.model.patch_attention).detach()
        metric = view.vision_attention(layer, MEAN_KEYS).detach()
        best, target = torch.zeros_like(items.mask), torch.zeros_like(items.mask)
        into = torch.full_like(items.token, -1)
        shapes = [(layout.n_crops, longest(layout)) for layout in items.layouts]
        for shape in dict.fromkeys(shapes):
            same = [item for item, other in enumerate(shapes) if other == shape]
            rows = put(same, score.device)
            found = self._crops(
                score[rows], metric[rows], view.crop[rows], items.mask[rows], shape, [keep[item] for item in same]
            )
            best[rows], target[rows], into[rows] = found
        kept = best | target
        rows = add_mean(view.tokens, into, kept, max(keep, default=0))
        into = torch.where(best, torch.arange(into.shape[1], device=into.device), into)
        order = order_by(~kept)
        if official:  # block by block
            order = order_by(torch.where(kept, self._block(view, target), 8))
            number = (kept.cumsum(1) - 1).clamp(min=0)
            rows = take_rows(rows, number.gather(1, order[:, : rows.shape[1]]))
        tokens, into = seated(kept, rows, into, order)
        given = Selection(kept, counts=keep, tokens=tokens, merged_into=into, scores=score)
        return dataclasses.replace(given, separators=False) if official else given

    @staticmethod
    def _block(view: StageView, target: Tensor) -> Tensor:
        """[I, N] the released order: a thumbnail's block where the model puts it, contextual tokens behind dominant."""
        layouts = view.items.layouts
        thumbnail = [-1 if layout.thumbnail is None else layout.thumbnail for layout in layouts]
        crop, where = put([thumbnail, [4 * (t > 0) for t in thumbnail]], target.device)[..., None]
        return torch.where(view.crop == crop, where, 2) + target.long()

    def _crops(
        self, score: Tensor, metric: Tensor, crop: Tensor, mask: Tensor, shape: tuple[int, int], keep: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dominant tokens, targets, and where every other token goes, for items of one shape; all [R, N]."""
        place, there = in_groups(crop, *shape, mask)
        wanted = put(keep, score.device)
        count = apportion(wanted, there.sum(2)).flatten()
        dominant = (count * self.share + 0.5).floor().long().minimum(count)
        flat = place.flatten(1)
        crops = len(count), -1
        scores = score.gather(1, flat).view(crops)
        best, target = dominant_and_targets(scores, dominant, count - dominant, there.view(crops))
        most = min(shape[1], math.ceil((1 - self.share) * min(max(keep), shape[1]) + 0.5))
        keys = take_rows(metric, flat).view(*crops, metric.shape[2])
        into = nearest_target(keys, target, there.view(crops) & ~best, most)
        goes = torch.where(into >= 0, place.view(crops).gather(1, into.clamp(min=0)), -1)

        def back(values: Tensor, empty: int) -> Tensor:
            return out_of_groups(values.view_as(place), place, there, score.shape[1], empty)

        return back(best, 0), back(target, 0), back(goes, -1)


def longest(layout: VisualItem) -> int:
    """No crop of the layout has more tokens than this."""
    if len(layout.regions) == 1 and layout.regions[0][0] == layout.n_crops:
        return math.prod(layout.regions[0][1:])
    if len(layout.regions) == 2 and layout.tiling is not None:
        return math.prod(layout.regions[0])  # tiles are as large as the thumbnail and may be cut
    return layout.selectable
