"""What the frozen tower makes of pictures, computed once and kept on disk in 16 bits, in chunks.

Files appear under their names only when complete, so that a killed run computes only what is missing.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.eval.tiny.sample import Facts, Task
from vtc.eval.tiny.tasks import TASKS

CHUNK = 50  # pictures, 22 MB
MIX = (TASKS["tiny_image"], TASKS["tiny_detail"])
"""Picture number n is one of task n % 2."""

Encode = Callable[[list[NDArray[np.uint8]]], Tensor]
"""Pictures (H, W, 3) to features (B, T, C)."""


@dataclass(frozen=True, eq=False)
class Features:
    """Pictures 0, 1, ... of a split as the projector reads them, with what is true about them."""

    folder: Path
    split: str
    encode: Encode

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, list[tuple[Task, Facts]]]:
        """Features (B, T, C) in fp16, and task and facts of each picture."""
        found = [(number, *self._chunk(number // CHUNK)) for number in numbers]
        rows = np.stack([features[number % CHUNK] for number, features, _ in found])
        facts = [(MIX[number % len(MIX)], known[number % CHUNK]) for number, _, known in found]
        return torch.from_numpy(rows), facts

    def _chunk(self, chunk: int) -> tuple[NDArray[np.float16], list[Facts]]:
        path = self.folder / f"{self.split}-{chunk:05d}.facts"
        if not path.exists():
            self._compute(chunk, path)
        return _open(path)

    def _compute(self, chunk: int, path: Path) -> None:
        numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        samples = [MIX[number % len(MIX)].make(number // len(MIX), self.split) for number in numbers]
        features = self.encode([sample.pictures[0] for sample in samples])
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            np.save(file, features.half().cpu().numpy())
        os.replace(partial, path.with_suffix(".npy"))
        partial.write_bytes(pickle.dumps([sample.facts for sample in samples]))
        os.replace(partial, path)


@lru_cache(maxsize=512)
def _open(path: Path) -> tuple[NDArray[np.float16], list[Facts]]:
    facts: list[Facts] = pickle.loads(path.read_bytes())
    return np.load(path.with_suffix(".npy"), mmap_mode="r"), facts


def encoder(model: Any, image_processor: Any, batch: int = 10) -> Encode:
    """Runs a LLaVA's tower on pictures, without gradients, and takes the rows its projector reads."""
    device = model.device

    @torch.no_grad()
    def encode(pictures: list[NDArray[np.uint8]]) -> Tensor:
        parts = []
        for start in range(0, len(pictures), batch):
            tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures[start : start + batch]]
            pixels = image_processor(tensors, return_tensors="pt")["pixel_values"].to(device, model.dtype)
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            parts.append(hidden[model.config.vision_feature_layer][:, 1:])
        return torch.cat(parts)

    return encode
