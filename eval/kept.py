"""Which tokens cells kept of a few documents, in `kept.jsonl`, so that a report draws them without a model.

A record says of one cell and document how many tokens its last stage left, and where they lie: by picture or video the
panels of `vtc.batch.places`, each a raster whose places are bits, a 1 where the token is left.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vtc.app.preparation import Chat
from vtc.app.show.geometry import Media, acting, caption, order, window
from vtc.batch.places import places
from vtc.batch.trace import CallRecord, ItemRecord
from vtc.errors import InputError, VTCError, one_line
from vtc.eval.store import Record, Store

DENSE = 32
"""The first documents, all of which are recorded."""


def recorded(doc_id: int) -> bool:
    """Whether kept tokens of a document are recorded: of the first all, then 16 of every doubling of their number.

    It depends on nothing else, so that a sweep that grows, or has several workers, records the same.

    >>> [sum(map(recorded, range(n))) for n in (10, 32, 64, 128, 1024, 10_000)]
    [10, 32, 48, 64, 112, 164]
    """
    return doc_id % (1 << (doc_id // DENSE).bit_length()) == 0


def kept_records(call: CallRecord, chats: Mapping[int, Chat], processor: Any) -> Iterator[Record]:
    """What `call`, which answered `chats` in this order, kept of the recorded ones; nothing of what is left whole."""
    beams = next(iter(call.keep.values())).shape[0] // len(chats) if call.keep else 1
    by_row: dict[int, list[ItemRecord]] = {}
    for item in call.items:
        by_row.setdefault(item.row, []).append(item)
    for number, (doc_id, chat) in enumerate(chats.items()):
        items, shown = by_row.get(number * beams, []), media_of(chat)
        *_, stage = (None, *acting(items))
        if recorded(doc_id) and stage is not None and len(items) == len(shown):
            passed = [item.passed[stage].cpu() for item in items]
            try:
                drawn = [
                    _item(shown[media], media, item, alive, processor)
                    for media, item, alive in zip(order(shown, items), items, passed, strict=True)
                ]
            except VTCError:  # nobody knows where the tokens lie
                continue
            counts = {"left": sum(int(alive.sum()) for alive in passed), "of": sum(map(len, passed))}
            yield {"doc_id": doc_id, "stage": caption(stage), **counts, "items": drawn}


def media_of(chat: Sequence[Mapping[str, Any]]) -> list[Media]:
    """The pictures and videos of a conversation."""
    parts = [part for message in chat for part in message["content"]]
    return [part[part["type"]] for part in parts if part["type"] in ("image", "video")]


def _item(shown: Media, media: int, item: ItemRecord, alive: Tensor, processor: Any) -> Record:
    found = places(item.layout)
    panels = []
    for number, name in enumerate(found.panels):
        raster = found.raster(number)
        left = (alive[raster] & (raster >= 0)).numpy()
        panels.append([name, *raster.shape, base64.b64encode(np.packbits(left).tobytes()).decode()])
    edges = [round(edge, 4) for edge in window(processor, shown, item)]
    return {"media": media, "kind": item.kind, "window": edges, "panels": panels}


def read_kept(store: Store, wanted: Mapping[tuple[str, str, int], Sequence[Any]]) -> dict[tuple[str, str, int], Record]:
    """By document of `wanted` and then by cell what a report draws there.

    wanted: by task, fingerprint and document the pictures that are shown: number of the medium, frame, and how many
    frames it has. Of a cell: `stage`, `left`, `of` and `panels`, each the picture's number, a name, what of the picture
    it covers, rows, columns and the bits.

    Raises:
        InputError: a record that is none.
    """
    found: dict[tuple[str, str, int], Record] = {document: {} for document in wanted}
    for record in store.kept():
        document = record["task"], record["task_fp"], record["doc_id"]
        if document in found:
            try:
                panels = list(_panels(record["items"], wanted[document]))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                path = store.folder / "kept.jsonl"
                raise InputError(f"{path}: a line is damaged ({one_line(error)}); remove the file and go on") from error
            counts = {name: record[name] for name in ("stage", "left", "of")}
            found[document][record["cell"]] = {**counts, "panels": panels}
    return found


def _panels(items: Sequence[Record], pictures: Sequence[Sequence[int]]) -> Iterator[list[Any]]:
    """All panels of a picture; of a video the one that a frame that is shown is part of."""
    by_media = {item["media"]: item for item in items}
    for picture, (media, frame, frames) in enumerate(pictures):
        item = by_media[media]
        panels = item["panels"]
        at = frame * len(panels) // frames
        for name, rows, columns, bits in panels[at : at + 1] if item["kind"] == "video" else panels:
            yield [picture, name, item["window"], rows, columns, bits]
