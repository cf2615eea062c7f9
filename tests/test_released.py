"""The released forms that ours are timed against choose what ours choose, and `top_k` follows the order of `settle`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtc.method.base import Selection
from vtc.methods import pitome, vispruner
from vtc.ops import greedy, merge, similarity
from vtc.ops.select import TIE, settle, top_k
from vtc.testing.released import fresh
from vtc.testing.released.cases import selection_cases
from vtc.testing.views import Shape

CASES = selection_cases()
CROWDED = ("longvlm", "pitome", "vispruner")
"""Of the hundreds of numbers that these put in order some are always nearly equal; the released forms look closer."""
SHAPES = {"image": Shape(((1, 12, 12),)), "tiles": Shape(((5, 12, 12),), tiling=(2, 2)), "video": Shape(((6, 12, 12),))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_the_released_forms_choose_the_same(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if name in CROWDED:
        for module in (pitome, vispruner, merge):
            monkeypatch.setattr(module, "settle", lambda scores, mask: scores.masked_fill(~mask, -torch.inf))
        monkeypatch.setattr(pitome, "ALIKE", 0.0)
        monkeypatch.setattr(merge, "TIE", 0.0)
    if not case.fits(SHAPES[shape]):
        pytest.skip("released for one crop, or for videos")
    options = {**case.options, **({"retain": 64} if "retain" in case.options else {})}
    case = type(case)(**{**vars(case), "options": options})
    keep = 12 if name.startswith("vqtoken") else None
    scene = case.scene(SHAPES[shape], 3, keep=keep, width=64)
    with torch.no_grad():
        ours = scene.method.select(fresh(scene.view))
        for form in (case.batched(scene), case.loop(scene)):
            if case.tolerance is None:
                total = int(form.sum()) if form.dtype == torch.bool else form.shape[0] * form.shape[1]
                assert total == int(ours.keep.sum())
            elif form.dtype == torch.bool:
                assert torch.equal(form, ours.keep)
            else:
                assert torch.allclose(left(ours), form, atol=case.tolerance * float(form.abs().max()))


def left(ours: Selection) -> Tensor:
    """The rows of every item that are left, or keys and values of every KV head side by side."""
    rows = (ours.tokens,) if ours.entries is None else ours.entries
    return torch.cat([each[ours.keep].view(*ours.keep.shape[:-1], -1, each.shape[-1]) for each in rows], -1)


@pytest.mark.parametrize("most", [None, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_top_k_is_the_beginning_of_the_settled_order(most: int | None, masked: bool) -> None:
    """Scores in clusters of near-equals, infinities and all-equal rows; every count."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(9, (60, 33), generator=generator).float() + 1
    scores = scores * (1 + TIE / 3 * torch.randint(-1, 2, scores.shape, generator=generator))
    scores[0], scores[1, ::3], scores[2, ::4] = 1.0, torch.inf, -torch.inf
    mask = torch.rand(scores.shape, generator=generator) < 0.8 if masked else None
    order = settle(scores, mask).argsort(dim=1, descending=True, stable=True)
    if mask is not None:
        order = order.gather(1, (~mask).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(33).expand_as(order))
    for count in range(34):
        keep = torch.full((60,), count)
        found = top_k(scores, keep, mask, most=most and count)
        assert torch.equal(found, (rank < count) & (True if mask is None else mask))


def test_top_k_keeps_its_count_where_scores_are_no_numbers() -> None:
    scores = torch.tensor([[torch.nan, 1.0, torch.nan, 2.0]])
    assert top_k(scores, torch.tensor([3])).tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("store", [0, 400, 900, 10**6])
def test_similarities_held_or_streamed_choose_the_same(store: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None held, those of one item or two at a time, and all of them."""
    generator = torch.Generator().manual_seed(0)
    features, mask = torch.randn(5, 20, 16, generator=generator), torch.rand(5, 20, generator=generator) < 0.9
    features[0, 3], features[1, 4] = torch.nan, 0.0
    start = mask.to(torch.uint8).argmax(1)
    expected = [greedy.k_center(features, greedy.most_isolated(features, mask), 6, mask)]
    expected.append(greedy.max_sum(features, start, 6, mask))
    monkeypatch.setattr(similarity, "STORE", store)
    assert torch.equal(greedy.k_center(features, None, 6, mask), expected[0])
    assert torch.equal(greedy.max_sum(features, start, 6, mask), expected[1])
