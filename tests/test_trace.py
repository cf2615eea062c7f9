"""What a run leaves behind: kept and merged tokens of every call, numbers of every call."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc.batch.trace import LAST_CALLS, CallStats, StageStats, Stats
from vtc.errors import VTCError
from vtc.method.base import CacheStage, Compressor, ModelSpec, Needs, Plan, Selection, Stage, StageView
from vtc.testing import TINY_MODELS, FixedKeep, LastRowTopK, tiny_inputs, tiny_model
from vtc.testing.contract import generate
from vtc.testing.probes import FixedHeads

NAME = "llava-clip"
LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]  # 44, 30 and 9 tokens


@dataclass(frozen=True)
class Listed(Compressor):
    """Keeps tokens by their number: even ones before the LLM, those below 8 later, those below 4 in the cache."""

    at: tuple[Stage, ...] = (0, 2)

    name: ClassVar[str] = "listed"
    needs_budget: ClassVar[bool] = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, Needs(), "preserve")

    def select(self, view: StageView) -> Selection:
        token = view.items.token
        return Selection({0: token % 2 == 0, 2: token < 8}.get(view.stage, token < 4))  # type: ignore[arg-type]


def call(model: Any, method: Any, layout: Any = LAYOUT, call_options: Any = None, **options: Any) -> vtc.Handle:
    with vtc.compress(model, method, **options) as handle, torch.no_grad():
        model(**tiny_inputs(NAME, layout, extra=1), **({"use_cache": True} | (call_options or {})))
    return handle


def placeholders(layout: Any = LAYOUT) -> tuple[Tensor, Tensor]:
    inputs = tiny_inputs(NAME, layout, extra=1)
    return inputs["input_ids"] == 120, inputs["attention_mask"].bool()


# --- kept tokens
def test_kept_tokens_over_the_input(clip: Any) -> None:
    handle = call(clip, Listed((0, 2, vtc.AFTER_PREFILL)))
    (record,) = handle.trace
    visual, valid = placeholders()
    number = torch.where(visual, (visual.cumsum(1) - 1) % 16, -1)
    assert list(record.keep) == [0, 2, vtc.AFTER_PREFILL]
    expected = valid & (~visual | (number % 2 == 0))
    assert torch.equal(record.keep[0], expected)
    expected = expected & (~visual | (number < 8))
    assert torch.equal(record.keep[2], expected)
    assert torch.equal(record.keep[vtc.AFTER_PREFILL], expected & (~visual | (number < 4)))


def test_kept_tokens_of_every_item(clip: Any) -> None:
    (record,) = call(clip, Listed((0, 2, vtc.AFTER_PREFILL))).trace
    visual, _ = placeholders()
    assert [item.row for item in record.items] == [0, 0, 1]
    places = [visual[0].nonzero()[:16, 0], visual[0].nonzero()[16:, 0], visual[1].nonzero()[:, 0]]
    for item, expected in zip(record.items, places, strict=True):
        assert (item.kind, item.grid) == ("image", (1, 4, 4))
        assert torch.equal(item.positions, expected)
        assert item.kept[0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
        assert item.kept[2].tolist() == [0, 2, 4, 6]
        assert item.kept[vtc.AFTER_PREFILL].tolist() == [0, 2]
        assert item.merged_into == {}


def test_maps_show_the_raster(clip: Any) -> None:
    (record,) = call(clip, Listed()).trace
    item = record.items[0]
    assert item.map().int().tolist() == [[[1, 0, 1, 0]] * 4]
    assert item.map(2).int().tolist() == [[[1, 0, 1, 0], [1, 0, 1, 0], [0] * 4, [0] * 4]]
    assert [part.tolist() for part in item.maps(2)] == [item.map(2).tolist()]


def test_maps_of_tiled_images_show_every_raster() -> None:
    """The overview and the stitched map of a tiled image, without the newline behind each of its rows."""
    model = tiny_model("llava-next")
    inputs = tiny_inputs("llava-next", [[4, "image", 5], [2, "image", 12]], seed=3, model=model)
    with vtc.compress(model, Listed()) as handle, torch.no_grad():
        model(**inputs)
    for item in handle.trace[0].items:
        layout, (overview, tiles) = item.layout, item.maps()
        assert (overview.shape, tiles.shape[0]) == ((1, *layout.crop_grid), 1)
        number = torch.arange(layout.n_tokens)
        kept = torch.isin(number, item.kept[0])
        assert bool(kept[layout.newline].all())
        assert torch.equal(overview.flatten(), kept[: overview.numel()])
        rows = kept[overview.numel() :].reshape(tiles.shape[1], -1)
        assert torch.equal(tiles[0], rows[:, :-1])
        inside = ~layout.newline & (layout.crop > 0) & kept
        assert int(inside.sum()) == int(tiles.sum())
        with pytest.raises(VTCError, match=r"form 2 full rasters and \d+ newlines, not one raster; write `maps\(\)`"):
            item.map()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_kept_token_of_every_family_is_on_a_map(name: str) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        with vtc.compress(model, "random", retention=0.4) as handle, torch.no_grad():
            model(**inputs)
        for item in handle.trace[0].items:
            kept = sum(int(part.sum()) for part in item.maps())
            assert kept == len(item.kept[0]) - item.layout.newlines
            assert item.kind == item.layout.kind == kind or item.layout.n_crops == 1
            if item.grid is not None:
                assert torch.equal(item.map(), item.maps()[0])


def test_tokens_in_no_raster_are_said_so(clip: Any) -> None:
    """With the strategy "full" the class token is one of the image's tokens."""
    clip.config.vision_feature_select_strategy = "full"
    inputs = tiny_inputs(NAME, [[4, "image", 5]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :5], inputs["input_ids"][:, 4:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with vtc.compress(clip, Listed()) as handle, torch.no_grad():
        clip(**inputs)
    (item,) = handle.trace[0].items
    assert len(item.positions) == 17
    for ask in (item.map, item.maps):
        with pytest.raises(VTCError, match="use `kept` and `layout`"):
            ask()


def test_beams_repeat_the_rows(clip: Any) -> None:
    layout = [[4, "image", 5], [2, "image", 12], [9]]
    handle = vtc.compress(clip, Listed())
    generate(clip, tiny_inputs(NAME, layout, extra=1), handle, 2, num_beams=2)
    (record,) = handle.trace
    single = call(clip, Listed(), layout).trace[0]
    assert [item.row for item in record.items] == [0, 1, 2, 3]
    assert torch.equal(record.keep[0], single.keep[0].repeat_interleave(2, 0))


def test_positions_count_inside_the_call(clip: Any, run_chunks: Any) -> None:
    chunks = [tiny_inputs(NAME, [[3, "image", 5]]), tiny_inputs(NAME, [[1, "image", 2]], seed=1)]
    handle = vtc.compress(clip, Listed())
    run_chunks(clip, chunks, handle)
    assert [record.items[0].positions[0].item() for record in handle.trace] == [3, 1]
    assert [record.keep[0].shape[1] for record in handle.trace] == [24, 19]


# --- merged tokens
def test_merged_tokens_know_who_absorbed_them(clip: Any) -> None:
    (record,) = call(clip, "pool", retention=0.25).trace
    for item in record.items:
        assert item.kept[0].tolist() == [5, 7, 13, 15]
        assert item.merged_into[0].reshape(4, 4).tolist() == [[5, 5, 7, 7]] * 2 + [[13, 13, 15, 15]] * 2


@dataclass(frozen=True)
class Merges(Compressor):
    """Token 0 absorbs token 1, token 3 stays with a new row, the rest goes; before or inside the LLM."""

    at: int = 0
    named: str = "all"

    name: ClassVar[str] = "merges"
    needs_budget: ClassVar[bool] = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.at,), Needs(), "preserve")

    def select(self, view: StageView) -> Selection:
        token = view.items.token
        keep = (token == 0) | (token == 3)
        into = torch.where(token == 1, 0, torch.where(keep, token, -1) if self.named == "all" else -1)
        return Selection(keep, tokens=view.tokens / 2, merged_into=into if self.named != "none" else None)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("named", ["all", "absorbed", "none"])
