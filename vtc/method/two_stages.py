"""Methods that act before the LLM and once more inside it: where the second stage lies, and what each leaves."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable

from vtc.errors import UnsupportedMethod
from vtc.method.budget import CACHED, spend
from vtc.method.plan import PRE_LLM, ModelSpec, Positions
from vtc.method.view import StageView


def layer_like(model: ModelSpec, layer: int, depth: int) -> int:
    """The layer of this model's LLM that lies where `layer` does in an LLM of `depth` layers, rounded down, at least 1.

    Raises UnsupportedMethod where the LLM has one layer alone.

    >>> import vtc
    >>> layer_like(vtc.adapters.families()["llava"].references[0], 18, 28)  # of 32 layers
    20
    """
    if model.llm_layers < 2:
        raise UnsupportedMethod(f"the LLM of this {model.family} model has one layer; nothing can be dropped inside")
    return max(1, model.llm_layers * layer // depth)


def outer_positions(model: ModelSpec) -> Positions:
    """Where only the stage before the LLM leaves no gap in the positions, as removing tokens from its input does.

    >>> import vtc
    >>> outer_positions(vtc.adapters.families()["llava-onevision"].references[0])
    'compact_input'
    """
    return "preserve" if model.mrope else "compact_input"


def schedule(view: StageView, layer: int, later: float) -> list[tuple[int, int]]:
    """Tokens of each item behind a stage before the LLM, and behind one in front of layer `layer`.

    later: the share of its tokens that the second one leaves, as published. The mean over the layers is the budget;
    where the first stage could keep all tokens, the second one leaves more of them.

    >>> from vtc.testing import make_view
    >>> schedule(make_view([(24, 24)], keep=64), 16, 1 / 3)  # of 32 layers
    [(96, 32)]
    """
    items, spans = view.items, (layer, view.model.llm_layers - layer)
    columns = zip(items.counts, view.granted, items.fixed, strict=True)
    return [_both(*each, spans, later) for each in columns]


@functools.lru_cache(CACHED)
def _both(now: int, granted: int, fixed: int, spans: tuple[int, int], later: float) -> tuple[int, int]:
    """The same of one item of `now` tokens."""
    if granted >= now + fixed or not now:
        return now, now

    def curve(x: float) -> list[int]:
        second = min(1, x) * later + max(0, x - 1) * (1 - later)
        return [max(1, math.floor(now * share + 0.5)) for share in (min(1, x), second)]

    layers = sum(spans)
    first, second = spend(layers * granted, spans, curve, between=(0, 2), fixed=fixed, slack=layers / 2, of=now)
    return min(now, first), min(now, second)


def left(view: StageView, method: Hashable, layer: int, later: float) -> tuple[int, ...]:
    """Tokens of each item behind the stage that `method` has reached; arguments as in `schedule`."""
    if view.stage != PRE_LLM:
        return tuple(map(min, view.items.counts, view.memory[method, "later"]))
    first, view.memory[method, "later"] = zip(*schedule(view, layer, later), strict=True)
    return first
