"""Ask one question under several methods, and gather what every stage left of every picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vtc.app.answer import Answerer, Batch
from vtc.app.loading import Loaded
from vtc.app.media import Video
from vtc.app.preparation import Chat
from vtc.batch.places import Places, places
from vtc.batch.trace import CallRecord, ItemRecord
from vtc.errors import InputError, VTCError
from vtc.method.base import CacheStage, Compressor, EncoderStage, Stage

Media = Image.Image | Video


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
    parts = [{"type": _kind(each), _kind(each): each} for each in media]
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
    ordered = _in_order(media, items)
    windows = tuple(_window(loaded.processor, each, item) for each, item in zip(ordered, items, strict=True))
    return Look(
        prompt=prompt,
        media=tuple(ordered),
        places=tuple(places(item.layout) for item in items),
        windows=windows,
        tokens=sum(item.layout.n_tokens for item in items),
        answer=plain.text.strip(),
        seen=tuple(seen),
    )


def _kind(media: Media) -> str:
    return "video" if isinstance(media, Video) else "image"


def _in_order(media: Sequence[Media], items: Sequence[ItemRecord]) -> list[Media]:
    """The media as the items follow one another in the prompt."""
    waiting = {kind: iter([each for each in media if _kind(each) == kind]) for kind in ("image", "video")}
    return [next(waiting[item.kind]) for item in items]


def _see(answerer: Answerer, batch: Batch, cell: Cell, arguments: Mapping[str, Any], records: list[CallRecord]) -> Seen:
    given = dict(cell.options) | {"retention": cell.retention, "keep": cell.keep, "trace": True}
    with answerer.compressed(cell.method, **given) as handle:
        (reply,) = answerer.generate(batch, arguments, handle, blame=cell.name)
        record = handle.trace[0]
    records.append(record)
    return Seen(cell, reply.text.strip(), reply.visual_tokens_kept, tuple(_stages(record)))


def _stages(record: CallRecord) -> Iterator[tuple[str, tuple[Left, ...]]]:
    """Caption and items of every stage that left fewer tokens, or other ones, in some KV head at least."""
    before = [item.layout.n_tokens for item in record.items]
    for stage in record.keep:
        now = [int(item.passed[stage].sum()) for item in record.items]
        if now != before or stage in record.heads or any(stage in item.merged_into for item in record.items):
            yield caption(stage), tuple(_left(item, stage) for item in record.items)
        before = now


def _left(item: ItemRecord, stage: Stage) -> Left:
    alive = item.passed[stage].cpu().numpy()
    return Left(alive, _numbers(item.merged_into.get(stage)), _numbers(item.scores.get(stage)))


def _numbers(values: Tensor | None) -> Any:
    return None if values is None else values.cpu().numpy()


def caption(stage: Stage) -> str:
    """A stage in words.

    >>> caption(0), caption(2), caption(EncoderStage(1)), caption(CacheStage(0)), caption(CacheStage(2))
    ('before the LLM', 'before layer 2', 'in the encoder', 'after the prefill', 'caches from layer 2 on')
    """
    if isinstance(stage, EncoderStage):
        return "in the encoder"
    if isinstance(stage, CacheStage):
        return f"caches from layer {stage.from_layer} on" if stage.from_layer else "after the prefill"
    return f"before layer {stage}" if stage else "before the LLM"


def _window(processor: Any, media: Media, item: ItemRecord) -> tuple[float, float, float, float]:
    """What of the picture its panels show: left, top, right and bottom as fractions of it."""
    images = processor.image_processor
    if isinstance(media, Video) or item.layout.n_crops > 1 or not getattr(images, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    edge, crop = images.size.get("shortest_edge"), images.crop_size
    scale = edge / min(media.size) if edge else 1.0
    wide, high = (min(1.0, crop[name] / (scale * getattr(media, name))) for name in ("width", "height"))
    return (1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2
