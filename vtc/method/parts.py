"""Merging inside the parts of items, their crops or frames, and inside the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import PRE_LLM, EncoderStage, ModelSpec, Needs, Plan, Scope, Selection, StageView
from vtc.method.readings import VisionReading
from vtc.ops.host import put
from vtc.ops.merge import Step, bipartite_merge, group_places, lay_out, merge_plan, merge_rows
from vtc.ops.rank import order_by
from vtc.ops.select import apportion_host, front_pack, group_sizes, take_rows

Sizes = list[list[int]]
"""Tokens of every group of every item, on the host."""


def merge_items(
    view: StageView,
    keep: Sequence[int],
    metric: Tensor,
    *,
    scope: Scope = "crop",
    grouped: tuple[Tensor, Sizes] | None = None,
    plan: Callable[[int, int], Sequence[int]] = merge_plan,
    weighted: bool = False,
    raster: bool = False,
    step: Step | None = None,
) -> Selection:
    """Merge the tokens of each item down to `keep`, inside crops, tiles or frames or over the whole item.

    metric: [I, N, C] what similarity is measured on. grouped: other groups than those of `scope`, as `groups` gives
    them, the tokens of each standing together. plan: (tokens of a group, its share of `keep`) -> tokens to merge away
    at each step. weighted: means count what a token already stands for. raster: means stay where their anchor is;
    otherwise they follow one another in the order of the algorithm. step: the rule of one step, as `bipartite_merge`
    takes it. Items with fewer tokens to keep than groups are merged over all of them.
    """
    items = view.items
    crop, sizes = groups(view, scope) if grouped is None else grouped
    crop_free = all(len(row) == 1 for row in sizes)
    joined = [len(row) > 1 and count < sum(map(bool, row)) for row, count in zip(sizes, keep, strict=True)]
    if any(joined):
        crop = torch.where(put(joined, crop.device)[:, None], 0, crop)
        sizes = [[sum(row)] if one else row for row, one in zip(sizes, joined, strict=True)]
    shares = [share(count, row) for row, count in zip(sizes, keep, strict=True)]
    counts = [count for row in sizes for count in row if count]
    left = [each for part in shares for each in part if each]
    side_by_side = items.full and not any(joined) and len(set(counts)) == 1 and (crop_free or view.framed)
    if side_by_side:  # nothing has to move
        places = torch.arange(items.mask.numel(), device=crop.device).view(len(counts), -1)
        tokens = view.tokens.reshape(*places.shape, -1)
    else:
        places = group_places(crop, items.mask, sizes)
        tokens = view.tokens.flatten(0, 1)[places]
    merge = bipartite_merge(
        tokens if metric is view.tokens else metric.flatten(0, 1)[places],
        counts,
        [plan(count, each) for count, each in zip(counts, left, strict=True)],
        size=torch.ones_like(places, dtype=torch.float32) if weighted else None,
        step=step,
    )
    rows = merge_rows(tokens, merge.target, merge.weight, merge.anchor.shape[1])
    kept, replaced, into = lay_out(merge, rows, places, (items.mask.shape[0], items.mask.shape[1]), raster=raster)
    number = iter(merge.counts)
    totals = [sum(next(number) for count in row if count) for row in sizes]
    return Selection(kept, counts=totals, tokens=replaced, merged_into=into)


def inside_plan(
    what: str,
    model: ModelSpec,
    reading: VisionReading | None = None,
    layers: Sequence[int] | None = None,
    *,
    attention: bool = False,
    sizes: bool = False,
    restores: bool = False,
) -> Plan:
    """The plan of a method that acts inside the encoder, before `layers`: by default behind every block.

    what: names the method, or the option that asks for this. reading: of the block in front of each stage. layers: the
    one behind the feature layer is the encoder's end. attention: the reading is what all patches pay one another.
    sizes: keys are to count by their size (`proportional`). restores: as in `Plan`. Raises UnsupportedMethod where the
    encoder cannot run on fewer patches, where a block read has windows, and where keys cannot be weighted.
    """
    if not model.encoder_stages:
        raise UnsupportedMethod(
            f"{what} works on the patches inside the vision encoder, which this {model.family} model does not allow; "
            "choose what acts before or inside the LLM"
        )
    layers = range(1, model.feature_layer + 2) if layers is None else layers
    narrow = [layer - 1 for layer in layers if layer - 1 not in model.full_attention_layers]
    if attention and narrow:
        raise UnsupportedMethod(
            f"{what} reads attention inside the vision encoder, which this {model.family} model limits to windows in "
            f"blocks {narrow}; where the method lets you choose layers, take those behind blocks of whole pictures "
            f"({[layer + 1 for layer in model.full_attention_layers]}), or choose what acts before or inside the LLM"
        )
    if sizes and model.packed:
        raise UnsupportedMethod(
            f"{what} works on the patches inside the vision encoder, which this {model.family} model packs into one "
            "sequence without a mask: merged ones cannot count by their size there; pass proportional=False"
        )
    needs = Needs() if reading is None else Needs({layer - 1: reading for layer in layers})
    return Plan(tuple(map(EncoderStage, layers)), needs, "preserve" if model.mrope else "compact", restores=restores)


def merging_plan(model: ModelSpec, reading: VisionReading | None, *, inside: bool, sizes: bool) -> Plan:
    """The plan of a method that merges before the LLM, by `reading` of the key layer, or inside the encoder.

    inside: behind every block, as an option of that name asks for. sizes: as in `inside_plan`.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> merging_plan(llava, None, inside=False, sizes=True).stages
    (0,)
    """
    if inside:
        return inside_plan("inside=True", model, reading, sizes=sizes)
    needs = Needs() if reading is None else Needs({model.key_layer: reading})
    return Plan((PRE_LLM,), needs, "preserve" if model.mrope else "compact")


def even(view: StageView) -> int:
    """How many patches every crop has at an encoder stage.

    Raises UnsupportedCall where an earlier stage left different numbers of them.
    """
    counts = view.items.counts
    if len(set(counts)) > 1:
        raise UnsupportedCall(
            f"merging inside the encoder takes pictures of equally many patches, and an earlier stage left "
            f"{min(counts)} to {max(counts)} of them; pass pictures one by one, or leave that stage out"
        )
    return counts[0]


def merged_inside(view: StageView, rows: Tensor, origin: Tensor, size: Tensor | None) -> Selection:
    """The outcome of a merge at an encoder stage, all crops having equally many patches.

    rows: [I, n, D] what is left, in any order that the next stage is to see. origin: [I, n] the patch of the input that
    each of them stands for. size: [I, n] what its key counts for in later layers, None for one.
    """
    items, left = view.items, rows.shape[1]
    stays = torch.zeros(len(items), items.layouts[0].n_tokens, dtype=torch.bool, device=rows.device)
    kept = stays.scatter(1, origin, True).gather(1, items.token)
    seats = front_pack(kept, left)
    tokens = view.tokens.scatter(1, seats[..., None].expand_as(rows), rows)
    sizes = None if size is None else size.new_ones(kept.shape).scatter(1, seats, size)
    return Selection(kept, counts=[left] * len(items), tokens=tokens, sizes=sizes)


def groups(view: StageView, scope: Scope) -> tuple[Tensor, Sizes]:
    """[I, N] group of every token, and the groups' sizes: crops, tiles or frames, or one group per item.

    Synchronises once where an earlier stage dropped tokens, so that only the device knows how large crops are.
    """
    items = view.items
    several = [layout.n_crops > 1 for layout in items.layouts]
    if scope == "item" or not any(several):
        return torch.zeros_like(items.token), [[count] for count in items.counts]
    whole = all(sum(layout.crop_sizes) == count for layout, count in zip(items.layouts, items.counts, strict=True))
    if whole:
        return view.crop, [list(layout.crop_sizes) for layout in items.layouts]
    return view.crop, group_sizes(view.crop, view.most_crops, items.mask).tolist()


def clips(view: StageView, count: int) -> tuple[Tensor, Sizes]:
    """As `groups`: videos in at most `count` clips of equally many frames, the last one shorter; a picture is one.

    >>> from vtc.testing import Shape, make_view
    >>> clips(make_view([Shape(((5, 1, 2),), kind="video")], keep=4), 3)[1]
    [[4, 4, 2]]
    """
    crop, sizes = groups(view, "crop")
    long = [each.n_crops if each.kind == "image" else -(-each.n_crops // count) for each in view.items.layouts]
    cut = [[sum(row[at : at + n]) for at in range(0, len(row), n)] for row, n in zip(sizes, long, strict=True)]
    return crop // put(long, crop.device)[:, None], cut


def reordered(
    kept: Tensor, tokens: Tensor, into: Tensor, order: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """The kept rows of each item in another order, on the same places; with what the others were merged into.

    kept: [I, N] bool. tokens: [I, N, D], read where `kept` is set. into: [I, N] places, -1 for none. order: [I, N]
    places, the kept ones first. most: no item keeps more. Returns tokens and `into` as `Selection` takes them.

    >>> order = torch.tensor([[2, 0, 1]])
    >>> kept, rows = torch.tensor([[True, False, True]]), torch.tensor([[[5.0], [6.0], [7.0]]])
    >>> tokens, into = reordered(kept, rows, torch.tensor([[0, 2, 2]]), order)
    >>> tokens[0, [0, 2], 0].tolist(), into.tolist()
    ([7.0, 5.0], [[2, 0, 0]])
    """
    return seated(kept, take_rows(tokens, order[:, :most]), into, order)


def seated(kept: Tensor, rows: Tensor, into: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """As `reordered`, of rows [I, K, D] that stand in the new order already, no item keeping more than K."""
    seats = order_by(~kept)
    moved = torch.empty_like(order).scatter_(1, order, seats)
    item = torch.arange(len(order), device=order.device)[:, None]
    placed = rows.new_empty(*order.shape, rows.shape[2])  # rows of tokens that go are not read
    placed.index_put_((item, seats[:, : rows.shape[1]]), rows)
    return placed, torch.where(into >= 0, moved.gather(1, into.clamp(min=0)), -1)


def share(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split `keep` tokens over groups in proportion to their sizes, at least one for every group that has any.

    >>> share(10, [4, 30, 0, 6]), share(98, [196, 196])
    ([2, 6, 0, 2], [49, 49])
    """
    filled = [min(1, size) for size in sizes]
    more = [size - one for size, one in zip(sizes, filled, strict=True)]
    rest = apportion_host(max(0, keep - sum(filled)), more)
    return [one + extra for one, extra in zip(filled, rest, strict=True)]
