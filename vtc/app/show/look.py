"""Ask one question under several methods, and gather what every stage left of every picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vtc.app.answer import Answerer, Batch
from vtc.app.loading import Loaded
from vtc.app.preparation import Chat
from vtc.app.show.geometry import Media, acting, caption, kind, order, window
from vtc.batch.places import Places, places
from vtc.batch.trace import CallRecord, ItemRecord
from vtc.errors import InputError, VTCError
from vtc.method.base import Compressor, Stage


@dataclass(frozen=True)
class Cell:
    """A method under the name that captions give it, its budget, and further arguments of `vtc.compress`."""

    name: str
    method: Compressor
    retention: float | None = None
    keep: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> str:
        """As a caption says it."""
        if self.keep is not None:
            return f"keep {self.keep}"
        return "" if self.retention is None else f"retention {self.retention:g}"


@dataclass(frozen=True, eq=False)
class Left:
    """One picture or video behind one stage.

    alive: [n] bool, where KV heads keep sets of their own what one of them keeps. into: [n] token that absorbed each
    token (its own where kept), -1 where none did; None where the stage merges nothing. scores: [n], NaN where a token
    was not ranked; None where the stage does not tell.
    """

    alive: NDArray[np.bool_]
    into: NDArray[np.int64] | None
    scores: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Seen:
    """A cell's answer, its mean number of visual tokens per layer, and stage by stage what is left of each item."""

    cell: Cell
    answer: str
    kept: float
    stages: tuple[tuple[str, tuple[Left, ...]], ...]


@dataclass(frozen=True, eq=False)
class Look:
    """The items and where their tokens lie, the untouched answer, and what every cell made of them."""

    prompt: str
    media: tuple[Media, ...]
    places: tuple[Places, ...]
    windows: tuple[tuple[float, float, float, float], ...]
    tokens: int
    answer: str
    seen: tuple[Seen, ...]


def look(
    loaded: Loaded, media: Sequence[Media], prompt: str, cells: Sequence[Cell], *, max_new_tokens: int = 32
) -> Look:
    """Answer `prompt` about pictures and videos untouched and under every cell, greedily.

    Raises:
        InputError: nothing to look at, or what the model's processor refuses.
        VTCError: a method cannot run on this model, or the places of its tokens are unknown.
    """
    if not media:
        raise InputError("no picture and no video given; there is nothing to show")
    answerer = Answerer(loaded)
    parts = [{"type": kind(each), kind(each): each} for each in media]
    batch = answerer.prepare([Chat([{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}])])
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False}
    (plain,) = answerer.generate(batch, arguments)
    records: list[CallRecord] = []
    seen = [_see(answerer, batch, cell, arguments, records) for cell in cells]
    if not records:
        raise InputError("no method given; name at least one with a retention or keep, such as vtc_cls at 0.25")
    items = records[0].items
    if len(items) != len(media):
        raise VTCError(f"the prompt holds {len(items)} items for {len(media)} pictures and videos, nothing is shown")
    ordered = [media[number] for number in order(media, items)]
    windows = tuple(window(loaded.processor, each, item) for each, item in zip(ordered, items, strict=True))
    return Look(
        prompt=prompt,
        media=tuple(ordered),
        places=tuple(places(item.layout) for item in items),
        windows=windows,
        tokens=sum(item.layout.n_tokens for item in items),
        answer=plain.text.strip(),
        seen=tuple(seen),
    )


def _see(answerer: Answerer, batch: Batch, cell: Cell, arguments: Mapping[str, Any], records: list[CallRecord]) -> Seen:
    given = dict(cell.options) | {"retention": cell.retention, "keep": cell.keep, "trace": True}
    with answerer.compressed(cell.method, **given) as handle:
        (reply,) = answerer.generate(batch, arguments, handle, blame=cell.name)
        record = handle.trace[0]
    records.append(record)
    return Seen(cell, reply.text.strip(), reply.visual_tokens_kept, tuple(_stages(record)))


def _stages(record: CallRecord) -> Iterator[tuple[str, tuple[Left, ...]]]:
    """Caption and items of every stage that changed something."""
    for stage in acting(record.items):
        yield caption(stage), tuple(_left(item, stage) for item in record.items)


def _left(item: ItemRecord, stage: Stage) -> Left:
    alive = item.passed[stage].cpu().numpy()
    return Left(alive, _numbers(item.merged_into.get(stage)), _numbers(item.scores.get(stage)))


def _numbers(values: Tensor | None) -> Any:
    return None if values is None else values.cpu().numpy()
