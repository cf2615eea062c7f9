"""Published efficiency numbers, and what this cost model says of them: `vtc cost --check`.

Every row states what its paper or code prints; `tolerance` is half of its last digit unless the paper's own rounding
is known to be off. Rows of public code are what that code prints. Left out is what the formulas do not reproduce: AIM's
rows of Qwen-VL-Chat (which count the feed-forward part twice), of merging to 12.5 % and less and of its video
baselines, and caches that were printed in GB with one digit. So is SparseVLM's 1.8177 T, whose text length is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vtc.cost.conventions import convention
from vtc.cost.published import QWEN2_7B, VICUNA_7B, VICUNA_13B
from vtc.cost.roofline import HARDWARE, seconds, viewer_operators
from vtc.cost.shapes import LLMShape
from vtc.cost.token_counts import TokenCounts, constant, from_steps


@dataclass(frozen=True)
class Row:
    """One number. printed: as published, in `unit`; ours: the same computed here; note: what is odd about it."""

    source: str
    what: str
    convention: str
    unit: str
    printed: float
    ours: float
    tolerance: float
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether ours is what is printed, within the tolerance."""
        return abs(self.ours - self.printed) <= self.tolerance + 1e-9


def rows() -> Iterator[Row]:
    """All published numbers, source by source."""
    yield from _divprune()
    yield from _fastv()
    yield from _pyramiddrop()
    yield from _shortv()
    yield from _globalcom2()
    yield from _aim()
    yield from _sparsevlm()


def _count(name: str, llm: LLMShape, visual: TokenCounts, text: float = 0) -> float:
    return convention(name).operations(llm, visual, text)


