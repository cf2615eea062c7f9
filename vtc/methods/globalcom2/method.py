"""GlobalCom2: the overview of a high-resolution image decides how many tokens each of its crops keeps, and which."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Order, Plan, Rows, Selection, StageView
from vtc.method.groups import Parts
from vtc.method.layout import VisualItem
from vtc.method.readings import VisionReading
from vtc.method.registry import register
from vtc.methods.globalcom2 import crops
from vtc.ops.host import put
from vtc.ops.rank import inverse
from vtc.ops.select import take_rows

Score = Literal["auto", "cls", "cosine", "received"]


@register
class GlobalCom2(Compressor):
    """Give every crop of a tiled image its own share of the tokens, by the thumbnail, and rank them by both views.

    Acts before the LLM; training-free, text-agnostic (arXiv:2501.05179). z is the score of a patch. The thumbnail
    keeps its N R highest z. Crop c is worth ``S_c``, the sum of the thumbnail's z over the part of the image that c
    shows: ``sigma = softmax(S / tau)``, ``r_c = min(1, R (1 + sigma_c - mean(sigma)))``. Inside crop c the n_c r_c
    tokens with the highest ``(1 - alpha) z / |z| + alpha g / |g|`` stay, g being the thumbnail's z resized bilinearly
    to the stitched map and cut at the crops' borders, norms over the crop's tokens. Ties go to the lower index.

    tau: temperature of the allocation. alpha: weight of the thumbnail's view. score: "cls", products of the class
    token's query with the keys of the last encoder layer before the softmax, mean over heads; "cosine", minus the
    cosine between a token's features and the mean of its tile, features as the projector gets them; "received", the
    attention a patch receives in the last layer that sees the whole image, standardised per tile; "auto" takes "cls"
    where there is a class token and "cosine" elsewhere. layout: "raster" keeps the order of the picture; "official"
    gives the sequence of the released code for tiled images: the thumbnail's tokens by falling score, crop tokens
    numbered as if their crop had not been cut (which misplaces them in padded images), a newline behind every row of
    the padded map, each of which counts against the budget. exact_total: the shares n_c r_c are scaled to add up to
    the budget, by largest remainder; without it they are rounded down as in the released code.

    Rules for other inputs: images of one crop and images on Qwen-VL are one tile (first step only). Tiles whose rows
    and columns nobody told (InternVL without `image_sizes`) get equal shares and are ranked by their own view. The
    frames of a video are its crops: the overview is the mean of z over the frames, S_c the sum of z over frame c, its
    part in that mean. Where the model shrinks the stitched map, g is resized to the shrunk one.

    Departures from the paper and its code: the order of the picture and one newline per row of it, unless
    layout="official"; the exact budget, unless exact_total=False; at least one token of the thumbnail; everything
    stays where R = 1; images of one crop are compressed; batches and several images work, each on its own; a crop
    that lies in the padding does not shift the others; "cosine" averages over the tokens that unpadding leaves;
    patches that an earlier stage removed count as the lowest score of their item.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("globalcom2", tau=5).plan(llava).needs.vision
    {23: ClassLogits()}
    """

    tau: float = 10.0
    alpha: float = 0.5
    score: Score = "auto"
    layout: Order = "raster"
    exact_total: bool = True

    name: ClassVar[str] = "globalcom2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise VTCError(f"tau={self.tau} is no temperature; pass a positive number, the paper uses 10")
        if not 0 <= self.alpha <= 1:
            raise VTCError(f"alpha={self.alpha} is outside [0, 1]; it weighs the thumbnail's view, the paper uses 0.5")

    def reading(self, model: ModelSpec) -> tuple[int, VisionReading]:
        """The encoder layer and what is read there."""
        if self.score == "cls" and not model.has_cls:
            raise UnsupportedMethod(
                f"score='cls' needs a class token, the encoder of this {model.family} model has none; "
                "use score='cosine' or 'received'"
            )
        if self.score == "received":
            return model.full_attention_layers[-1], Rows.RECEIVED
        if self.score == "cosine" or not model.has_cls:
            return model.feature_layer, Rows.HIDDEN
        return model.vision_layers - 1, Rows.CLS_LOGITS

    def plan(self, model: ModelSpec) -> Plan:
        layer, reading = self.reading(model)
        return dataclasses.replace(super().plan(model), needs=Needs(vision={layer: reading}))

    def select(self, view: StageView) -> Selection:
        items, device = view.items, view.device
        groups = view.most_crops
        z = self._scores(view, groups)
        overall, sums, guided = _guidance(view, z, groups)
        thumbnail = put([[layout.thumbnail == crop for crop in range(groups)] for layout in items.layouts], device)
        total, newlines = list(view.keep), self._released(view)
        for item, lines in newlines.items():
            total[item] = max(1, min(view.granted[item], items.counts[item]) - lines)
        keep, counts = put(total, device), put(items.counts, device)
        ratios = crops.crop_ratios(sums, guided, keep / counts.clamp(min=1).double(), self.tau)
        sizes = crops.group_sums(torch.ones_like(z), view.crop, groups, items.mask).long()
        if self.exact_total:
            shares = crops.exact_shares(ratios, sizes, keep, thumbnail)
        else:
            ratios = ratios.masked_fill((keep >= counts)[:, None], 1.0)
            largest = torch.where(thumbnail, torch.inf, torch.where(sizes > 0, ratios, -torch.inf)).argmax(1)
            shares = crops.floored_shares(ratios, sizes, largest)
        both = crops.blend(z, overall, view.crop, groups, items.mask, self.alpha)
        ranked = torch.where(guided.gather(1, view.crop.clamp(min=0)), both, z)
        parts = Parts.of(view, "crop")
        chosen = parts.give(parts.best(parts.take(ranked), shares.flatten()))
        selection = Selection(chosen, counts=total if self.exact_total else None)
        return _line_up(view, selection, z, newlines) if newlines else selection

    def _scores(self, view: StageView, groups: int) -> Tensor:
        """[I, N] z of every token."""
        layer, reading = self.reading(view.model)
        values = view.vision_attention(layer, reading).detach()
        if reading == Rows.HIDDEN:
            return crops.unlike_mean(values, view.crop, groups, view.items.mask)
        if reading == Rows.RECEIVED:
            return crops.standardise(values, view.crop, groups, view.items.mask)
        return values.float()

    def _released(self, view: StageView) -> dict[int, int]:
        """Items that get the released order -> newlines in it."""
        found = {}
        if self.layout == "official":
            for item, layout in enumerate(view.items.layouts):
                lines = _released_lines(layout)
                whole = view.items.counts[item] == layout.selectable
                if 0 < lines < view.items.counts[item] and whole and view.keep[item] < view.items.counts[item]:
                    found[item] = lines
        return found


class Overview(NamedTuple):
    """The thumbnail of a layout: its first token and raster, and where every token of the item lies on the crops' map.

    size: rows and columns of the map. place: [n] raster index on it, anything where the token is not of a crop.
    """

    first: int
    grid: tuple[int, int]
    size: tuple[int, int]
    place: Tensor


def overview(layout: VisualItem) -> Overview | None:
    """The thumbnail of a tiled image; None where there is none or nobody knows what the crops show."""
    if layout.thumbnail is None or layout.tiling is None:
        return None
    (count, height, width), *others = layout.regions
    area, token = height * width, torch.arange(layout.n_tokens, device=layout.crop.device)
    if others:  # the crops are stitched to one map behind the thumbnail
        ((_, rows, columns),) = others
        behind = (token - area).clamp(min=0)
        line = columns + layout.newlines // rows
        place = behind // line * columns + (behind % line).clamp(max=columns - 1)
        return Overview(0, (height, width), (rows, columns), place)
    if count != layout.n_crops or layout.tiling[0] * layout.tiling[1] != count - 1:
        return None
    tile = token // area
    tile = (tile - (tile > layout.thumbnail).long()).clamp(max=count - 2)
    columns = layout.tiling[1] * width
    row = tile // layout.tiling[1] * height + token % area // width
    place = row * columns + tile % layout.tiling[1] * width + token % width
    return Overview(layout.thumbnail * area, (height, width), (layout.tiling[0] * height, columns), place)


def _alike(view: StageView, only: dict[int, int] | None = None) -> Iterator[tuple[VisualItem, Tensor]]:
    """Layouts and the items [R] that share them."""
    same: dict[object, list[int]] = {}
    for item, layout in enumerate(view.items.layouts):
        if only is None or item in only:
            key = (layout.kind, layout.n_tokens, layout.newlines, layout.thumbnail, layout.tiling, layout.regions)
            same.setdefault(key, []).append(item)
    for rows in same.values():
        yield view.items.layouts[rows[0]], put(rows, view.device)


def _guidance(view: StageView, z: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the overview says: of every token [I, N], of every crop [I, C], and the crops it speaks of, [I, C] bool."""
    items = view.items
    overall, guided = torch.zeros_like(z), z.new_zeros(len(items), groups, dtype=torch.bool)
    sums = z.new_zeros(len(items), groups, dtype=torch.float64)
    for layout, rows in _alike(view):
        known = overview(layout)
        frames = layout.kind == "video" and len(layout.regions) == 1 and layout.regions[0][0] == layout.n_crops > 1
        if known is None and not frames:
            continue
        mask, token = items.mask[rows], items.token[rows]
        lowest = torch.where(mask, z[rows], torch.inf).amin(1, keepdim=True)
        whole = lowest.expand(-1, layout.n_tokens + 1).scatter(
            1, torch.where(mask, token, layout.n_tokens), torch.where(mask, z[rows], 0.0)
        )
        others = put([crop for crop in range(layout.n_crops) if crop != layout.thumbnail], z.device)
        if known is not None:
            assert layout.tiling is not None
            height, width = known.grid
            picture = whole[:, known.first : known.first + height * width].view(-1, height, width)
            sums[rows[:, None], others] = crops.cell_sums(picture, layout.tiling)
            seen = crops.stretch(picture, known.size).flatten(1)[:, known.place.to(z.device, non_blocking=True)]
        else:
            picture = whole[:, : layout.selectable].reshape(len(rows), layout.n_crops, -1)
            sums[rows] = crops.group_sums(z[rows], view.crop[rows], groups, mask)
            seen = picture.mean(1).repeat(1, layout.n_crops)
        guided[rows[:, None], others] = guided.new_ones(())
        overall[rows] = seen.gather(1, token.clamp(max=seen.shape[1] - 1))
    return overall, sums, guided


