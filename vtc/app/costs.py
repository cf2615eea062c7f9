"""What answering costs on a loaded model: `vtc.cost` with the sizes, pictures and token counts of real calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vtc import adapters
from vtc.batch.trace import CallStats, Spans
from vtc.cost.exact import Cost, Work, cost, encoder_operations
from vtc.cost.shapes import ModelShape, TowerShape
from vtc.cost.token_counts import TokenCounts, constant
from vtc.engine.handle import Handle
from vtc.errors import UnsupportedModel
from vtc.method.base import Plan

Row = tuple[tuple[int, float], ...]
"""Numbers of layers, and the visual tokens of one question that each of them sees."""


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
        self._last = self.adapter.spec.feature_layer

    def untouched(
        self, inputs: Mapping[str, Any], visual: Sequence[int], text: Sequence[int]
    ) -> tuple[Work, ...] | None:
        """What the model as it is does for each question; visual, text: its tokens. None where that is not known."""
        if self.shape is None:
            return None
        encoded, total, layers = self.adapter.encoded(inputs), sum(visual), self.shape.llm.layers
        return tuple(
            Work(constant(layers, tokens), words, encoded.scaled(tokens / total) if total else encoded)
            for tokens, words in zip(visual, text, strict=True)
        )

    def compressed(self, full: Sequence[Work], handle: Handle, call: CallStats) -> tuple[Work, ...]:
        """The same under a method. call: what it did to the batch, rows in the order of `full`."""
        repeats = max(1, call.batch // len(full))  # beams repeat prompts
        rows = range(0, repeats * len(full), repeats)
        alike = zip(full, _of_rows(call.entering, rows), _of_rows(call.left, rows), strict=True)
        made = functools.cache(functools.partial(self._compressed, handle, call))
        return tuple(made(*each) for each in alike)

    def _compressed(self, handle: Handle, call: CallStats, work: Work, entering: Row, left: Row) -> Work:
        """What a call did to one question; entering, left: of its row alone."""
        assert self.shape is not None
        cut, last, tokens = self.shape.projector.cut, self._last, work.visual.mean
        projected = None
        if call.encoder_rows:
            layer, rows = call.encoder_rows[-1]
            projected = work.encoded.crops * (rows if layer > last else rows - cut)
        work = replace(
            work,
            visual=TokenCounts(entering),
            cached=TokenCounts(left),
            shortened=tuple((layer, rows) for layer, rows in call.encoder_rows if layer <= last),
            projected=projected,
        )
        ran = bool(call.stages) or call.left != call.entering  # else the LLM was left as it is
        method = method_operations(self.shape, handle.plan, work, llm=ran)
        if ran:  # one question, and the tokens of its pictures, separators among them
            method += sum(pair.operations(tokens) for pair in handle.pairs)
        return replace(work, method=method, method_weights=sum(pair.weights for pair in handle.pairs))

    def spent(self, full: Sequence[Work], works: Sequence[Work]) -> list[dict[str, Any]]:
        """The fields of `vtc.app.answer.Answer` about costs, question by question.

        full: of the untouched model, works: of what really ran.
        """
        return list(map(functools.cache(self._spent), works, full))

    def _spent(self, work: Work, full: Work) -> dict[str, Any]:
        one, whole = self.cost(work), self.cost(full)
        return {
            "layer_tokens": work.visual.spans,
            "flops": round(one.prefill),
            "flops_share": round(one.prefill / whole.prefill, 6),
            "kv_bytes": round(one.kv_bytes),
            "kv_share": round(one.kv_bytes / whole.kv_bytes, 6),
        }

    def cost(self, work: Work) -> Cost:
        """The cost of one question."""
        assert self.shape is not None
        return cost(self.shape, work, self.element)


def encoder_flops(shape: TowerShape, plan: Plan | None, entering: TokenCounts) -> float:
    """Operations of an encoder without an LLM on one image: its own and those of a method's readings.

    entering: patches of each layer.
    """
    rows = dict(entering.plus(shape.prefix).each())
    readings = () if plan is None else plan.needs.vision_pairs
    read = sum(each.operations(rows[max(0, layer)], shape.inner) for layer, each in readings)  # pixels lie at -1
    return encoder_operations(shape, entering) + read


def method_operations(shape: ModelShape, plan: Plan, work: Work, *, llm: bool = True) -> float:
    """What a method's readings cost by their own account, those of the LLM only where `llm` is set.

    What a method multiplies besides, such as similarities of tokens, is not known.
    """
    tower, decoder, encoded = shape.tower, shape.llm, work.encoded
    total = 0.0
    if encoded.crops:
        for layer, each in plan.needs.vision_pairs:
            shorter = [rows for start, rows in work.shortened if start <= layer]
            length = shorter[-1] if shorter else encoded.rows / encoded.crops
            total += encoded.crops * each.operations(length, tower.inner)
    entering, text = dict(work.visual.plus(work.text).each()), work.text
    for layer, reading in plan.needs.llm_pairs if llm else ():
        tokens = entering[layer]
        if reading.ahead:  # of all rows that arrive, those that skip the layer too
            arriving = entering[max((number for number in range(layer) if number not in plan.skips), default=0)]
            if arriving == tokens:  # nothing was ranked where every row went on
                continue
            tokens = arriving  # whose queries, keys and values are computed a second time
            total += 2 * tokens * decoder.hidden * (decoder.query_width + 2 * decoder.kv_width)
        total += reading.operations(tokens, decoder.query_width, text)
    return total


def _of_rows(spans: Spans, rows: Sequence[int]) -> list[Row]:
    """Layers and tokens of each of `rows`."""
    return [tuple((layers, totals[row]) for layers, totals in spans) for row in rows]
