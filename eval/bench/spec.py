"""What a bench is asked to measure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtc.errors import InputError, shown
from vtc.eval.bench.configs import SMALL
from vtc.method.budget import Budget

PROMPT = (
    "Look at the picture and say what is shown in it, which objects there are, how many of each, what color and what "
    "shape they have, and where they are relative to the others"
)
METHODS = ("random", "vtc_cls", "fastv@0.4", "downsample")
AGAIN = ("repeats", "note")
"""Settings that may differ when a bench is taken up again."""


@dataclass(frozen=True)
class Load:
    """Pictures of one request, and their width and height in pixels.

    >>> Load.parse("2x336"), str(Load(1, 640, 480))
    (Load(pictures=2, width=336, height=336), '1x640x480')
    """

    pictures: int
    width: int
    height: int

    def __str__(self) -> str:
        side = f"{self.width}" if self.width == self.height else f"{self.width}x{self.height}"
        return f"{self.pictures}x{side}"

    @classmethod
    def parse(cls, text: str) -> Load:
        """What `str` writes: pictures, width, and height where that is another.

        Raises:
            InputError: it is anything else.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text.strip())
        if found is None:
            raise InputError(
                f"load {shown(text)} is no pictures x side in pixels; write for example 2x336 or 1x640x480"
            )
        pictures, width, height = found.groups()
        return cls(int(pictures), int(width), int(height or width))


@dataclass(frozen=True)
class BenchSpec:
    """Settings of a bench, see `vtc bench --help`; each is part of the record.

    methods: as `vtc.method.text` reads them, and `downsample`. retentions: of those that have no budget of their own.
    load: of each request; loads: those of the break-even chart, None for a choice by the model, () for no chart.
    layers: LLM layers of a shape, None for as many as fit. threads: of torch, None for its own choice. warmup: rounds
    that are not kept. note: what readers should know of the circumstances.

    >>> BenchSpec(methods=("vtc_cls", "fastv@0.5"), retentions=(0.25,), new_tokens=8).loads is None
    True
    """

    model: str = SMALL
    methods: tuple[str, ...] = METHODS
    retentions: tuple[float, ...] = (0.33, 0.11)
    batch_sizes: tuple[int, ...] = (1, 4)
    new_tokens: int = 256
    repeats: int = 5
    warmup: int = 1
    load: Load = Load(1, 640, 480)
    loads: tuple[Load, ...] | None = None
    layers: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    threads: int | None = None
    prompt: str = PROMPT
    note: str = ""

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 1), ("repeats", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')}={value} is too small; write {least} or more")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise InputError(f"batch-sizes {list(self.batch_sizes)} hold no size of 1 or more; write for example 1,4")
        for share in self.retentions:
            Budget(retention=share)
        for name in ("methods", "retentions", "batch_sizes"):
            given: Sequence[Any] = getattr(self, name)
            if twice := sorted({str(value) for value in given if given.count(value) > 1}):
                raise InputError(f"{name.replace('_', '-')}: {', '.join(twice)} given twice; write it once")

    def record(self) -> dict[str, Any]:
        """All settings as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        loads = None if self.loads is None else [str(load) for load in self.loads]
        values |= {"load": str(self.load), "loads": loads}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def of(cls, record: dict[str, Any]) -> BenchSpec:
        """The settings that `record` wrote."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        loads = None if values["loads"] is None else tuple(map(Load.parse, values["loads"]))
        return cls(**{**values, "load": Load.parse(values["load"]), "loads": loads})