def test_merging_before_and_inside_the_llm(clip: Any, at: int, named: str) -> None:
    """A kept token is its own whether the method says so or not."""
    (record,) = call(clip, Merges(at, named)).trace
    for item in record.items:
        assert item.kept[at].tolist() == [0, 3]
        assert item.merged_into[at].tolist() == [0, -1 if named == "none" else 0, -1, 3] + [-1] * 12


# --- off
def test_without_tracing_only_numbers_are_kept(clip: Any) -> None:
    traced, bare = call(clip, Listed()), call(clip, Listed(), trace=False)
    assert bare.trace == []
    assert len(traced.trace) == 1

    def numbers(stats: CallStats) -> dict[str, Any]:
        return {k: v for k, v in vars(stats).items() if k != "seconds"}

    assert [numbers(c) for c in bare.stats.calls] == [numbers(c) for c in traced.stats.calls]


# --- numbers
def test_numbers_of_one_call(clip: Any) -> None:
    (stats,) = call(clip, Listed((0, 2))).stats.calls
    assert stats.batch == 3
    assert stats.visual_tokens_in == (32, 16, 0)
    assert stats.visual_tokens_kept == ((16 * 2 + 8 * 2) / 4, (8 * 2 + 4 * 2) / 4, 0.0)
    assert stats.stages == (StageStats(0, 45, 28, 48, 24), StageStats(2, 28, 20, 24, 12))
    assert stats.layer_rows == (28, 28, 20, 20)
    assert stats.kv_rows == (28, 28, 20, 20)
    assert stats.seconds > 0


def test_the_mean_over_the_layers_is_what_the_budget_asked_for(clip: Any) -> None:
    handle = call(clip, LastRowTopK(layer=1), retention=0.5)
    (stats,) = handle.stats.calls
    later = (4 * 8 - 16) / 3
    assert stats.visual_tokens_kept[1] == (16 + 3 * round(later)) / 4
    assert stats.layer_rows == (45, *[44 - 2 * (16 - round(later))] * 3)
    assert handle.stats.retention == pytest.approx(0.5, abs=0.03)


