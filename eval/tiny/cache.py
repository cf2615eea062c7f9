"""Training scenes rendered ahead into files, in chunks, so that a killed run renders only what is missing."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.scenes import make_scene
from vtc.eval.tiny.targets import patch_targets, presence

CHUNK = 2000


@dataclass(frozen=True)
class SceneCache:
    """Scenes 0..n-1 of a split: pictures in memory-mapped chunks, items and targets in memory."""

    images: list[NDArray[np.uint8]]
    items: list[tuple[Item, ...]]

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures, (len(numbers), 168, 168, 3)."""
        return np.stack([self.images[number // CHUNK][number % CHUNK] for number in numbers])

    def targets(self, numbers: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Patch targets (B, 5, 144) and presence bits (B, 64)."""
        chosen = [self.items[number] for number in numbers]
        return np.stack([patch_targets(items) for items in chosen]), np.stack([presence(items) for items in chosen])


def _chunk_paths(folder: Path, split: str, start: int, stop: int) -> tuple[Path, Path]:
    stem = f"{split}-{start:06d}-{stop:06d}"
    return folder / f"{stem}.npy", folder / f"{stem}.json"


def _render_chunk(folder: Path, split: str, start: int, stop: int) -> None:
    """Render a chunk; both files appear under their names only when complete, the description last."""
    scenes = [make_scene(seed, split) for seed in range(start, stop)]
    pictures, description = _chunk_paths(folder, split, start, stop)
    partial = pictures.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:
        np.save(file, np.stack([scene.image for scene in scenes]))
    os.replace(partial, pictures)
    partial.write_text(json.dumps([[asdict(item) for item in scene.items] for scene in scenes]))
    os.replace(partial, description)


def _load_items(path: Path) -> list[tuple[Item, ...]]:
    scenes = json.loads(path.read_text())
    return [tuple(Item(**{**item, "box": tuple(item["box"])}) for item in scene) for scene in scenes]


def render_scenes(
    folder: Path, split: str, count: int, workers: int, done: Callable[[int], None] = lambda scenes: None
) -> SceneCache:
    """Render scenes 0..count-1 into `folder` with that many processes (0: in this one) and open them.

    `done` is called with the number of scenes that have become available, chunk by chunk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    missing = [bound for bound in bounds if not _chunk_paths(folder, split, *bound)[1].exists()]
    done(count - sum(stop - start for start, stop in missing))
    if workers == 0 or len(missing) == 1:
        for start, stop in missing:
            _render_chunk(folder, split, start, stop)
            done(stop - start)
    elif missing:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = {pool.submit(_render_chunk, folder, split, *bound): bound for bound in missing}
            for job in as_completed(jobs):
                job.result()
                done(jobs[job][1] - jobs[job][0])
    paths = [_chunk_paths(folder, split, *bound) for bound in bounds]
    images = [np.load(pictures, mmap_mode="r") for pictures, _ in paths]
    return SceneCache(images, [scene for _, description in paths for scene in _load_items(description)])
