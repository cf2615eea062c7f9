"""The ways in which papers count floating-point operations of a prefill, each under a name.

They differ by a factor of almost three on one model and prompt: in how many matrices the feed-forward part has, whether
a multiplication and an addition are one operation or two, and whether text counts. d: hidden size, m: feed-forward
width, n: tokens that enter a layer, H and K: query and key heads, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtc.cost.roofline import viewer_operators
from vtc.cost.shapes import LLMShape
from vtc.cost.token_counts import TokenCounts
from vtc.errors import unknown_name


@dataclass(frozen=True)
class Convention:
    """A way to count. formula: summed over the layers. unit: of what it counts. users: who publishes such numbers.

    text: text tokens it counts, None for those of the prompt. count: of a model whose layers are entered by so many
    tokens, text included.
    """

    name: str
    formula: str
    unit: str
    users: str
    count: Callable[[LLMShape, TokenCounts], float]
    text: int | None = None

    def operations(self, llm: LLMShape, visual: TokenCounts, text: float) -> float:
        """What this convention calls the FLOPs of the prefill of one prompt with `text` text tokens."""
        return self.count(llm, visual.plus(text if self.text is None else self.text))


def _dense(matrices: int, factor: int) -> Callable[[LLMShape, TokenCounts], float]:
    def count(llm: LLMShape, entering: TokenCounts) -> float:
        d = llm.hidden
        layers = (4 * n * d**2 + 2 * n**2 * d + matrices * n * d * llm.ffn_width(layer) for layer, n in entering.each())
        return factor * sum(layers)

    return count


def _viewer(llm: LLMShape, entering: TokenCounts) -> float:
    return sum(operator.operations for operator in viewer_operators(llm, entering))


FFN2 = "FastV, DivPrune, HoliTom and most surveys"
CONVENTIONS = {
    each.name: each
    for each in (
        Convention("ffn2", "4nd² + 2n²d + 2ndm", "multiply-accumulates, two FFN matrices", FFN2, _dense(2, 1)),
        Convention(
            "ffn3_visual", "4nd² + 2n²d + 3ndm, visual tokens alone", "multiply-accumulates", "PyramidDrop",
            _dense(3, 1), 0,
        ),
        Convention("ffn3_x2", "2(4nd² + 2n²d + 3ndm), 64 text tokens", "operations", "ShortV", _dense(3, 2), 64),
        Convention("ffn3_seq", "4nd² + 2n²d + 3ndm, whole sequence", "multiply-accumulates", "SparseVLM", _dense(3, 1)),
        Convention(
            "llmviewer", "2n(2d² + 2d²K/H + 3dm) + 4n²d + 5Hn² + 18nd, and dV once", "operations",
            "GlobalCom2, AIM, LLaVA-PruMerge", _viewer,
        ),
    )
}  # fmt: skip
"""By name. `exact`, what really runs, is not among them: it needs the whole model, see `vtc.cost.exact`."""


def convention(name: str) -> Convention:
    """The convention of that name; raises UnknownName with near matches."""
    if name not in CONVENTIONS:
        raise unknown_name("convention", name, [*CONVENTIONS, "exact"])
    return CONVENTIONS[name]
