"""Methods that drop visual tokens before several layers of the LLM: where they do so, and how many they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, StageView
from vtc.method.budget import CACHED
from vtc.method.schedule import DEPTH, Profiles, Rates, Schedule, check, through


@dataclass(frozen=True)
class ScheduledCompressor(Compressor):
    """A method inside the LLM that drops tokens at the depths that a schedule names, by scores of its own.

    schedule: how many tokens each layer sees, see `vtc.method.schedule`; None for what the method does without.
    Subclasses ask `starts` for their stages and `left` for counts.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 32 layers
    >>> vtc.create("fastv", schedule=(1, 1, 0.5, 0.25)).plan(llava).stages
    (16, 26)
    """

    schedule: Rates | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None:
            check(self.schedule)

    def alone(self, *others: str) -> None:
        """Raise VTCError where `schedule` is given and so are others of the hyper-parameters, for it decides alone."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        if self.schedule is not None and any(getattr(self, other) != defaults[other] for other in others):
            raise VTCError(f"schedule says where tokens leave and how many; leave out {' and '.join(others)} beside it")

    @property
    def needs_budget(self) -> bool:
        return not isinstance(self.schedule, tuple)

    def schedules(self, model: ModelSpec) -> tuple[Schedule, ...]:
        """What `schedule` comes to on this model; an item takes the first one that meets its budget."""
        return () if self.schedule is None else (Schedule.read(self.schedule, several(model)),)

    def starts(self, model: ModelSpec) -> tuple[int, ...]:
        """The LLM layers before which tokens may leave."""
        return tuple(sorted({start for schedule in self.schedules(model) for start in schedule.starts}))

    def least_retention(self, model: ModelSpec) -> float:
        found = self.starts(model)
        return min(found) / model.llm_layers if found else super().least_retention(model)

    def left(self, view: StageView, start: int, schedules: Sequence[Schedule] | None = None) -> tuple[int, ...]:
        """Tokens that each item has behind the stage before LLM layer `start`.

        schedules: in the place of those of the method.
        """
        items, schedules = view.items, schedules or self.schedules(view.model)
        granted = view.granted if self.needs_budget else items.entered
        columns = zip(items.counts, items.entered, granted, items.fixed, items.input_counts, strict=True)
        return tuple(min(now, _first(schedules, item).get(start, now)) for now, *item in columns)


@dataclass(frozen=True)
class StagedCompressor(ScheduledCompressor):
    """A method that drops tokens before several layers of the LLM, as the budget or its hyper-parameters say.

    layers: as the method numbers them; None for the published ones. ratios: the share of the tokens given to the LLM
    that each stage leaves; then no retention or keep is given. By default lambda, lambda^2, lambda^3, ... of the tokens
    stay, with the lambda that meets the budget as the mean over all layers, and a method with `profiles` lies between
    these. schedule: instead of both. Subclasses say what the paper has, the first and the last number that a layer may
    have, what `Schedule.rounds` is for their ratios, and profiles: shares that the published layers leave at some
    budgets, from the largest to the smallest. Of layers that fall together on a shallow model the last one's count.

    >>> from dataclasses import dataclass
    >>> import torch, vtc
    >>> @dataclass(frozen=True)
    ... class Thin(StagedCompressor):
    ...     def lists(self, model):
    ...         return ((1, 3),)
    ...     def select(self, view):
    ...         return vtc.Selection(view.items.token < torch.tensor(self.left(view, view.stage))[:, None])
    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llava-clip")
    >>> with torch.no_grad(), vtc.compress(model, Thin(), retention=0.5) as handle:
    ...     output = model(**tiny_inputs("llava-clip", [[3, "image", 5]], model=model))
    >>> handle.stats.calls[0].entering
    ((1, (16,)), (2, (6,)), (1, (3,)))
    """

    layers: tuple[int, ...] | None = None
    ratios: Rates | None = None

    published: ClassVar[tuple[int, ...]] = (8, 16, 24)
    published_ratios: ClassVar[Rates] = (0.5, 0.25, 0.125)
    first: ClassVar[int] = 1
    last: ClassVar[int | None] = None
    rounds: ClassVar[float] = 0.5
    profiles: ClassVar[tuple[Rates, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alone("layers", "ratios")
        layers = self.published if self.layers is None else self.layers
        last = math.inf if self.last is None else self.last
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < self.first or layers[-1] > last:
            most = "" if self.last is None else f" and end at {last} at the latest"
            raise VTCError(
                f"layers={layers!r} must rise, begin at {self.first} or later{most}; the paper uses {self.published} "
                f"of {DEPTH}"
            )
        ratios = self.ratios
        if ratios is not None and (
            len(ratios) != len(layers)
            or list(ratios) != sorted(ratios, reverse=True)
            or not 0 <= ratios[-1] <= ratios[0] < 1
        ):
            raise VTCError(
                f"ratios={ratios!r} must fall and lie between 0 and 1, one for each of {len(layers)} layers: each is a "
                f"share of the tokens that entered the LLM, such as {self.published_ratios}"
            )

    @property
    def needs_budget(self) -> bool:
        return self.ratios is None and super().needs_budget

    @abstractmethod
    def lists(self, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
        """LLM layers of this model before which tokens leave; an item takes the first list that meets its budget."""

    def schedules(self, model: ModelSpec) -> tuple[Schedule, ...]:
        """What the lists of layers, or `schedule`, come to on this model."""
        if self.schedule is not None:
            return super().schedules(model)
        depth, lists = several(model), self.lists(model)
        if not lists[0] or (self.ratios is not None and len(lists[0]) != len(self.ratios)):
            raise UnsupportedMethod(
                f"layers={self.layers or self.published!r} of {DEPTH} are {len(lists[0])} of this {model.family} "
                f"model's {depth} LLM layers; pass layers that are further apart or earlier"
            )
        if self.ratios is not None:
            return (Schedule(lists[0], depth, self.ratios, self.rounds),)
        if self.profiles and self.layers in (None, self.published):
            return tuple(Schedule(layers, depth, self.between(model, layers)) for layers in lists)
        return tuple(Schedule(layers, depth) for layers in lists)

    @functools.lru_cache(CACHED)  # noqa: B019 - a method is its hyper-parameters; asked at every stage
    def between(self, model: ModelSpec, starts: tuple[int, ...]) -> Profiles:
        """The profiles, of the stages there are on this model."""
        each = [dataclasses.replace(self, layers=(layer,)).lists(model)[0] for layer in self.published]
        columns = {start: column for column, found in enumerate(each) for start in found}
        return through(tuple(tuple(row[columns[start]] for start in starts) for row in self.profiles))

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.starts(model), Needs(), "preserve")


def several(model: ModelSpec) -> int:
    """How many layers the LLM has; raises UnsupportedMethod for one, inside which nothing can be dropped."""
    if model.llm_layers < 2:
        raise UnsupportedMethod(f"the LLM of this {model.family} model has one layer; nothing can be dropped inside")
    return model.llm_layers


def _first(schedules: Sequence[Schedule], item: Sequence[int]) -> dict[int, int]:
    """What the first schedule that can meet an item's budget leaves of it; item: as `Schedule.left` takes it."""
    *rather, last = schedules
    for schedule in rather:
        with contextlib.suppress(BudgetError):
            return schedule.left(*item)
    return last.left(*item)
