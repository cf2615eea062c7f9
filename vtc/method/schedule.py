"""How many visual tokens are left at each depth of the LLM: layers that scale, shares that are given or solved for.

A schedule of a method is written in one of three ways: layers with the share that each leaves; a shape, such as
``sigmoid(8)``, whose one free number is solved for so that the mean over all layers meets the budget; or the rates
c_0, c_1, ... of all layers, found by a search (`vtc.method.search`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from vtc.errors import UnsupportedMethod, VTCError, shown
from vtc.method.budget import CACHED, NOISE, Shape, common_factor, left_by_stages, spend
from vtc.method.plan import ModelSpec

DEPTH = 32
"""Published layers are those of an LLM of so many."""
Rates = tuple[float, ...]
"""The share of the tokens that entered the LLM which each of its layers sees, from the first one on."""
FAR = 40.0
"""Beyond so many times the width of its slope a sigmoid is 0 or 1."""
WRITE = "write sigmoid(8), cosine, cosine(0.15), or the share that each layer sees, such as (1, 1, 0.5, 0.25)"


def half_up(number: float) -> int:
    """The nearest whole number, of two the larger.

    >>> half_up(2.5), half_up(2.4)
    (3, 2)
    """
    return math.floor(number + 0.5)


def scaled(
    layers: Sequence[int],
    depth: int,
    *,
    of: int = DEPTH,
    first: int = 0,
    last: int | None = None,
    nearest: Callable[[float], int] = half_up,
) -> tuple[int, ...]:
    """Layers of an LLM of `of` layers as those of one of `depth`, from `first` to `last` (by default the last one).

    Those that fall together are one, those behind `last` are left out.

    >>> scaled((8, 16, 24), 28), scaled((2, 10, 18), 4, first=1), scaled((8, 16, 24), 3)
    ((7, 14, 21), (1, 2), (1, 2))
    """
    last = depth - 1 if last is None else last
    found = (max(first, nearest(layer * depth / of)) for layer in layers)
    return tuple(dict.fromkeys(layer for layer in found if layer <= last))


def scaled_layer(layer: int, model: ModelSpec, *, first: int = 0) -> int:
    """One layer of an LLM of DEPTH layers as that of a model, see `scaled`.

    Raises:
        UnsupportedMethod: it falls behind the model's last layer.

    >>> import vtc
    >>> scaled_layer(20, vtc.adapters.families()["llava"].references[0])
    20
    """
    found = scaled((layer,), model.llm_layers, first=first)
    if not found:
        raise UnsupportedMethod(
            f"layer={layer} of {DEPTH} lies behind the last of the {model.llm_layers} LLM layers of this "
            f"{model.family} model; pass an earlier one" + (", on a model of several layers" if first else "")
        )
    return found[0]


# --- shapes
@dataclass(frozen=True)
class Sigmoid:
    """P-Sigmoid (arXiv:2412.00556): layer l of n sees the share ``c_l = 1 / (1 + exp(a (l / n - b)))``.

    steepness: a, above 0. b is solved for.

    >>> [round(share, 3) for share in Sigmoid(8)(0.5, (1, 1, 1, 1))]  # b = 0.5
    [0.881, 0.5, 0.119]
    """

    steepness: float

    def __post_init__(self) -> None:
        if not 0 < self.steepness < math.inf:
            raise VTCError(f"sigmoid({self.steepness:g}) does not fall; pass a steepness above 0, such as sigmoid(8)")

    def __call__(self, x: float, spans: Sequence[int]) -> list[float]:
        """The share that each stage leaves; x in [0, 1] moves the middle b, spans as in `left_by_stages`."""
        middle = x + (2 * x - 1) * FAR / self.steepness
        depths = [start / sum(spans) for start in accumulate(spans[:-1])]
        return [0.5 - 0.5 * math.tanh(self.steepness * (depth - middle) / 2) for depth in depths]


@dataclass(frozen=True)
class Cosine:
    """The progressive ratio decay of p-MoD (arXiv:2412.04449), ``c_l = shift + cos(pi l / (n - 1)) / 2``, for pruning.

    least: no share is smaller, 0.15 in the paper. The shift, 0.5 there, is solved for. The first layer sees everything,
    and shares above 0.85 do not become 1. p-MoD's routers let a token skip single layers, as `ranked_routing` does;
    elsewhere what leaves is gone.

    >>> [round(share, 2) for share in Cosine(0.15)(0.5, (1,) * 32)][7::8]  # before layers 8, 16 and 24
    [0.84, 0.47, 0.15]
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1:
            raise VTCError(f"cosine({self.least:g}) has no least share of [0, 1); p-MoD's is cosine(0.15)")

    def __call__(self, x: float, spans: Sequence[int]) -> list[float]:
        """As for `Sigmoid`; the shift is 2 x - 1/2."""
        angles = [math.pi * start / (sum(spans) - 1) for start in accumulate(spans[:-1])]
        return [min(1.0, max(self.least, 2 * x - 0.5 + 0.5 * math.cos(angle))) for angle in angles]