def halving(visual: int, share: float, layers: int = 32, stages: int = 4) -> TokenCounts:
    """PyramidDrop's schedule: stages of equal length, each with `share` of the tokens of the one before, cut to whole.

    >>> halving(576, 0.5).spans
    ((8, 576), (8, 288), (8, 144), (8, 72))
    """
    return TokenCounts(tuple((layers // stages, int(visual * share**stage)) for stage in range(stages)))


def falling(visual: float, first: int, last: int, layers: int, text: int) -> TokenCounts:
    """AIM's schedule, text included: all tokens before layer `first`, fewer by equal steps, none from `last` on."""
    shares = [1.0 if i < first else max(0.0, 1 - (i - first + 1) / (last - first)) for i in range(layers)]
    return TokenCounts(tuple((1, int(visual * share + text)) for share in shares))


# --- DivPrune's tflops.py: mean over data sets
PROMPTS = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
NEXT = (2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116)
CLIPS = (28, 63, 21, 38, 196)


def _divprune() -> Iterator[Row]:
    source = "DivPrune, tflops.py"
    settings = (
        ("LLaVA-1.5-7B", VICUNA_7B, (576,) * 11, PROMPTS, 0.098, (3.2280, 0.5122, 15.63)),
        ("LLaVA-1.5-13B", VICUNA_13B, (576,) * 11, PROMPTS, 0.098, (6.2813, 1.0020, 15.71)),
        ("LLaVA-1.6-7B", VICUNA_7B, NEXT, PROMPTS, 0.098, (11.8489, 1.2659, 10.80)),
        ("8 frames of 144", VICUNA_7B, (1152,) * 5, CLIPS, 0.1, (6.5386, 0.9371, 14.10)),
    )
    for model, llm, visual, text, keep, printed in settings:
        full, pruned = [], []
        for tokens, words in zip(visual, text, strict=True):
            left = round(words + tokens - round((1 - keep) * tokens))
            full.append(_count("ffn2", llm, constant(llm.layers, tokens), words))
            pruned.append(_count("ffn2", llm, constant(llm.layers, left)))
        sets = len(full)
        ratio = sum(p / f for p, f in zip(pruned, full, strict=True)) / sets
        ours = sum(full) / sets / 1e12, sum(pruned) / sets / 1e12, 100 * ratio
        for what, value, mine, unit in zip(("all", "pruned", "ratio"), printed, ours, ("T", "T", "%"), strict=True):
            yield Row(source, f"{model}, {what}", "ffn2", unit, value, mine, 0.005 if unit == "%" else 0.00005)


def _fastv() -> Iterator[Row]:
    full = _count("ffn2", VICUNA_7B, constant(32, 612))
    pruned = _count("ffn2", VICUNA_7B, from_steps([(0, 612), (3, 324)], 32))
    yield Row("FastV, README", "LLaVA-1.5-7B, K=3 R=50 %, share", "ffn2", "%", 57, 100 * pruned / full, 0.5)


def _pyramiddrop() -> Iterator[Row]:
    name = "ffn3_visual"
    table = [
        ("LLaVA-1.5-7B, vanilla", constant(32, 576), 3.82, 0.005),
        ("LLaVA-NeXT-7B, vanilla", constant(32, 2880), 20.8, 0.05),
        ("nine patches, vanilla", constant(32, 5184), 40.6, 0.05),
        ("LLaVA-1.5-7B, FastV K=2 R=50 %", from_steps([(0, 576), (2, 288)], 32), 2.01, 0.005),
        ("LLaVA-NeXT-7B, FastV K=2 R=50 %", from_steps([(0, 2880), (2, 1440)], 32), 10.6, 0.05),
        ("nine patches, share 0.5", halving(5184, 0.5), 18.1, 0.05),
    ]
    for share, small, large, off in ((0.4, 1.54, 8.22, 0.005), (0.5, 1.78, 9.46, 0.005), (0.6, 2.06, 11.0, 0.05)):
        table.append((f"LLaVA-1.5-7B, share {share}", halving(576, share), small, 0.005))
        table.append((f"LLaVA-NeXT-7B, share {share}", halving(2880, share), large, off))
    for what, visual, printed, tolerance in table:
        ours = _count(name, VICUNA_7B, visual) / 1e12
        yield Row("PyramidDrop, tables 1, 4, 5", what, name, "T", printed, ours, tolerance)


def _shortv() -> Iterator[Row]:
    for model, llm, visual, half, printed in (
        ("LLaVA-1.5-7B", VICUNA_7B, 576, 16, (8.5, 4.9, 4.7)),
        ("LLaVA-1.5-13B", VICUNA_13B, 576, 20, (16.6, 9.4, 9.1)),
        ("LLaVA-NeXT-7B", VICUNA_7B, 2880, 16, (42.7, 22.0, 21.8)),
        ("LLaVA-NeXT-13B", VICUNA_13B, 2880, 20, (81.8, 42.1, 41.7)),
    ):
        schedules = (
            ("vanilla", [(0, visual)]),
            ("FastV K=2 R=50 %", [(0, visual), (2, visual // 2)]),
            (f"VTW K={half}", [(0, visual), (half, 0)]),
        )
        for (what, steps), value in zip(schedules, printed, strict=True):
            ours = _count("ffn3_x2", llm, from_steps(steps, llm.layers)) / 1e12
            yield Row("ShortV, arXiv 2504.00502, table 1", f"{model}, {what}", "ffn3_x2", "T", value, ours, 0.05)


def _viewer_rows(
    source: str, what: str, llm: LLMShape, entering: TokenCounts, device: str, tera: float, ms: float, digits: int,
    off: float = 0.0, note: str = "",
) -> Iterator[Row]:  # fmt: skip
    found = list(viewer_operators(llm, entering))
    half = 0.5 * 10**-digits
    operations = sum(operator.operations for operator in found) / 1e12
    yield Row(source, what, "llmviewer", "T", tera, operations, off or half, note)
    yield Row(source, f"{what}, {device}", "llmviewer", "ms", ms, 1000 * seconds(found, HARDWARE[device]), half)


def _globalcom2() -> Iterator[Row]:
    off = "last digit differs: cut, not rounded"
    table = (
        (2880, 41.7, 170.7, 80.0, 295.1), (2160, 30.4, 119.9, 58.7, 211.6), (1440, 19.7, 74.5, 38.3, 134.6),
        (720, 9.6, 34.6, 18.7, 64.1), (288, 3.8, 13.3, 7.4, 25.0),
    )  # fmt: skip
    for tokens, small, fast, large, slow in table:
        cut = tokens in (2160, 1440)
        yield from _viewer_rows(
            "GlobalCom2, table 8", f"7B, {tokens} tokens", VICUNA_7B, constant(32, tokens), "a100-40g", small, fast, 1,
            0.1 if cut else 0.0, off if cut else "",
        )  # fmt: skip
        yield from _viewer_rows(
            "GlobalCom2, table 9", f"13B, {tokens} tokens", VICUNA_13B, constant(40, tokens), "a100-80g", large, slow, 1
        )
    for tokens, small, large in ((1440, 755.0, 1228.8), (720, 377.0, 590.0), (288, 151.0, 236.0)):
        for model, llm, printed in (("7B", VICUNA_7B, small), ("13B", VICUNA_13B, large)):
            ours = llm.layers * llm.kv_bytes(tokens) / 1e6
            if printed < 1000:  # larger ones were printed as GB with one digit and multiplied by 1024 afterwards
                yield Row(
                    "GlobalCom2, tables 8 and 9", f"{model}, {tokens} tokens, cache", "kv", "MB", printed, ours, 1
                )


def _aim() -> Iterator[Row]:
    source, a100 = "AIM, arXiv 2412.03248", "a100-40g"
    for what, llm, entering, tera, ms in (
        ("OneVision-7B, 32 frames", QWEN2_7B, constant(28, 6372), 99.63, 439.58),
        ("LongVA, 18532 tokens", QWEN2_7B, constant(28, 18532), 381.09, 2186.04),
        ("OneVision-7B, merge to 50 %", QWEN2_7B, constant(28, 3236), 46.48, 182.65),
        ("OneVision-7B, merge to 25 % and prune", QWEN2_7B, falling(1568, 14, 22, 28, 100), 14.76, 55.03),
        ("OneVision-7B, 192 frames", QWEN2_7B, falling(192 * 49, 14, 22, 28, 100), 99.27, 471.20),
        ("LLaVA-1.5-7B", VICUNA_7B, constant(32, 616), 8.18, 29.30),
        ("LLaVA-1.5-7B, AIM from 72", VICUNA_7B, falling(72, 13, 21, 32, 40), 1.00, 8.98),
        ("LLaVA-1.5-7B, AIM from 252", VICUNA_7B, falling(252, 13, 21, 32, 40), 2.22, 10.92),
        ("LLaVA-1.5-7B, VTW K=8", VICUNA_7B, from_steps([(0, 616), (8, 40)], 32), 2.43, 13.88),
        ("LLaVA-1.5-7B, VTW K=3", VICUNA_7B, from_steps([(0, 616), (3, 40)], 32), 1.24, 10.66),
        ("LLaVA-1.5-7B, FastV K=1 25 %", VICUNA_7B, from_steps([(0, 616), (1, 184)], 32), 2.58, 10.34),
    ):
        yield from _viewer_rows(source, what, llm, entering, a100, tera, ms, 2)
    what, entering = "LLaVA-1.5-7B, PruMerge+ 144", constant(32, 184)
    yield from _viewer_rows(source, what, VICUNA_7B, entering, a100, 2.41, 9.73, 2, 0.01, "last digit differs")


def _sparsevlm() -> Iterator[Row]:
    _, after = sparsevlm((300, 200, 110))
    what = "192 tokens, mean behind the layers"
    yield Row("SparseVLM, code", what, "tokens", "tokens", 192.03125, after.mean, 0)


def sparsevlm(kept: tuple[int, int, int], visual: int = 576) -> tuple[TokenCounts, TokenCounts]:
    """Visual tokens entering each of 32 layers, and those left behind each, which that code calls the equal tokens.

    kept: behind layers 2, 6 and 15; the tokens merged from what is pruned there come on top.
    """
    now, steps = visual, [(0, visual)]
    for layer, keep in zip((2, 6, 15), kept, strict=True):
        now = keep + (int(0.3 * (now - keep)) + 1) // 10 + 1
        steps.append((layer, now))
    after = from_steps(steps, 32)
    return from_steps([(0, visual), *((layer + 1, tokens) for layer, tokens in steps[1:])], 32), after