def _released_lines(layout: VisualItem) -> int:
    """Newlines of the released order: one per row of the padded map; 0 where the order is not defined."""
    known = overview(layout)
    if known is None or len(layout.regions) == 1 or not layout.newlines:
        return 0
    assert layout.tiling is not None
    full = layout.tiling[0] * known.grid[0], layout.tiling[1] * known.grid[1]
    shrunk = known.size[0] != full[0] and known.size[1] != full[1]
    return 0 if shrunk else full[0]


def _line_up(view: StageView, selection: Selection, z: Tensor, newlines: dict[int, int]) -> Selection:
    """The released order: its rows on each item's first places, newlines among them, instead of the model's own."""
    laid, tokens = selection.keep.clone(), view.tokens.clone()
    into, separators = torch.full_like(view.items.token, -1), view.separators.mask.clone()
    for layout, rows in _alike(view, newlines):
        grid, count = layout.regions[0][1:], layout.selectable
        assert layout.tiling is not None
        kept, lines = selection.keep[rows, :count], layout.tiling[0] * grid[0]
        order = crops.released_order(kept, z[rows, :count], view.crop[rows, :count], layout.tiling, grid)
        newline = view.hidden[view.separators.row[rows], view.separators.index[rows, 0]]
        sequence = torch.cat([view.tokens[rows, :count], newline[:, None].expand(-1, lines, -1)], dim=1)
        tokens[rows, :count] = take_rows(sequence, order[:, :count])
        laid[rows, :count] = torch.arange(count, device=laid.device) < kept.sum(1, keepdim=True) + lines
        into[rows, :count] = torch.where(kept, inverse(order)[:, :count], -1)
        separators.index_fill_(0, rows, False)
    counts = selection.counts and [count + newlines.get(item, 0) for item, count in enumerate(selection.counts)]
    return Selection(laid, counts, tokens, into, separators)
