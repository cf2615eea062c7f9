"""Endless series of samples of one task and one geometry, rendered in chunks into files when they are first needed.

A chunk can as well be rendered ahead by another process (`render_ahead`): files appear under their names only when
complete, so that neither a second process nor a killed one does harm.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtc.eval.tiny.sample import Facts, Task

CHUNK = 200  # samples


@dataclass(frozen=True)
class Stream:
    """Samples 0, 1, ... of a task in one of its geometries; after `different` ones they repeat in another order."""

    task: Task
    geometry: int
    split: str
    folder: Path
    different: int

    def path(self, chunk: int) -> Path:
        """File of the facts of a chunk; the pictures lie beside it."""
        return self.folder / f"{self.task.name}-{self.geometry}-{self.split}-{chunk:05d}.facts"

    def render(self, chunk: int) -> None:
        """Make the files of a chunk unless they exist; the facts appear last."""
        path = self.path(chunk)
        if path.exists():
            return
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.different))
        samples = [self.task.make(n * self.task.geometries + self.geometry, self.split) for n in numbers]
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            np.save(file, np.stack([sample.pictures for sample in samples]))
        os.replace(partial, path.with_suffix(".npy"))
        partial.write_bytes(pickle.dumps([sample.facts for sample in samples]))
        os.replace(partial, path)

    def number(self, at: int, seed: int) -> int:
        """Which of the different samples is entry `at` of the series: in order at first, then in shuffled passes."""
        lap, place = divmod(at, self.different)
        return place if lap == 0 else int(_order(seed, lap, self.different)[place])

    def read(self, numbers: Sequence[int]) -> tuple[NDArray[np.uint8], list[Facts]]:
        """Pictures (B, N, H, W, 3) and facts of these samples."""
        chunks = [_open(self, number // CHUNK) for number in numbers]
        pictures = np.stack([images[n % CHUNK] for (images, _), n in zip(chunks, numbers, strict=True)])
        return pictures, [facts[n % CHUNK] for (_, facts), n in zip(chunks, numbers, strict=True)]


@lru_cache(maxsize=32)
def _order(seed: int, lap: int, count: int) -> NDArray[np.int64]:
    """A shuffled pass, chunk by chunk, so that a batch needs one or two of them."""
    rng = np.random.default_rng([seed, lap])
    parts = [rng.permutation(np.arange(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    return np.concatenate([parts[index] for index in rng.permutation(len(parts))])


@lru_cache(maxsize=32)
def _open(stream: Stream, chunk: int) -> tuple[NDArray[np.uint8], list[Facts]]:
    path = stream.path(chunk)
    stream.folder.mkdir(parents=True, exist_ok=True)
    stream.render(chunk)
    facts: list[Facts] = pickle.loads(path.read_bytes())
    return np.load(path.with_suffix(".npy"), mmap_mode="r"), facts


def render_ahead(streams: Sequence[Stream], done: Callable[[int], None] = lambda samples: None) -> None:
    """Render what is missing, the first chunk of every stream before the second of any."""
    most = max(-(-stream.different // CHUNK) for stream in streams)
    for chunk in range(most):
        for stream in streams:
            if chunk * CHUNK < stream.different:
                stream.folder.mkdir(parents=True, exist_ok=True)
                stream.render(chunk)
                done(min(CHUNK, stream.different - chunk * CHUNK))
