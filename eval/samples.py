"""Pictures and questions of a few documents beside the answers, in `samples/TASK.json`, so that a report can show them.

A sweep has its tasks at hand and writes them; a store that is read later may not find its tasks any more. They are
documents of which kept tokens are recorded, said to be what they are: half of them those on which the cells disagree
most, the rest spread evenly.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vtc.app.media import Video
from vtc.app.show.geometry import Media
from vtc.app.video_reading import VideoReading
from vtc.errors import InputError, one_line
from vtc.eval.asked import Scorable
from vtc.eval.kept import media_of, read_kept, recorded
from vtc.eval.messages import Clips
from vtc.eval.results import asked
from vtc.eval.store import Record, Store

LIMIT = 40
"""Documents of a store, shared between its tasks; each has at least two."""
SIDE = 256
"""Pixels of a thumbnail's longer side."""
PICTURES = 4
"""Pictures shown of one document."""


def write_samples(store: Store, tasks: Sequence[Scorable], reading: VideoReading | None = None) -> None:
    """Write the samples of each task whose main metric has been scored by document, and the answers' pictures.

    A document whose pictures cannot be read is left out: its answers lack as well, or the failure is recorded. reading:
    how videos became frames.

    Raises:
        InputError: the folder cannot be written.
    """
    metrics = store.metrics()
    for task in tasks:
        asked = store.run()["tasks"][task.name]["documents"]
        about = task.name, task.fingerprint, asked, task.main_metric
        fields = ("task", "task_fp", "documents", "metric")
        scores = [record["scores"] for record in metrics if tuple(record[name] for name in fields) == about]
        scores = [{doc: score for doc, score in each.items() if recorded(int(doc))} for each in scores if each]
        chosen = choose(scores, max(2, LIMIT // len(tasks)))
        if not chosen:
            continue
        found = [_sample(task, doc_id, why, reading) for doc_id, why in chosen.items()]
        samples = [entry for entry in found if entry is not None]
        _write(store.folder / "samples" / f"{task.name}.json", {"fingerprint": task.fingerprint, "samples": samples})


def read_samples(folder: Path, task: str, fingerprint: str) -> list[Record]:
    """The stored samples of a task; none where nothing was stored, or of the task as it was before it changed.

    A sample has `doc_id`, `question`, `target`, `why`, `pictures`, a list of data URIs, and `places`: of each picture
    the number of its medium in the conversation, the frame, and how many frames that has.
    """
    path = folder / "samples" / f"{task}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        samples: list[Record] = content["samples"]
        return samples if content["fingerprint"] == fingerprint else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not readable as samples ({one_line(error)}); remove it and go on") from error


def choose(scores: Sequence[dict[str, float]], count: int) -> dict[int, str]:
    """At most `count` documents by id, each with the reason why it is shown; those most in dispute first.

    >>> choose([{"0": 1.0, "1": 1.0, "2": 0.0}, {"0": 1.0, "1": 0.0, "2": 0.0}], 2)
    {1: 'cells disagree', 0: 'spread evenly'}
    """
    common = sorted(set.intersection(*(set(map(int, each)) for each in scores))) if scores else []
    spread = {doc_id: float(np.var([each[str(doc_id)] for each in scores])) for doc_id in common}
    disputed = sorted((d for d in common if spread[d] > 0), key=lambda d: (-spread[d], d))[: count // 2]
    others = [doc_id for doc_id in common if doc_id not in disputed]
    room = min(len(others), count - len(disputed))
    even = [others[i * len(others) // room] for i in range(room)]
    reasons = dict.fromkeys(disputed, "cells disagree") | dict.fromkeys(even, "spread evenly")
    return reasons


def _sample(task: Scorable, doc_id: int, why: str, reading: VideoReading | None) -> Record | None:
    try:
        messages = task.conversation(doc_id, Clips(reading))
        target = task.target(doc_id)
    except Exception:  # the task's own code; what it refuses while answering is recorded as a failure already
        return None
    parts = [part for message in messages for part in message["content"]]
    media = [_frames(each) for each in media_of(messages)]
    pictures = [(medium, at, len(frames)) for medium, frames in enumerate(media) for at in range(len(frames))]
    question = "\n".join(str(part["text"]) for part in parts if part["type"] == "text")
    step = max(1, -(-len(pictures) // PICTURES))
    shown = pictures[::step]
    return {
        "doc_id": doc_id, "question": question, "target": target, "why": why,
        "pictures": [thumbnail(media[medium][at]) for medium, at, _ in shown], "places": shown, "of": len(pictures),
    }  # fmt: skip


def _frames(shown: Media) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in shown.frames] if isinstance(shown, Video) else [shown]


def thumbnail(picture: Image.Image) -> str:
    """A small WebP of a picture as a data URI."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _write(path: Path, content: Record) -> None:
    temporary = path.with_suffix(".json.new")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another --out") from error


def browsed(
    store: Store, run: Record, lines: Sequence[Record], stored: Mapping[tuple[str, str, str], Record]
) -> Record:
    """By task what a browser of samples shows: its `cells` with `method` and `retention`, and its `samples`.

    Each sample also has `answers`, `scores` and `kept` in the order of the cells, None where there is none; kept: see
    `vtc.eval.kept.read_kept`. lines: those of the results, `stored` what was scored by document.
    """
    wanted: dict[tuple[str, str, int], dict[str, str]] = {}
    tasks: Record = {}
    for name, task in run["tasks"].items():
        samples = [s for s in read_samples(store.folder, name, task["fingerprint"]) if s["doc_id"] < task["documents"]]
        if samples:
            tasks[name] = samples
            wanted |= {(name, task["fingerprint"], sample["doc_id"]): {} for sample in samples}
    if not tasks:
        return {}
    for row in store.rows():
        answers = wanted.get((row["task"], row["task_fp"], row["doc_id"]))
        if answers is not None and row["repeat"] == 0:
            answers[row["cell"]] = row["text"]
    places = {
        (name, run["tasks"][name]["fingerprint"], sample["doc_id"]): sample["places"]
        for name, samples in tasks.items()
        for sample in samples
        if "places" in sample  # earlier versions recorded none
    }
    kept = read_kept(store, places)
    made: Record = {}
    for name, samples in tasks.items():
        metric = run["tasks"][name]["main_metric"]
        cells = {line["cell"]: line for line in lines if line["task"] == name and line["metric"] == metric}
        shown = []
        for sample in samples:
            document = name, run["tasks"][name]["fingerprint"], sample["doc_id"]
            answers, left = wanted[document], kept.get(document, {})
            scores = [
                ((stored.get((name, metric, c)) or {}).get("scores") or {}).get(str(sample["doc_id"])) for c in cells
            ]
            said = {"answers": [answers.get(cell) for cell in cells], "kept": [left.get(cell) for cell in cells]}
            shown.append({**sample, **said, "scores": scores})
        named = [{"method": line["method"], "retention": asked(line)} for line in cells.values()]
        made[name] = {"cells": named, "samples": shown}
    return made
