"""StreamingLLM on visual entries: the first and the last of each item stay in the cache (arXiv:2309.17453)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vtc.errors import VTCError
from vtc.method.base import AFTER_PREFILL, Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.entries import latest
from vtc.method.registry import register
from vtc.ops.host import put


@register
class StreamingKV(Compressor):
    """Keep the first and the last visual entries of each item in the KV cache: the control for the other policies.

    Acts after the prefill, in all layers alike; training-free, reads nothing. Of K entries an item may keep, the first
    min(sinks, K) and the last K - sinks stay, whatever they show. The prefill is untouched and saves nothing; decoding
    runs on the shorter cache.

    sinks: first entries, 4 as in the paper.

    Departures from the paper and its code: the sink and the window are those of each image or video, and text entries
    all stay, where the paper takes the first and last tokens of the sequence; entries keep their positions, where the
    paper numbers them inside the cache; what is generated is never evicted. Newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("streaming_kv").plan(llava).stages
    (CacheStage(from_layer=0),)
    """

    sinks: int = 4

    name: ClassVar[str] = "streaming_kv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise VTCError(f"sinks={self.sinks!r} is no number of first entries; pass 0 or more, the paper uses 4")

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((AFTER_PREFILL,), Needs(), "preserve")

    def select(self, view: StageView) -> Selection:
        items, counts = view.items, view.keep
        sinks = [min(self.sinks, count) for count in counts]
        recent = latest(items, [count - sink for count, sink in zip(counts, sinks, strict=True)])
        place = torch.arange(items.mask.shape[1], device=view.device)
        return Selection(recent | (place < put(sinks, view.device)[:, None]), counts=counts)
