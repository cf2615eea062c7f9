"""Attention within windows: the mask against a plain loop, and models that are given the same mask by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtc
from vtc.errors import BudgetError, UnsupportedCall, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, against_oracle

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
Cell = tuple[int, int, int]


def cells(layout: Any) -> list[Cell | None]:
    """Frame, row and column of every token of an item, None for newlines."""
    raster: list[Cell] = []
    frames = 0
    for count, rows, columns in layout.regions:
        raster += [(frames + f, r, c) for f in range(count) for r in range(rows) for c in range(columns)]
        frames += count
    found = iter(raster)
    return [None if newline else next(found) for newline in layout.newline.tolist()]


def sees(one: Cell | None, other: Cell | None, window: int) -> bool:
    """Whether a token at `one` may attend to another token at `other` of the same item."""
    if one is None or other is None or one[0] != other[0]:
        return False
    return max(abs(one[1] - other[1]), abs(one[2] - other[2])) <= (window - 1) // 2


@pytest.mark.parametrize("window", [1, 3, 5, 99])
def test_the_window_is_that_of_a_plain_loop(make_view: Any, shape: Any, video: Any, window: int) -> None:
    tiled = shape(((1, 4, 4), (1, 5, 7)), newlines=True, tiling=(1, 2))
    view = make_view([tiled, (3, 5), video(3, 2, 4)])
    selection = vtc.create("visual_window", window=window).select(view)
    assert selection.keep is view.items.mask
    for item, layout in enumerate(view.items.layouts):
        numbers = view.items.token[item, : view.items.counts[item]].tolist()
        places = [cells(layout)[number] for number in numbers]
        near = selection.near[item, : len(numbers)]
        close = ((near[:, None] - near[None]).abs() <= 1).all(-1).tolist()
        expected = [[i == j or sees(a, b, window) for j, b in enumerate(places)] for i, a in enumerate(places)]
        assert close == expected


def by_hand(model: Any, inputs: dict[str, Tensor], handle: Any, window: int, first: int) -> Tensor:
    """Logits of a model whose layers from `first` on get their mask as one tensor, filled cell by cell."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    rows, length = ids.shape
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        place: dict[int, tuple[int, Cell | None]] = {}
        for number, item in enumerate(handle.trace[0].items):
            if item.row == row:
                columns = zip(item.positions.tolist(), cells(item.layout), strict=True)
                place |= {at: (number, cell) for at, cell in columns}
        for query in range(length):
            for key in range(query + 1):
                blocked = query != key and query in place and key in place
                if blocked and place[query][0] == place[key][0]:
                    blocked = not sees(place[query][1], place[key][1], window)
                mask[row, 0, query, key] = valid[row, key] and not blocked

    def give(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    layers = vtc.adapters.of(model).layers[first:]
    hooks = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
    logits: Tensor = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize(("name", "kind"), [("llava-clip", "image"), ("llava-next", "image"), ("qwen2.5-vl", "video")])
@pytest.mark.parametrize(("window", "layer"), [(1, 0), (3, 16)])
@torch.no_grad()
def test_logits_are_those_of_a_mask_filled_by_hand(name: str, kind: Any, window: int, layer: int) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=3, model=model)
    with vtc.compress(model, "visual_window", window=window, layer=layer) as handle:
        found = model(**inputs).logits
    first = layer * len(vtc.adapters.of(model).layers) // 32
    expected, plain = by_hand(model, inputs, handle, window, first), model(**inputs).logits
    assert float((found - expected)[:, -1].abs().max()) < LIMIT < float((found - plain)[:, -1].abs().max())
    assert handle.stats.retention == handle.stats.cache_retention == 1.0


@pytest.mark.parametrize("name", ["llava-clip", "llava-next"])
@torch.no_grad()
def test_tokens_that_are_left_keep_their_windows(name: str) -> None:
    """Behind a method that drops, and in front of one."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]], seed=3, extra=1, model=model)
    for chain in (["random", vtc.create("visual_window", layer=16, window=3)], ["visual_window", "fastv"]):
        worst = against_oracle(model, inputs, lambda m, c=chain: vtc.compress(m, c, retention=0.7), 3)  # type: ignore[misc]
        assert worst < LIMIT


@torch.no_grad()
def test_a_picture_in_a_later_turn_sees_the_cache_and_nothing_of_itself() -> None:
    model = tiny_model("llava-clip")
    turns = [tiny_inputs("llava-clip", [[4, "image", 5]], seed=seed, model=model) for seed in (3, 4)]
    length = turns[0]["input_ids"].shape[1]
    own = torch.ones(length, length, dtype=torch.bool).tril()
    own[4:20, 4:20] = torch.eye(16, dtype=torch.bool)

    def give(module: Any, args: Any, kwargs: Any) -> Any:
        before = torch.ones(length, kwargs["past_key_values"].get_seq_length(), dtype=torch.bool)
        return args, {**kwargs, "attention_mask": torch.cat([before, own], dim=1)[None, None]}

    def both() -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**turns[0], past_key_values=cache)
        mask = torch.ones(1, 2 * length, dtype=torch.long)
        logits: Tensor = model(**{**turns[1], "attention_mask": mask}, past_key_values=cache).logits
        return logits

    with vtc.compress(model, "visual_window"):
        found = both()
    whole = model.model.language_model
    hook = whole.register_forward_pre_hook(give, with_kwargs=True)
    expected = both()
    hook.remove()
    assert float((found - expected).abs().max()) < LIMIT < float((found - both()).abs().max())


def test_plans_and_refusals(make_view: Any, shape: Any) -> None:
    for depth, layer, stage in ((32, 0, 0), (32, 2, 2), (28, 16, 14), (4, 16, 2)):
        method = vtc.create("visual_window", layer=layer)
        assert method.plan(dataclasses.replace(LLAMA, llm_layers=depth)) == vtc.Plan((stage,), vtc.Needs(), "preserve")
    for wrong in (0, 2, -1):
        with pytest.raises(VTCError, match=f"window={wrong} has no middle; pass an odd number: 1 for no"):
            vtc.create("visual_window", window=wrong)
    with pytest.raises(VTCError, match="layer=32 is none of layers 0 to 31 of 32; the papers begin at 0"):
        vtc.create("visual_window", layer=32)
    with pytest.raises(UnsupportedMethod, match="lies behind the last of the 1 LLM layers of this llava model; pass"):
        vtc.create("visual_window", layer=31).plan(dataclasses.replace(LLAMA, llm_layers=1))
    with pytest.raises(BudgetError, match="'visual_window' takes no retention or keep"):
        vtc.compress(tiny_model("llava-clip"), "visual_window", retention=0.5)
    view = make_view([(3, 5)])
    (layout,) = view.items.layouts
    loose = dataclasses.replace(layout, grid=None, regions=())
    view = dataclasses.replace(view, items=dataclasses.replace(view.items, layouts=(loose,)))
    assert vtc.create("visual_window").select(view).near is not None
    with pytest.raises(UnsupportedCall, match=r"some tokens of this image lie in no raster, .*; pass window=1"):
        vtc.create("visual_window", window=3).select(view)
