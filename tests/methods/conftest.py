"""Fixtures of the methods' tests: made-up views, and what a method kept of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import vtc
from vtc.method.base import Selection, StageView
from vtc.testing import TINY_MODELS, Shape, tiny_inputs, tiny_model
from vtc.testing import make_view as build_view


@pytest.fixture
def shape() -> type[Shape]:
    """The class that describes items of several rasters."""
    return Shape


@pytest.fixture
def video() -> Callable[[int, int, int], Shape]:
    """A video of so many frames, rows and columns."""
    return lambda *raster: Shape((raster,), kind="video")


@pytest.fixture
def make_view() -> Callable[..., StageView]:
    """`vtc.testing.make_view`."""
    return build_view


@pytest.fixture
def kept() -> Callable[[StageView, Selection], list[list[int]]]:
    """Token numbers that a selection keeps of every item; checks the counts it gives."""

    def read(view: StageView, selection: Selection) -> list[list[int]]:
        numbers = [
            token[keep & mask].tolist()
            for token, keep, mask in zip(view.items.token, selection.keep, view.items.mask, strict=True)
        ]
        assert selection.counts is None or list(selection.counts) == [len(each) for each in numbers]
        assert all(each == sorted(set(each)) for each in numbers)
        return numbers

    return read


@pytest.fixture
def kept_heads(kept: Any) -> Callable[[StageView, Selection], list[list[list[int]]]]:
    """Entry numbers that a selection keeps of every item in every KV head."""

    def read(view: StageView, selection: Selection) -> list[list[list[int]]]:
        heads = [kept(view, dataclasses.replace(selection, keep=keep)) for keep in selection.keep.unbind(1)]
        return [list(sets) for sets in zip(*heads, strict=True)]

    return read


@pytest.fixture
def shares() -> Callable[[int, Sequence[int]], list[int]]:
    """Split a count over sizes in proportion, by largest remainder, ties to the first."""

    def split(total: int, sizes: Sequence[int]) -> list[int]:
        exact = [total * size / sum(sizes) for size in sizes]
        share = [int(value + 1e-9) for value in exact]
        order = sorted(range(len(sizes)), key=lambda g: (round(share[g] - exact[g], 9), g))
        for group in order[: total - sum(share)]:
            share[group] += 1
        return share

    return split


@pytest.fixture
def parted(shares: Any) -> Callable[[StageView, int, str], list[tuple[list[int], int]]]:
    """The places of an item's tokens, crop by crop or all together, and how many of each the budget keeps."""

    def read(view: StageView, item: int, scope: str) -> list[tuple[list[int], int]]:
        count = view.items.counts[item]
        crop = view.crop[item, :count].tolist()
        parts = [[p for p in range(count) if scope == "item" or crop[p] == c] for c in range(max(crop) + 1)]
        parts = parts[:1] if scope == "item" else parts
        return list(zip(parts, shares(view.keep[item], [len(part) for part in parts]), strict=True))

    return read


@pytest.fixture
def meets_budget() -> Callable[[str, str, float], None]:
    """Checks on one tiny model, pictures and clips, that a method before the LLM keeps what was asked for exactly."""

    @torch.no_grad()
    def check(name: str, method: str, retention: float) -> None:
        model = tiny_model(name)
        for kind in TINY_MODELS[name].kinds:
            inputs = tiny_inputs(name, [[4, kind, 6], [2, kind, 9, kind, 3]], model=model)
            with vtc.compress(model, method, retention=retention) as handle:
                model(**inputs)
            wanted = [0, 0]
            for item in handle.trace[0].items:
                wanted[item.row] += vtc.tokens_to_keep(len(item.positions), retention)
            assert list(handle.stats.calls[0].visual_tokens_kept) == wanted

    return check


@pytest.fixture
def nears_budget() -> Callable[..., None]:
    """Checks on one tiny model, pictures and clips, that a method inside the LLM keeps what was asked for in the mean.

    rounding: (layers, items) -> tokens that whole numbers behind the stages may cost in all, half a one for each item.
    """

    @torch.no_grad()
    def check(
        name: str,
        method: str,
        retentions: Sequence[float],
        rounding: Callable[[int, int], float] = lambda layers, items: 0.5 * items,
    ) -> None:
        model = tiny_model(name)
        layers = len(vtc.adapters.of(model).layers)
        for kind in TINY_MODELS[name].kinds:
            inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
            for retention in retentions:
                with vtc.compress(model, method, retention=retention) as handle:
                    model(**inputs)
                items = handle.trace[0].items
                wanted = sum(vtc.tokens_to_keep(len(item.positions), retention) for item in items)
                kept = sum(handle.stats.calls[0].visual_tokens_kept)
                assert abs(kept - wanted) <= rounding(layers, len(items))

    return check


@pytest.fixture
def keeps_entries() -> Callable[[str, str, float], None]:
    """Checks on one tiny model, pictures and clips, that the caches keep what was asked for in the mean over layers."""

    @torch.no_grad()
    def check(name: str, method: str, retention: float) -> None:
        model = tiny_model(name)
        for kind in TINY_MODELS[name].kinds:
            inputs = tiny_inputs(name, [[4, kind, 6], [2, kind, 9, kind, 3]], model=model)
            with vtc.compress(model, method, retention=retention) as handle:
                model(**inputs, use_cache=True)
            wanted = [0, 0]
            for item in handle.trace[0].items:
                wanted[item.row] += max(vtc.tokens_to_keep(len(item.positions), retention), item.layout.newlines + 1)
            (call,) = handle.stats.calls
            assert call.visual_entries_kept == pytest.approx(wanted)
            assert call.visual_tokens_kept == call.visual_tokens_in
            text = inputs["attention_mask"].sum(1) - torch.tensor(call.visual_tokens_in)
            left = [torch.tensor(totals) for layers, totals in call.left for _ in range(layers)]
            assert [int((text + totals).max()) for totals in left] == list(call.kv_rows)

    return check


@pytest.fixture
def llm_weights() -> Callable[[str, dict[str, torch.Tensor]], list[torch.Tensor]]:
    """[B, H, Q, K] attention of every LLM layer of a tiny model, as eager attention returns it."""

    @torch.no_grad()
    def read(name: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        model = tiny_model(name, attn_implementation="eager")
        seen: list[torch.Tensor] = []
        for module in vtc.adapters.of(model).llm_attention:
            module.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        model(**inputs)
        return seen

    return read
