"""tiny_video: clips of 8 to 16 frames of 84 pixels, and questions about what happens in them.

Two movers are shown all the time and travel in one direction for a part of the clip; what leaves the frame on one side
comes back on the other, so that the place of a mover in one frame says nothing about its direction. Two or three
guests appear for a while at a fixed place, one of them up to three times, never in the first or the last frame: the
frame in the middle says nothing about the order. A word and a digit are each shown in a single frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from vtc.eval.tiny import drawing
from vtc.eval.tiny.canvas import COLOURS, PALETTE, SHAPES, Canvas, Item, draw_shape
from vtc.eval.tiny.sample import Actor, Facts, Sample
from vtc.eval.tiny.scenes import SPLITS

STREAM = 2  # third number of the seed
SIZE = 84  # pixels
FRAMES = (8, 8, 8, 12, 16)  # of clip number n: FRAMES[n % 5]
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_TIMES = 3
BIN = 4  # px of the places that training tells apart; an actor that moves goes further from frame to frame
BINS = SIZE // BIN
_RADIUS = (7.5, 11.0)  # px
_SPEED = (4.5, 9.0)  # px per frame


def _shown(rng: np.random.Generator, frames: int, times: int) -> tuple[bool, ...]:
    """Random frames in which a guest is shown: that many uninterrupted stretches, never the first or last frame."""
    inner = frames - 2
    edges = np.sort(rng.choice(inner + 1, 2 * times, replace=False))
    return (False, *(int((edges <= t).sum()) % 2 == 1 for t in range(inner)), False)


def _mover(rng: np.random.Generator, frames: int, look: tuple[str, str]) -> Actor:
    direction = tuple(STEPS)[int(rng.integers(4))]
    length = int(rng.integers(frames // 4, frames // 2 + 1)) if rng.random() < 0.85 else frames - 1
    start = int(rng.integers(0, frames - length))
    speed, (dx, dy) = rng.uniform(*_SPEED), STEPS[direction]
    x, y = rng.uniform(0, SIZE, 2)
    gone = [speed * min(max(t - start, 0), length) for t in range(frames)]
    path = tuple(((x + dx * way) % SIZE, (y + dy * way) % SIZE) for way in gone)
    return Actor(*look, rng.uniform(*_RADIUS), (True,) * frames, path, direction, (start, start + length))


def _guests(rng: np.random.Generator, canvas: Canvas, frames: int, looks: list[tuple[str, str]]) -> list[Actor]:
    """Guests whose appearances begin in different frames; the first of them appears one to three times."""
    times = [int(rng.integers(1, MAX_TIMES + 1))] + [1] * (len(looks) - 1)
    while True:
        shown = [_shown(rng, frames, number) for number in times]
        starts = [t for one in shown for t in range(1, frames) if one[t] and not one[t - 1]]
        if len(set(starts)) == len(starts):
            break
    guests = []
    for look, here in zip(looks, shown, strict=True):
        radius = rng.uniform(*_RADIUS)
        place = canvas.place(2 * radius, 2 * radius)
        if place is not None:
            centre = (place[0] + radius, place[1] + radius)
            guests.append(Actor(*look, radius, here, (centre,) * frames))
    return guests


def _flash(canvas: Canvas, kind: str, train: bool) -> None:
    """A word or a digit on the single frame that `canvas` holds."""
    if kind == "word":
        canvas.add_word((1.7, 2.2))
    else:
        canvas.add_digit((22, 29), train)


def _draw(canvas: Canvas, actor: Actor, t: int, angle: float, paint: drawing.Array) -> None:
    """An actor at its place, and what is cut off on one side again on the other; every visible part is an item."""
    (x, y), r = actor.path[t], actor.radius
    for dx in (-SIZE, 0, SIZE):
        for dy in (-SIZE, 0, SIZE):
            cx, cy = x + dx, y + dy
            if all(-r < c < SIZE + r for c in (cx, cy)):
                draw_shape(canvas.image, actor.name, (cx, cy), r, angle, paint)
                canvas.items.append(Item("shape", actor.name, actor.colour, (cx - r, cy - r, cx + r, cy + r)))


def make(seed: int, split: str) -> Sample:
    """Clip number `seed` of a split."""
    rng = np.random.default_rng([seed, SPLITS[split], STREAM])
    frames = FRAMES[seed % len(FRAMES)]
    scenery = Canvas.blank(rng, SIZE, SIZE)
    drawing.clutter(rng, scenery.image, int(rng.integers(0, 4)))
    names, colours = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
    looks = [(SHAPES[int(n)], COLOURS[int(c)]) for n, c in zip(names, colours, strict=False)]
    movers = [_mover(rng, frames, look) for look in looks[:2]]
    guests = _guests(rng, scenery, frames, looks[2 : 2 + int(rng.integers(2, 4))])
    actors = (*movers, *guests)
    style = [
        (rng.uniform(-0.3, 0.3), np.clip(np.array(PALETTE[a.colour]) + rng.normal(0, 10, 3), 0, 255)) for a in actors
    ]
    flashes: dict[int, list[str]] = {}
    for kind in ("word", "digit"):
        if rng.random() < 0.8:
            flashes.setdefault(int(rng.integers(frames)), []).append(kind)
    noise = rng.uniform(2, 12)
    pictures, items = [], []
    for t in range(frames):
        canvas = Canvas(rng, scenery.image.copy(), boxes=list(scenery.boxes))
        for actor, (angle, paint) in zip(actors, style, strict=True):
            if actor.shown[t]:
                _draw(canvas, actor, t, angle, paint)
        for kind in flashes.get(t, ()):
            _flash(canvas, kind, split == "train")
        canvas.image += rng.normal(0, 1, (SIZE, SIZE, 1)) * noise
        pictures.append(_rounded(canvas.image))
        items.append(tuple(canvas.items))
    return Sample(np.stack(pictures), Facts(tuple(items), (SIZE, SIZE), actors))


def _rounded(image: drawing.Array) -> NDArray[np.uint8]:
    return np.clip(image, 0, 255).astype(np.uint8)


def bins(places: Iterable[float]) -> tuple[int, ...]:
    """Numbers of these places, what is outside the frame at its edge.

    >>> bins([-3.0, 4.0, 83.9, 90.0])
    (0, 1, 20, 20)
    """
    return tuple(min(max(int(place / BIN), 0), BINS - 1) for place in places)


def travelled(actor: Actor) -> float:
    """Pixels that a mover goes."""
    (x, y), (u, v) = actor.path[actor.moves[0]], actor.path[actor.moves[0] + 1]
    step = math.hypot((u - x + SIZE / 2) % SIZE - SIZE / 2, (v - y + SIZE / 2) % SIZE - SIZE / 2)
    return step * (actor.moves[1] - actor.moves[0])
