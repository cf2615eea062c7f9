"""What answering costs on a loaded model: `vtc.cost` with the sizes, pictures and token counts of real calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vtc import adapters
from vtc.batch.trace import CallStats, Spans
from vtc.cost.exact import Cost, Work, cost
from vtc.cost.schedule import Schedule, constant
from vtc.cost.shapes import Encoded, ModelShape
from vtc.engine.attach import Handle
from vtc.errors import UnsupportedModel
from vtc.method.base import Plan


@dataclass(frozen=True)
class Spent:
    """Of one question: prefill operations and bytes of its cache behind the prefill, and both of the untouched model."""

    flops: float
    kv_bytes: float
    flops_full: float
    kv_bytes_full: float


class CostMeter:
    """Costs of the calls of one model. Families whose adapter tells no sizes have none.

    A batch's pictures are encoded together; each question has the share of its visual tokens. Padding does not count.
    """

    def __init__(self, model: Any) -> None:
        self.adapter = adapters.of(model)
        self.element = model.dtype.itemsize
        self.shape: ModelShape | None
        try:
            self.shape = self.adapter.shape(self.adapter.model.config)
        except UnsupportedModel:
            self.shape = None

    def untouched(self, inputs: Mapping[str, Any], visual: Sequence[int], text: Sequence[int]) -> list[Work]:
        """What the model as it is does for each question; visual, text: its tokens."""
        encoded, total, layers = self.adapter.encoded(inputs), sum(visual), self.adapter.spec.llm_layers
        return [
            Work(constant(layers, tokens), words, share_of(encoded, tokens, total))
            for tokens, words in zip(visual, text, strict=True)
        ]

    def compressed(self, full: Sequence[Work], handle: Handle, call: CallStats) -> list[Work]:
        """The same under a method. call: what it did to the batch, rows in the order of `full`."""
        repeats = max(1, call.batch // len(full))  # beams repeat prompts
        return [self._compressed(work, handle, call, row * repeats) for row, work in enumerate(full)]

    def _compressed(self, work: Work, handle: Handle, call: CallStats, row: int) -> Work:
        assert self.shape is not None
        last, cut = self.adapter.spec.feature_layer, self.shape.projector.cut
        projected = None
        if call.encoder_rows:
            layer, rows = call.encoder_rows[-1]
            projected = work.encoded.crops * (rows if layer > last else rows - cut)
        work = replace(
            work,
            visual=_of_row(call.entering, row),
            cached=_of_row(call.left, row),
            shortened=tuple((layer, rows) for layer, rows in call.encoder_rows if layer <= last),
            projected=projected,
        )
        return replace(work, method=method_operations(self.shape, handle.plan, work))

    def spent(self, full: Sequence[Work], works: Sequence[Work]) -> list[Spent]:
        """Of each question; full: of the untouched model, works: of what really ran."""
        pairs = [(self.cost(one), self.cost(before)) for one, before in zip(works, full, strict=True)]
        return [Spent(one.prefill, one.kv_bytes, whole.prefill, whole.kv_bytes) for one, whole in pairs]

    def cost(self, work: Work) -> Cost:
        """The cost of one question."""
        assert self.shape is not None
        return cost(self.shape, work, self.element)


def method_operations(shape: ModelShape, plan: Plan, work: Work) -> float:
    """What a method's readings cost by their own account; what it multiplies besides is not known."""
    tower, llm, encoded = shape.tower, shape.llm, work.encoded
    total = 0.0
    if encoded.crops:
        length = encoded.rows / encoded.crops
        total += sum(encoded.crops * each.operations(length, tower.inner) for _, each in plan.needs.vision_pairs)
    entering = dict(work.visual.plus(work.text).each())
    for layer, reading in plan.needs.llm_pairs:
        tokens = entering[max(0, layer - 1) if getattr(reading, "ahead", False) else layer]
        total += reading.operations(tokens, llm.query_width)
        if getattr(reading, "ahead", False):  # the layer's queries, keys and values are computed a second time
            total += 2 * tokens * llm.hidden * (llm.query_width + 2 * llm.kv_width)
    return total


def share_of(encoded: Encoded, tokens: int, total: int) -> Encoded:
    """The part of a batch's pictures that belongs to a question with `tokens` of its `total` visual tokens."""
    return encoded.scaled(tokens / total) if total else encoded


def _of_row(spans: Spans, row: int) -> Schedule:
    return Schedule(tuple((layers, totals[row]) for layers, totals in spans))