def test_rows_of_the_cache_after_eviction(clip: Any) -> None:
    (stats,) = call(clip, Listed((0, CacheStage(2)))).stats.calls
    assert stats.layer_rows == (28, 28, 28, 28)
    assert stats.kv_rows == (28, 28, 16, 16)  # 4 of 32 tokens stay in the longest row's later layers
    assert stats.visual_tokens_kept == (16.0, 8.0, 0.0)
    assert stats.visual_entries_kept == (10.0, 5.0, 0.0)


def test_every_stage_after_the_prefill_has_its_own_layers(clip: Any) -> None:
    handle = call(clip, FixedKeep(at=(CacheStage(3), CacheStage(1)), rate=0.25))
    (stats,), (record,) = handle.stats.calls, handle.trace
    assert stats.left == ((1, (32, 16, 0)), (2, (8, 4, 0)), (1, (8, 4, 0)))
    assert stats.kv_rows == (45, 20, 20, 20)  # a column of padding is left where nothing is evicted
    assert list(record.keep) == [CacheStage(1), CacheStage(3)]
    assert not torch.equal(record.keep[CacheStage(1)], record.keep[CacheStage(3)])
    assert handle.stats.retention == 1.0
    assert handle.stats.cache_retention == (1 + 3 * 0.25) / 4


def test_sets_of_heads_and_what_some_head_keeps(clip: Any) -> None:
    stage = CacheStage(1)
    handle = call(clip, FixedHeads(at=(stage,), rate=0.25))
    (stats,), (record,) = handle.stats.calls, handle.trace
    assert stats.left == ((1, (32, 16, 0)), (3, (8, 4, 0)))
    assert record.heads[stage].shape == (3, 2, 45)
    assert torch.equal(record.heads[stage].any(1), record.keep[stage])
    for item in record.items:
        sets = item.heads[stage]
        assert sets.sum(1).tolist() == [4, 4]
        assert torch.equal(record.heads[stage][item.row][:, item.positions], sets)
        assert item.kept[stage].tolist() == sets.any(0).nonzero().flatten().tolist()
        assert 4 < len(item.kept[stage]) <= 8


def test_without_a_cache_there_are_no_rows_of_it(clip: Any) -> None:
    (stats,) = call(clip, Listed(), call_options={"use_cache": False}).stats.calls
    assert stats.kv_rows == ()
    assert stats.layer_rows == (28, 28, 20, 20)


def test_sums_over_calls(clip: Any) -> None:
    with vtc.compress(clip, "random", retention=0.25) as handle:
        assert (handle.stats.visual_tokens_in, handle.stats.visual_tokens_kept, handle.stats.retention) == (0, 0, 1.0)
        generate(clip, tiny_inputs(NAME, LAYOUT), nullcontext(), 5)
        generate(clip, tiny_inputs(NAME, [[9]]), nullcontext(), 3)
        generate(clip, tiny_inputs(NAME, [[2, "image", 3]]), nullcontext(), 2)
    stats = handle.stats
    assert len(stats.calls) == 2
    assert stats.other_calls == 4 + 3 + 1  # decode steps, and the text-only prompt
    assert (stats.visual_tokens_in, stats.visual_tokens_kept) == (64, 16.0)
    assert stats.retention == 0.25
    assert stats.seconds >= sum(c.seconds for c in stats.calls) > 0
    assert Stats().retention == 1.0


def test_a_model_that_stays_attached_collects_no_more(clip: Any) -> None:
    (one,) = call(clip, Listed()).stats.calls
    stats = Stats()
    for batch in range(1, LAST_CALLS + 101):
        stats.add(replace(one, batch=batch))
    assert [one.batch for one in stats.calls] == list(range(101, LAST_CALLS + 101))
    assert (stats.count, stats.visual_tokens_in) == (LAST_CALLS + 100, 48 * (LAST_CALLS + 100))
    assert stats.retention == call(clip, Listed()).stats.retention


def test_a_budget_of_everything_is_noted(clip: Any) -> None:
    handle = call(clip, "vtc_cls", retention=1.0)
    (stats,), (record,) = handle.stats.calls, handle.trace
    _, valid = placeholders()
    assert stats.visual_tokens_kept == (32.0, 16.0, 0.0)
    assert stats.stages == ()
    assert stats.layer_rows == stats.kv_rows == (45, 45, 45, 45)
    assert handle.stats.retention == 1.0
    assert torch.equal(record.keep[0], valid)
    assert all(item.map().all() for item in record.items)


def test_unequal_keeps_count_the_longest_row(clip: Any) -> None:
    handle = call(clip, FixedKeep(at=(0,), static=False, rate=0.3))
    (stats,), (record,) = handle.stats.calls, handle.trace
    kept = [sum(len(item.kept[0]) for item in record.items if item.row == row) for row in range(3)]
    assert list(stats.visual_tokens_kept) == kept
    rows = max(12 + kept[0], 14 + kept[1], 9)
    assert stats.layer_rows == (rows,) * 4
    assert stats.stages[0].visual_tokens_out == sum(kept)
