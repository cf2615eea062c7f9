"""StreamingLLM's rule on visual entries, one entry at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc.errors import VTCError
from vtc.testing import tiny_inputs, tiny_model

SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


@pytest.mark.parametrize("keep", [1, 3, 5, 17, 63, 1000])
@pytest.mark.parametrize("sinks", [0, 1, 4, 40])
def test_the_first_and_the_last_stay(make_view: Any, kept: Any, keep: int, sinks: int) -> None:
    view = make_view(SHAPES, stage=vtc.AFTER_PREFILL, keep=keep)
    for item, numbers in enumerate(kept(view, vtc.create("streaming_kv", sinks=sinks).select(view))):
        count = view.items.counts[item]
        first = list(range(min(sinks, keep, count)))
        rest = min(keep, count) - len(first)
        assert numbers == first + list(range(count - rest, count))


def test_negative_sinks_are_refused() -> None:
    with pytest.raises(VTCError, match=r"sinks=-1 is no number of first entries; pass 0 or more"):
        vtc.create("streaming_kv", sinks=-1)


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_budget_is_that_of_the_caches(name: str, keeps_entries: Any) -> None:
    keeps_entries(name, "streaming_kv", 0.4)


@torch.no_grad()
def test_the_first_token_is_the_untouched_models() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 6], [2, "image", 9]], model=model)
    plain = model(**inputs).logits
    with vtc.compress(model, "streaming_kv", retention=0.25) as handle:
        assert float((model(**inputs).logits - plain).abs().max()) < 1e-5
    assert handle.stats.retention == 1.0
    assert handle.stats.cache_retention == 0.25