@dataclass(frozen=True, eq=False)
class Profiles:
    """Shares between those of several known profiles, a straight line from each to the next.

    rows: the share that each stage leaves, one row a profile, from the one that leaves most to the one that leaves
    least. Known by identity, since the profiles of a calibration are long.

    >>> found = Profiles(((1.0, 1.0), (0.5, 0.25), (0.0, 0.0)))
    >>> found(0.5, (1, 1, 1)), found(0.75, (1, 1, 1))
    ([0.5, 0.25], [0.75, 0.625])
    """

    rows: tuple[Rates, ...]

    def __call__(self, x: float, spans: Sequence[int]) -> list[float]:
        """As for `Sigmoid`; the profiles divide [0, 1] into equal parts, the last row stands at 0."""
        pieces = len(self.rows) - 1
        piece = min(int(x * pieces), pieces - 1)
        step = x * pieces - piece
        return [a + step * (b - a) for a, b in zip(self.rows[-1 - piece], self.rows[-2 - piece], strict=True)]


@functools.lru_cache(CACHED)
def through(rows: tuple[Rates, ...]) -> Profiles:
    """Profiles from one that leaves everything through `rows` to one that leaves nothing; one object for equal rows.

    >>> through(((0.5, 0.25),)).rows
    ((1.0, 1.0), (0.5, 0.25), (0.0, 0.0))
    """
    width = len(rows[0])
    return Profiles(((1.0,) * width, *rows, (0.0,) * width))


FORMS = re.compile(r"sigmoid\((\d+\.?\d*)\)|cosine(?:\((\d+\.?\d*)\))?")


def shape(text: str) -> Shape:
    """The shape that `text` names, with its number in parentheses.

    >>> shape("sigmoid(8)"), shape("cosine")
    (Sigmoid(steepness=8.0), Cosine(least=0.0))
    """
    match = FORMS.fullmatch(text.replace(" ", ""))
    if match is None:
        raise VTCError(f"schedule={text!r} is no schedule; {WRITE}")
    return Sigmoid(float(match[1])) if match[1] else Cosine(float(match[2] or 0))


