"""The compressed cache: logical and physical lengths, eviction, and everything generate() does to a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtc
from vtc.engine.cache import CompressedCache
from vtc.engine.eviction import Kept, evict
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import CacheStage
from vtc.testing import FixedKeep, Oracle, tiny_inputs
from vtc.testing.probes import FixedHeads

NAME = "llava-clip"
PAIR = [[3, "image", 5], [2, "image", 9]]
INNER = FixedKeep(at=(0, 2), static=False)


def filled(rows: list[int], starts: tuple[int, ...], batch: int = 2, seed: int = 0) -> CompressedCache:
    """A cache with one layer per entry of `rows`, as many random rows each."""
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    for layer, length in enumerate(rows):
        keys, values = torch.randn(2, batch, 3, length, 4, generator=generator)
        cache.update(keys, values, layer)
    return CompressedCache.adopt(cache, starts, None)


def step(model: Any, cache: Any, batch: int = 2) -> Tensor:
    ids = torch.arange(7, 7 + batch)[:, None]
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


def prefilled(model: Any, layout: Any = PAIR, **options: Any) -> CompressedCache:
    with vtc.compress(model, INNER, **options), torch.no_grad():
        cache = model(**tiny_inputs(NAME, layout), use_cache=True).past_key_values
    assert isinstance(cache, CompressedCache)
    return cache


# --- adoption
def test_a_cache_is_adopted_in_place() -> None:
    plain = DynamicCache()
    plain.update(torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 4), 0)
    layers, mask = plain.layers, torch.tensor([[False] * 2 + [True] * 3, [True] * 5])
    adopted = CompressedCache.adopt(plain, (0, 2), mask)
    assert adopted is plain
    assert plain.layers is layers
    assert (plain.seen, plain.starts, plain.open) == (5, (0, 2), False)
    assert torch.equal(plain.masks[0], mask)
    assert CompressedCache.adopt(plain, [0, 2], None) is plain
    with pytest.raises(UnsupportedCall, match=r"at layers \(0, 2\), the attached method acts at \(0, 1\)"):
        CompressedCache.adopt(plain, (0, 1), None)


def test_the_callers_cache_is_filled(clip: Any) -> None:
    own = DynamicCache(config=clip.config.get_text_config())
    with vtc.compress(clip, FixedKeep(at=(0, 2))), torch.no_grad():
        output = clip(**tiny_inputs(NAME, PAIR), past_key_values=own)
    assert output.past_key_values is own
    assert own.get_seq_length() == own.get_seq_length(3) == 27
    assert [own.physical_length(layer) for layer in range(4)] == [19, 19, 15, 15]
    assert own.physical_length(9) == 0
    assert [own.get_query_offset(layer) for layer in range(4)] == [19, 19, 15, 15]
    assert [own.get_mask_sizes(1, layer)[0] for layer in range(4)] == [20, 20, 16, 16]


def test_without_padding_no_mask_is_kept(clip: Any) -> None:
    """An explicit mask of ones means no mask, so that attention kernels without one can be used."""
    even = [[3, "image", 5], [2, "image", 6]]
    with vtc.compress(clip, FixedKeep(at=(2,))), torch.no_grad():
        for layout in (even, even[:1]):
            cache = clip(**tiny_inputs(NAME, layout), use_cache=True).past_key_values
            assert cache.masks == {0: None, 2: None}
        cache = clip(**tiny_inputs(NAME, PAIR, extra=1), use_cache=True).past_key_values
        assert cache.masks[0].tolist() == [[False] * 4 + [True] * 24, [False] + [True] * 27]


def test_text_only_calls_keep_a_plain_cache(clip: Any) -> None:
    with vtc.compress(clip, INNER), torch.no_grad():
        cache = clip(**tiny_inputs(NAME, [[5], [9]]), use_cache=True).past_key_values
    assert type(cache) is DynamicCache


@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_a_plain_cache_with_text_is_continued_with_an_image(
    clip: Any, limits: Any, run_chunks: Any, positions: Any
) -> None:
    """A cached system prompt, padded, then an image on top of it."""
    chunks = [tiny_inputs(NAME, [[6], [9]]), tiny_inputs(NAME, [[2, "image", 4], [3, "image", 3]], seed=1)]
    handle = vtc.compress(clip, INNER, positions=positions)
    logits = run_chunks(clip, chunks, handle)
    assert len(handle.trace) == 1
    tables = {k: torch.cat([torch.ones(2, 9).bool(), keep], dim=1) for k, keep in handle.trace[0].keep.items()}
    expected = run_chunks(clip, chunks, Oracle(clip, tables, positions=positions))
    assert float((logits - expected).abs().max()) <= limits.logits


# --- closed
def test_a_closed_cache_takes_nothing() -> None:
    cache = filled([5, 5], (0,))
    with pytest.raises(UnsupportedCall, match="attach the same method again to continue it"):
        cache.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), 0)
    cache.open = True
    cache.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), 0)
    assert cache.physical_length(0) == 6


# --- eviction
@pytest.mark.parametrize("rows", [[7, 7, 7, 7], [7, 7, 5, 4]])
@pytest.mark.parametrize("group", [0, 2, 3])
def test_eviction_drops_rows_of_one_group(rows: list[int], group: int) -> None:
    starts = (0, 2, 3)
    cache, before = filled(rows, starts), filled(rows, starts)
    keep = torch.rand(2, rows[group], generator=torch.Generator().manual_seed(1)) < 0.6
    keep[1] &= torch.arange(rows[group]) != 0
    evict(cache, {group: Kept(keep[:, None])})
    end = min([start for start in starts if start > group], default=4)
    counts = keep.sum(1).tolist()
    for layer in range(4):
        old, new = before.layers[layer], cache.layers[layer]
        if not group <= layer < end:
            assert torch.equal(new.keys, old.keys)
            continue
        assert new.keys.shape[2] == max(counts)
        for row in range(2):
            assert torch.equal(new.keys[row, :, max(counts) - counts[row] :], old.keys[row][:, keep[row]])
            assert torch.equal(new.values[row, :, max(counts) - counts[row] :], old.values[row][:, keep[row]])
    expected = torch.stack([torch.arange(max(counts)) >= max(counts) - count for count in counts])
    if expected.all():
        assert cache.masks[group] is None
    else:
        assert torch.equal(cache.masks[group], expected)


def test_eviction_respects_padding_and_even_counts() -> None:
    cache = filled([4, 4], (0,))
    cache.masks[0] = torch.tensor([[False, True, True, True], [True] * 4])
    evict(cache, {0: Kept(torch.tensor([[[True, True, False, True]], [[False, False, True, True]]]))})
    assert cache.masks[0] is None
    assert cache.physical_length(0) == cache.physical_length(1) == 2


def test_eviction_head_by_head() -> None:
    """Every head of two layers keeps rows of its own, behind the padding of the shorter batch row."""
    cache, before = filled([6, 6, 6], (0, 1)), filled([6, 6, 6], (0, 1))
    cache.masks[1] = torch.arange(6) >= torch.tensor([[2], [0]])
    places = [[[2, 5], [3, 4], [4, 5]], [[0, 1, 2], [3, 4, 5], [0, 2, 4]]]
    keep = torch.zeros(2, 3, 6, dtype=torch.bool)
    for row, heads in enumerate(places):
        for head, kept in enumerate(heads):
            keep[row, head, kept] = True
    keep[0, 0, 0] = True  # padding, which never stays
    evict(cache, {1: Kept(keep)})
    assert cache.masks[1].tolist() == [[False, True, True], [True, True, True]]
    assert cache.physical_length(0) == 6
    for layer in (1, 2):
        for what in ("keys", "values"):
            old, new = getattr(before.layers[layer], what), getattr(cache.layers[layer], what)
            for row, heads in enumerate(places):
                for head, kept in enumerate(heads):
                    assert torch.equal(new[row, head, 3 - len(kept) :], old[row, head, kept])


@torch.no_grad()
def test_a_refused_eviction_leaves_the_cache_as_it_was(clip: Any) -> None:
    """What the caller's plain cache held before the call is there still, and it is plain."""
    text, inputs = tiny_inputs(NAME, [[6], [9]]), tiny_inputs(NAME, PAIR)
    own = clip(**text, use_cache=True).past_key_values
    keys = own.layers[3].keys
    mask = torch.cat([text["attention_mask"], inputs["attention_mask"]], 1)
    drawn = FixedHeads(at=(CacheStage(1),), static=False)
    with vtc.compress(clip, drawn), pytest.raises(UnsupportedMethod, match="more entries in some KV heads"):
        clip(**{**inputs, "attention_mask": mask}, past_key_values=own)
    assert type(own) is DynamicCache
    assert torch.equal(own.layers[3].keys, keys)


