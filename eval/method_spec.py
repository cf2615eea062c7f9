"""The methods of a sweep as its user writes them: text, mappings, objects, and lists of those that act together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from vtc.errors import InputError
from vtc.method.base import Compressor, Positions
from vtc.method.budget import Budget
from vtc.method.composite import Composite
from vtc.method.text import Named, parse


def no_boolean(given: Any) -> Any:
    """`given`, unless it is true or false, which count as 1 and 0 in Python."""
    if isinstance(given, bool):
        raise InputError(f"{str(given).lower()} is no number; write for example 1, or leave it out")
    return given


Whole = Annotated[int, BeforeValidator(no_boolean)]
Real = Annotated[float, BeforeValidator(no_boolean)]
"""Numbers as a user writes them."""


class MethodSpec(BaseModel):
    """A method by name with the hyper-parameters that differ from its defaults, or several that act together.

    retention, keep: its own budget, instead of the sweep's. positions: its own position policy. parts: methods that act
    together on one model; `name` is then only a label. compressor: the object itself, where one was given instead
    of a name.

    >>> MethodSpec.model_validate({"name": "random", "seed": 1}).parameters
    {'seed': 1}
    """

    model_config = ConfigDict(extra="allow", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(min_length=1)
    retention: Real | None = None
    keep: Whole | None = None
    positions: Positions | None = None
    parts: tuple[MethodSpec, ...] = ()
    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)

    @field_validator("parts", mode="before")
    @classmethod
    def _entries(cls, given: Any) -> Any:
        return method_entries(given)

    @model_validator(mode="after")
    def _positions_are_one(self) -> Self:
        if any(part.positions for part in self.parts):
            raise InputError(f"{self.name!r}: methods that act together have one position policy; give it to the sweep")
        return self

    @model_validator(mode="after")
    def _budget_is_one(self) -> Self:
        _ = self.budget  # which refuses what is none
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        given = serialise(self)
        unused = {name for name in ("retention", "keep", "positions", "parts") if not given.get(name)}
        return {name: value for name, value in given.items() if name not in unused}

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters as given."""
        return dict(self.model_extra or {})

    @property
    def budget(self) -> Budget | None:
        """Its own budget.

        Raises:
            BudgetError: both a retention and a number of tokens.
        """
        return None if self.retention is None and self.keep is None else Budget(self.retention, self.keep)

    @property
    def label(self) -> str:
        """The name with the hyper-parameters, as tables show it."""
        given = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name


def method_entries(given: Any) -> list[Any]:
    """What may stand under `methods` as mappings: text, mappings, objects, and lists of methods that act together."""
    entries = [given] if isinstance(given, str | Mapping | Compressor) else sequence(given)
    if not isinstance(entries, list):
        raise InputError(f"methods: {given!r} is no list of methods; write for example [random, vtc_cls]")
    return [made for entry in entries for each in _made(entry) for made in _seeded(each)]


def _seeded(entry: Any) -> list[Any]:
    """An entry with ``seeds: n`` as n entries, of the seeds 0 to n - 1."""
    if not isinstance(entry, Mapping) or "seeds" not in entry:
        return [entry]
    number = entry["seeds"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 1 or "seed" in entry:
        raise InputError(
            f"methods: seeds={number!r} of {entry.get('name')!r}; write a number such as seeds=3, and no seed"
        )
    rest = {name: value for name, value in entry.items() if name != "seeds"}
    return [{**rest, "seed": seed} for seed in range(number)]


def _made(entry: Any) -> list[Any]:
    if isinstance(entry, str):
        return [_joined([_as_written(part) for part in parts]) for parts in parse(entry)]
    if isinstance(entry, list | tuple):
        return [_joined(method_entries(entry))]
    if isinstance(entry, Composite):
        parts = [
            {**_described(part), **_limits(budget)} for part, budget in zip(entry.parts, entry.budgets, strict=True)
        ]
        return [{**_joined(parts), "compressor": entry}]
    if isinstance(entry, Compressor):
        return [_described(entry)]
    if isinstance(entry, type) and issubclass(entry, Compressor):
        raise InputError(f"methods: {entry.__name__} is a class; write {entry.__name__}() for a method with defaults")
    return [entry]


def _as_written(part: Named) -> dict[str, Any]:
    return {"name": part.name, **_limits(part.budget), **part.parameters}


def _limits(budget: Budget | None) -> dict[str, Any]:
    """A budget as the keys of an entry."""
    return {} if budget is None else {name: value for name, value in vars(budget).items() if value is not None}


def _joined(parts: list[Any]) -> Any:
    """One entry for methods that act together; a single one stands for itself."""
    if len(parts) == 1:
        return parts[0]
    made = [MethodSpec.model_validate(part) for part in parts]
    shares = ["".join(f"@{amount:g}" for amount in _limits(part.budget).values()) for part in made]
    return {"name": "+".join(part.label + share for part, share in zip(made, shares, strict=True)), "parts": parts}


def _described(method: Compressor) -> dict[str, Any]:
    """A method object as an entry: its name, what differs from the defaults, and the object."""
    changed = {}
    for each in dataclasses.fields(method):
        value = getattr(method, each.name)
        default = each.default if each.default is not dataclasses.MISSING else each.default_factory
        if value == (default() if callable(default) else default):
            continue
        try:
            json.dumps(value, default=list)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"methods: {method.name!r} has {each.name}={value!r}, which the files of a sweep cannot hold; use "
                "numbers, text, lists and mappings as hyper-parameters"
            ) from error
        changed[each.name] = value
    return {"name": method.name, **changed, "compressor": method}


def sequence(given: Any) -> Any:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else given
