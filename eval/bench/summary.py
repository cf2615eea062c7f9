"""Medians with quartiles, ratios of runs of the same round, and from how many tokens on a method pays."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vtc.eval.bench.arms import UNTOUCHED
from vtc.eval.bench.parts import PARTS
from vtc.eval.bench.record import Record, SceneRecord

MODEL = ("vision", "selection", "prefill")
"""What the model and the method take up to the first new token, but for the logits."""
LLM = ("selection", "prefill")
MEASURED = (*PARTS, "first_token", "per_token", "total", "attach", "engine", "peak_bytes", "rest_bytes")


@dataclass(frozen=True)
class Spread:
    """The median of rounds, with the quartiles around it."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Median and quartiles; None of nothing.

    >>> spread([4.0, 1.0, 2.0, 3.0, 100.0])
    Spread(median=3.0, low=2.0, high=4.0, n=5)
    """
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def taken(scene: SceneRecord, arm: str, parts: Sequence[str]) -> list[float]:
    """Seconds of several parts together, round by round; a part that does not apply takes none."""
    return [sum(values[arm].get(part) or 0.0 for part in parts) for values in scene.rounds]


def ratios(scene: SceneRecord, arm: str, other: str, parts: Sequence[str]) -> Spread | None:
    """`arm` over `other`, each round for itself, so that a slow moment of the machine meets both."""
    if arm not in scene.arms or other not in scene.arms:
        return None
    both = zip(taken(scene, arm, parts), taken(scene, other, parts), strict=True)
    return spread([one / two for one, two in both if two])


def bound(scene: SceneRecord, whole: str, parts: Sequence[str]) -> Spread | None:
    """How many times faster the untouched model were if `parts` of `whole` took no time at all."""
    both = zip(scene.values(UNTOUCHED, whole), taken(scene, UNTOUCHED, parts), strict=True)
    return spread([all_ / (all_ - part) for all_, part in both])


@dataclass(frozen=True)
class Line:
    """A scene's arm in numbers: spreads by name, None where one does not apply.

    Beside `MEASURED` these are `speedup` over the untouched model from the first byte to the last token, `llm_to_limit`
    and `first_token_to_limit`, `working_bytes` of memory beyond what was in use before, `requests` and `tokens` a
    second.
    """

    scene: SceneRecord
    arm: str
    values: dict[str, Spread | None]

    def median(self, name: str) -> float | None:
        """The median of a value; None where it does not apply."""
        found = self.values[name]
        return None if found is None else found.median


def lines(scene: SceneRecord) -> Iterator[Line]:
    """Every arm of a scene that has rounds."""
    for arm, facts in scene.arms.items() if scene.rounds else ():
        values = {name: spread(scene.values(arm, name)) for name in MEASURED}
        working = [
            peak - rest
            for peak, rest in zip(scene.values(arm, "peak_bytes"), scene.values(arm, "rest_bytes"), strict=True)
        ]
        total = scene.values(arm, "total")
        values |= {
            "speedup": ratios(scene, UNTOUCHED, arm, ["total"]),
            "llm_to_limit": ratios(scene, arm, facts.limit, LLM) if facts.limit else None,
            "first_token_to_limit": ratios(scene, arm, facts.limit, ["first_token"]) if facts.limit else None,
            "working_bytes": spread(working),
            "requests": spread([scene.batch / seconds for seconds in total]),
            "tokens": spread([scene.batch * scene.new_tokens / seconds for seconds in total]),
        }
        yield Line(scene, arm, values)


@dataclass(frozen=True)
class BreakEven:
    """A method against the untouched model over numbers of visual tokens, vision tower, selection and prefill together.

    points: visual tokens of the untouched prompt, and seconds saved there. words: from where on it pays.
    """

    arm: str
    points: tuple[tuple[float, Spread], ...]

    @property
    def words(self) -> str:
        """From how many visual tokens on the method pays, as far as was measured."""
        tokens = [count for count, _ in self.points]
        gains = [saved.median for _, saved in self.points]
        if all(gain > 0 for gain in gains):
            return f"pays at all of {tokens[0]:g} to {tokens[-1]:g} visual tokens"
        if all(gain <= 0 for gain in gains):
            return f"does not pay at any of {tokens[0]:g} to {tokens[-1]:g} visual tokens"
        crossings = [
            (a + (b - a) * -one / (two - one), two > 0)
            for (a, one), (b, two) in pairwise(zip(tokens, gains, strict=True))
            if (one > 0) != (two > 0)
        ]
        said = [f"{'from' if up else 'no longer from'} about {round(place)}" for place, up in crossings]
        return f"pays {', '.join(said)} visual tokens on (by interpolation)"


def break_even(record: Record) -> list[BreakEven]:
    """Each method over the scenes of the chart; none with fewer than two of them."""
    scenes = record.curve
    names = dict.fromkeys(name for scene in scenes for name, each in scene.arms.items() if each.kind == "method")
    found = []
    for name in names:
        points = []
        for scene in scenes:
            if name in scene.arms:
                both = zip(taken(scene, UNTOUCHED, MODEL), taken(scene, name, MODEL), strict=True)
                if (saved := spread([before - after for before, after in both])) is not None:
                    points.append((scene.visual, saved))
        if len(points) > 1:
            found.append(BreakEven(name, tuple(points)))
    return found


def table(record: Record) -> list[dict[str, Any]]:
    """A flat line per arm of every scene: settings, facts, and median, quartiles of every value; for `bench.csv`."""
    made = []
    for scene in record.scenes.values():
        for line in lines(scene):
            facts = scene.arms[line.arm]
            about: dict[str, Any] = {
                "model": record.machine["title"], "pictures": scene.pictures, "width": scene.width,
                "height": scene.height, "batch": scene.batch, "new_tokens": scene.new_tokens,
                "visual_tokens": scene.visual, "text_tokens": scene.text, "arm": line.arm, "kind": facts.kind,
                "method": facts.method, "retention": facts.retention, "keep": facts.keep,
                "visual_tokens_kept": facts.visual, "kv_bytes": facts.kv_bytes,
                "counted_kv_bytes": facts.counted_kv_bytes, "rounds": len(scene.rounds),
            }  # fmt: skip
            for name, value in line.values.items():
                median, low, high = (None,) * 3 if value is None else (value.median, value.low, value.high)
                about |= {name: median, f"{name}_q1": low, f"{name}_q3": high}
            made.append(about)
    return made
