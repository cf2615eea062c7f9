"""How many visual tokens enter each layer of a language model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vtc.errors import InputError, shown


@dataclass(frozen=True)
class TokenCounts:
    """Spans of neighbouring layers and the visual tokens that enter each of their layers, from the first layer on.

    >>> TokenCounts(((2, 576), (30, 128))).mean
    156.0
    """

    spans: tuple[tuple[int, float], ...]

    @property
    def layers(self) -> int:
        """Layers of all spans."""
        return sum(layers for layers, _ in self.spans)

    @property
    def mean(self) -> float:
        """Visual tokens that enter a layer in the mean."""
        return sum(layers * tokens for layers, tokens in self.spans) / self.layers

    def each(self) -> Iterable[tuple[int, float]]:
        """Number and tokens of every layer."""
        counts = (tokens for layers, tokens in self.spans for _ in range(layers))
        return enumerate(counts)

    def plus(self, tokens: float) -> TokenCounts:
        """The same with so many further tokens in every layer, such as text."""
        return TokenCounts(tuple((layers, count + tokens) for layers, count in self.spans))


def constant(layers: int, tokens: float) -> TokenCounts:
    """The same tokens in all layers."""
    return TokenCounts(((layers, tokens),))


def from_steps(steps: Iterable[tuple[int, float]], layers: int) -> TokenCounts:
    """Counts from (first layer, tokens) pairs, the first of which begins at layer 0.

    >>> from_steps([(0, 576), (2, 128)], 32).spans
    ((2, 576), (30, 128))
    """
    pairs = list(steps)
    starts = [start for start, _ in pairs]
    if not pairs or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= layers:
        raise InputError(
            f"layers {shown(starts)} are no rising list from 0 to at most {layers - 1}; write for example 0:576,2:128"
        )
    ends = [*starts[1:], layers]
    return TokenCounts(tuple((end - start, tokens) for (start, tokens), end in zip(pairs, ends, strict=True)))


def parse(text: str, layers: int, visual: int) -> TokenCounts:
    """Counts written as ``layer:tokens`` pairs; tokens may be a share of the `visual` ones in per cent.

    Layer 0 sees all of them unless it is named.

    >>> parse("2:128", 32, 576).spans, parse("0:50%,8:25%", 32, 576).spans
    (((2, 576), (30, 128)), ((8, 288), (24, 144)))
    """
    steps: list[tuple[int, float]] = []
    for part in text.split(","):
        try:
            layer, tokens = part.strip().split(":")
            percent = tokens.strip().endswith("%")
            count = int(visual * float(tokens.strip()[:-1]) / 100) if percent else int(tokens)
            steps.append((int(layer), count))
        except ValueError:
            raise InputError(
                f"{part.strip()!r} gives no layer its tokens; write layer:tokens, such as 2:128 or 2:50%"
            ) from None
        if not 0 <= count <= visual:
            raise InputError(f"{count} tokens from layer {layer} on, of {visual} visual tokens; write at most {visual}")
    if steps[0][0] != 0:
        steps.insert(0, (0, visual))
    return from_steps(steps, layers)
