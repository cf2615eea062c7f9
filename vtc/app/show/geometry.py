"""Which traced item is which picture or video, what of it the model saw, and which stages left fewer of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from PIL import Image

from vtc.app.media import Video
from vtc.batch.trace import ItemRecord
from vtc.method.base import CacheStage, EncoderStage, Stage

Media = Image.Image | Video


def kind(media: Media) -> Literal["image", "video"]:
    """As items and chat messages call it."""
    return "video" if isinstance(media, Video) else "image"


def order(media: Sequence[Media], items: Sequence[ItemRecord]) -> list[int]:
    """Number in `media` of each item of the prompt, where those of one kind follow one another as they do here."""
    waiting = {name: iter([n for n, each in enumerate(media) if kind(each) == name]) for name in ("image", "video")}
    return [next(waiting[item.kind]) for item in items]


def acting(items: Sequence[ItemRecord]) -> Iterator[Stage]:
    """The stages that left fewer tokens of these items of one call, or other ones, in some KV head at least."""
    before = [item.layout.n_tokens for item in items]
    for stage in items[0].passed if items else ():
        now = [int(item.passed[stage].sum()) for item in items]
        if now != before or any(stage in item.heads or stage in item.merged_into for item in items):
            yield stage
        before = now


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


def window(processor: Any, media: Media, item: ItemRecord) -> tuple[float, float, float, float]:
    """What of the picture its panels show: left, top, right and bottom as fractions of it."""
    images = processor.image_processor
    if isinstance(media, Video) or item.layout.n_crops > 1 or not getattr(images, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    edge, crop = images.size.get("shortest_edge"), images.crop_size
    scale = edge / min(media.size) if edge else 1.0
    wide, high = (min(1.0, crop[name] / (scale * getattr(media, name))) for name in ("width", "height"))
    return (1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2