# --- masks
def test_extension_notes_the_validity_of_new_rows() -> None:
    cache = filled([3], (0,))
    assert cache.extend(0, None, 2, 2, torch.device("cpu")) is None
    chunk = torch.tensor([[False, True], [True, True]])
    expected = torch.cat([torch.ones(2, 3).bool(), chunk], dim=1)
    assert torch.equal(cache.extend(0, chunk, 2, 2, torch.device("cpu")), expected)
    longer = torch.cat([expected, torch.ones(2, 1).bool()], dim=1)
    assert torch.equal(cache.extend(0, None, 2, 1, torch.device("cpu")), longer)


# --- what generate() does
def mapped(cache: CompressedCache) -> dict[str, Any]:
    return {"masks": dict(cache.masks), "shifts": dict(cache.shifts)}


@pytest.mark.parametrize(
    ("change", "index"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_move_with_their_masks_and_shifts(clip: Any, limits: Any, change: Any, index: list[int]) -> None:
    cache = prefilled(clip, positions="compact")
    before = mapped(cache)
    assert any(mask is not None for mask in before["masks"].values())  # ragged, so that moving matters
    shifts = before["shifts"][2]
    assert shifts is not None
    assert int(shifts[0]) != int(shifts[1])
    keys = cache.layers[2].keys
    change(cache)
    assert torch.equal(cache.layers[2].keys, keys[index])
    for what, values in before.items():
        for group, value in values.items():
            found = getattr(cache, what)[group]
            assert (found is None) == (value is None)
            assert value is None or torch.equal(found, value[index])
    with vtc.compress(clip, INNER, positions="compact"), torch.no_grad():
        ids = torch.tensor([[7]] * len(index))
        moved = clip(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    for row, source in enumerate(index):
        alone = prefilled(clip, positions="compact")
        alone.batch_select_indices(torch.tensor([source]))
        with vtc.compress(clip, INNER, positions="compact"):
            expected = step(clip, alone, 1)
        assert float((moved[row] - expected[0]).abs().max()) <= limits.logits


def test_cropping_takes_tokens_back(clip: Any) -> None:
    cache = prefilled(clip)
    length, rows = cache.get_seq_length(), [cache.physical_length(layer) for layer in range(4)]
    with vtc.compress(clip, INNER):
        first = step(clip, copy.deepcopy(cache))
        step(clip, cache)
        step(clip, cache)
        cache.crop(0)
        assert cache.get_seq_length() == length + 2
        cache.crop(-2)
        assert cache.get_seq_length() == length
        assert [cache.physical_length(layer) for layer in range(4)] == rows
        assert [m.shape[1] for m in cache.masks.values() if m is not None] == [
            rows[group] for group, m in cache.masks.items() if m is not None
        ]
        assert torch.equal(step(clip, cache), first)
    with pytest.raises(UnsupportedCall, match=r"crop\(9\).*pass a negative count"):
        cache.crop(9)


def test_a_reset_cache_starts_afresh(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    fresh = prefilled(clip)
    reused = prefilled(clip, layout=[[9, "image", 4], [2, "image", 2]])
    reused.reset()
    assert reused.get_seq_length() == 0
    assert all(mask is None for mask in reused.masks.values())
    assert all(shift is None for shift in reused.shifts.values())
    with vtc.compress(clip, INNER), torch.no_grad():
        clip(**inputs, past_key_values=reused)
        assert torch.equal(step(clip, reused), step(clip, fresh))


def test_copies_are_independent(clip: Any) -> None:
    """One prefill, several continuations: deepcopy is how transformers documents it."""
    cache = prefilled(clip)
    other = copy.deepcopy(cache)
    assert type(other) is CompressedCache
    with vtc.compress(clip, INNER):
        first = step(clip, cache)
        assert other.get_seq_length() == cache.get_seq_length() - 1
        assert torch.equal(step(clip, other), first)


def test_two_conversations_share_one_engine(clip: Any, limits: Any) -> None:
    with vtc.compress(clip, INNER) as handle, torch.no_grad():
        caches = [clip(**tiny_inputs(NAME, PAIR, seed=seed), use_cache=True).past_key_values for seed in range(2)]
        mixed = [step(clip, cache) for cache in caches]
    assert len(handle.stats.calls) == 2
    for seed in range(2):
        with vtc.compress(clip, INNER), torch.no_grad():
            cache = clip(**tiny_inputs(NAME, PAIR, seed=seed), use_cache=True).past_key_values
            assert torch.equal(step(clip, cache), mixed[seed])