# --- schedules
@dataclass(frozen=True)
class Schedule:
    """Layers of an LLM before which visual tokens leave, and what of an item's tokens each of these stages leaves.

    starts: the layers, rising, from 1 on. layers: how many the LLM has. shares: of the tokens that entered the LLM, one
    for each stage, falling; or a shape that meets a budget. rounds: added to a given share of a number of tokens before
    what is behind the point is cut off; at least one token stays.

    >>> Schedule((8, 16, 24), 32, (0.5, 0.25, 0.125)).mean
    0.46875
    >>> Schedule((8, 16, 24), 32).left(576, 270, 0, 576)  # shares fall by a common factor, the mean is 270 tokens
    {8: 288, 16: 144, 24: 72}
    """

    starts: tuple[int, ...]
    layers: int
    shares: Rates | Shape = common_factor
    rounds: float = 0.5

    @classmethod
    def read(cls, written: Rates | str, layers: int) -> Schedule:
        """What a hyper-parameter `schedule` says on an LLM of `layers` layers, of which each may be a stage.

        Where there are not as many rates as layers, each layer takes the one nearest in relative depth; equal
        neighbours are one stage.

        >>> Schedule.read((1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25), 8)
        Schedule(starts=(2, 4), layers=8, shares=(0.5, 0.25), rounds=0.5)
        >>> Schedule.read("sigmoid(8)", 4).left(100, 50, 0, 100)
        {1: 71, 2: 25, 3: 4}
        """
        if isinstance(written, str):
            return cls(tuple(range(1, layers)), layers, shape(written))
        each = [written[half_up(layer * (len(written) - 1) / (layers - 1))] for layer in range(layers)]
        starts = tuple(layer for layer in range(1, layers) if each[layer] != each[layer - 1])
        return cls(starts, layers, tuple(each[start] for start in starts))

    @property
    def spans(self) -> tuple[int, ...]:
        """Layers in front of the first stage, between the stages and behind the last one."""
        return tuple(after - before for before, after in pairwise((0, *self.starts, self.layers)))

    @property
    def mean(self) -> float:
        """Share of the tokens that a layer sees, mean over the layers, where shares are given."""
        assert isinstance(self.shares, tuple), "a shape has the mean that the budget asks for"
        return sum(span * share for span, share in zip(self.spans, (1.0, *self.shares), strict=True)) / self.layers

    def left(self, entered: int, granted: int, fixed: int, given: int) -> dict[int, int]:
        """Start of each stage -> tokens of one item behind it; empty where the budget lets all pass.

        entered: tokens that came to the LLM, beside `fixed` separators. granted: mean over the layers that the budget
        allows, separators included, of the `given` tokens in the input; read by shapes alone. Raises BudgetError where
        the layers in front of the first stage see more than that.
        """
        if isinstance(self.shares, tuple):
            counts: Sequence[int] = [max(1, math.floor(entered * share + self.rounds)) for share in self.shares]
        elif not entered or granted >= entered + fixed:
            return {}
        else:
            counts = left_by_stages(entered, 1, granted, fixed, given, self.spans, self.shares)
        return dict(zip(self.starts, counts, strict=True))


def check(written: Rates | str) -> None:
    """Raise VTCError for a hyper-parameter `schedule` that says nothing.

    >>> check("sigmoid(8)")
    """
    if isinstance(written, str):
        shape(written)
        return
    falls = list(written) == sorted(written, reverse=True)
    if len(written) < 2 or not falls or written[0] != 1 or not 0 <= written[-1] < 1:
        raise VTCError(
            f"schedule={shown(written)} does not fall from 1 to 0 or more: the first layer sees every token, and what "
            f"left does not come back; {WRITE}"
        )


def rates(of: Shape, mean: float, layers: int) -> Rates:
    """The share of the tokens that each of `layers` layers sees where a shape has this mean: c_0 = 1, c_1, ....

    Raises VTCError for a mean that the first layer alone exceeds, or that is no share.

    >>> [round(rate, 3) for rate in rates(Sigmoid(8), 0.5, 4)]
    [1.0, 0.709, 0.248, 0.043]
    """
    spans = (1,) * layers
    if not 0 < mean <= 1 or 1 + sum(of(0.0, spans)) > layers * mean + NOISE:
        least = (1 + sum(of(0.0, spans))) / layers
        raise VTCError(f"mean={mean!r} is no share that {layers} layers can see; pass one above {least:.3f}, up to 1")
    return tuple(spend(layers * mean, spans, lambda x: [1.0, *of(x, spans)]))
