"""Estimated time: each operator takes the longer of computing and moving its data on an idealised device.

The published "prefill times" that such a model reproduces are estimates, not measurements; so are these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vtc.cost.shapes import LLMShape
from vtc.cost.token_counts import TokenCounts
from vtc.errors import unknown_name


@dataclass(frozen=True)
class Hardware:
    """bandwidth: bytes per second. peak: dense 16-bit operations per second."""

    name: str
    bandwidth: float
    peak: float


HARDWARE = {
    each.name: each
    for each in (
        Hardware("v100", 900e9, 112e12),
        Hardware("a100-40g", 1555e9, 312e12),
        Hardware("a100-80g", 2039e9, 312e12),
        Hardware("h100", 3072e9, 989.5e12),
    )
}
"""As LLM-Viewer's `hardware_params.py` lists them (its "A100" is the 40 GB card; its H100 has 3072 GB/s)."""


def hardware(name: str) -> Hardware:
    """The device of that name; raises UnknownName with near matches."""
    if name not in HARDWARE:
        raise unknown_name("hardware", name, list(HARDWARE))
    return HARDWARE[name]


@dataclass(frozen=True)
class Operator:
    """Something a device does at once. moved: bytes that it reads and writes."""

    name: str
    operations: float
    moved: float

    def seconds(self, on: Hardware) -> float:
        """The longer of computing and moving."""
        return max(self.operations / on.peak, self.moved / on.bandwidth)


def seconds(operators: Iterable[Operator], on: Hardware) -> float:
    """Estimated time of operators that run one after the other."""
    return sum(operator.seconds(on) for operator in operators)


ONE_ADD = ("qwen2", "qwen2_vl", "qwen2_5_vl")
"""Model types whose file in LLM-Viewer lacks the second residual addition of a layer."""


def viewer_operators(llm: LLMShape, entering: TokenCounts, element: int = 2) -> Iterator[Operator]:
    """A prefill as LLM-Viewer cuts it into operators: no fused attention, one logit row, no vision tower.

    entering: tokens of each layer, text included. element: bytes of a number.
    Source: github.com/hahnyuan/LLM-Viewer, `model_analyzer.py`, with the batch size 1 that papers use.
    """
    d, queries, keys = llm.hidden, llm.query_width, llm.kv_width
    adds = 1 if llm.kind.removesuffix("_text") in ONE_ADD else 2
    for layer, n in entering.each():
        m, square = llm.ffn_width(layer), llm.heads * n**2
        for name, inputs, outputs, times in (
            ("queries", d, queries, 1),
            ("keys and values", d, keys, 2),
            ("output", queries, d, 1),
            ("gate and up", d, m, 2),
            ("down", m, d, 1),
        ):
            one = element * (inputs * outputs + n * (inputs + outputs))
            for _ in range(times):
                yield Operator(name, 2 * n * inputs * outputs, one)
        yield Operator("query x key", 2 * n**2 * queries, element * (2 * n * keys + square))
        yield Operator("weights x value", 2 * n**2 * queries, element * (square + n * keys + n * queries))
        yield Operator("softmax", 5 * square, element * 2 * square)
        for name, times, operations, moved in (("norm", 2, 7, 2), ("add", adds, 1, 2), ("activation", 1, 2, 3)):
            for _ in range(times):
                yield Operator(name, operations * n * d, element * moved * n * d)
    yield Operator("logits", d * llm.vocabulary, element * (d * llm.vocabulary + d + llm.vocabulary))
