"""H2O's rule on visual entries, one entry at a time, and against the model's own attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
import vtc.testing
from vtc.errors import VTCError
from vtc.method.base import CacheStage
from vtc.method.llm_readings import PromptSum
from vtc.method.rows import Rows
from vtc.testing import tiny_inputs, tiny_model

SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


def plain_choice(received: list[float], keep: int, recent: float) -> list[int]:
    """received: what each entry of an item draws from all rows."""
    late = list(range(len(received)))[len(received) - int(recent * keep) :]
    others = sorted((n for n in range(len(received)) if n not in late), key=lambda n: (-round(received[n], 6), n))
    return sorted(late + others[: keep - len(late)])


@pytest.mark.parametrize("keep", [1, 3, 17, 63, 1000])
@pytest.mark.parametrize("recent", [0.0, 0.1, 0.5, 1.0])
def test_the_plain_choice(make_view: Any, kept: Any, kept_heads: Any, keep: int, recent: float) -> None:
    view = make_view(SHAPES, stage=CacheStage(3), keep=keep)
    sums = torch.rand(2, *view.visual.shape, generator=torch.Generator().manual_seed(1)).mul(30).round()  # with ties
    view = dataclasses.replace(view, llm_rows={(3, PromptSum(per_head=True)): sums, (3, Rows.SUM): sums[0]})
    method, shared = vtc.create("h2o", recent=recent), vtc.create("h2o", recent=recent, per_head=False)
    for item, heads in enumerate(kept_heads(view, method.select(view))):
        row, count = view.items.rows[item], view.items.counts[item]
        received = sums[:, row, view.items.index[item, :count]].tolist()
        assert heads == [plain_choice(each, view.keep[item], recent) for each in received]
        assert kept(view, shared.select(view))[item] == heads[0]


@torch.no_grad()
@pytest.mark.parametrize("layout", [["image", 9], [4, "image", 3, "image", 40], [2, "image"]], ids=str)
def test_the_kept_sets_are_those_of_the_models_own_attention(llm_weights: Any, layout: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [layout], seed=2, model=model)
    with vtc.compress(model, "h2o", retention=0.4) as handle:
        model(**inputs)
    with vtc.compress(model, "h2o", per_head=False, retention=0.4) as shared:
        model(**inputs)
    differ = 0
    for layer, weights in enumerate(llm_weights("llava-clip", inputs)):
        of_heads = [weights[0, :2].mean(0).sum(0), weights[0, 2:].mean(0).sum(0)]  # two query heads share a KV head
        for item, other in zip(handle.trace[0].items, shared.trace[0].items, strict=True):
            chosen = [plain_choice(received[item.positions].tolist(), 6, 0.5) for received in of_heads]
            assert [sets.nonzero().flatten().tolist() for sets in item.heads[CacheStage(layer)]] == chosen
            differ += chosen[0] != chosen[1]
            both = torch.stack(of_heads).mean(0)[item.positions].tolist()
            assert other.kept[CacheStage(layer)].tolist() == plain_choice(both, 6, 0.5)
    assert differ


@torch.no_grad()
@pytest.mark.parametrize("scores", ["mean", "text_rows"])
@pytest.mark.parametrize("layout", [["image", 9], [4, "image", 3, "image", 40], [2, "image"]], ids=str)
def test_other_scores_are_those_of_the_models_own_attention(llm_weights: Any, layout: Any, scores: Any) -> None:
    """Entry by entry: the rows that see it are counted, or those of the text behind the first image summed alone."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [layout], seed=2, model=model)
    with vtc.compress(model, "h2o", scores=scores, retention=0.4) as handle:
        model(**inputs)
    visual = sorted(place for item in handle.trace[0].items for place in item.positions.tolist())
    for layer, weights in enumerate(llm_weights("llava-clip", inputs)):
        length = weights.shape[-1]
        text = [row for row in range(visual[0], length) if row not in visual] or list(range(length))
        for item in handle.trace[0].items:
            chosen = []
            for heads in (weights[0, :2].mean(0), weights[0, 2:].mean(0)):
                drawn = [float(heads[text if scores == "text_rows" else slice(None), j].sum()) for j in range(length)]
                if scores == "mean":
                    drawn = [each / (length - j) for j, each in enumerate(drawn)]
                chosen.append(plain_choice([drawn[j] for j in item.positions.tolist()], 6, 0.5))
            assert [sets.nonzero().flatten().tolist() for sets in item.heads[CacheStage(layer)]] == chosen


def test_padding_sees_nothing_and_asks_nothing() -> None:
    """A prompt of a padded batch is read as alone, with each of the scores, and so is a second turn."""
    for scores in ("mean", "text_rows"):
        vtc.testing.check_method(
            vtc.create("h2o", scores=scores), models=["llava-clip"], retention=0.4, generation=["greedy"], steps=2
        )


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_budget_is_that_of_the_caches(name: str, keeps_entries: Any) -> None:
    keeps_entries(name, "h2o", 0.4)


def test_a_share_beyond_the_budget_is_refused() -> None:
    for recent in (-0.1, 1.5):
        with pytest.raises(VTCError, match=r"is no share of the budget; pass 0 to 1, the paper uses 0.5"):
            vtc.create("h2o", recent=recent)
    with pytest.raises(VTCError, match="unknown scores 'median'"):
        vtc.create("h2o", scores="median")
