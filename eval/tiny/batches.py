"""Training batches. Every random choice is a function of (seed, stage, step), so a resumed run draws the same ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.eval.tiny.cache import SceneCache
from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.packing import pack

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Batch:
    """Pixels (B, 3, 168, 168), patch targets (B, 5, 144), presence (B, 64), packed ids and labels (B, TEXT_TOKENS)."""

    pixels: Tensor
    targets: Tensor
    present: Tensor
    ids: Tensor
    labels: Tensor
    families: list[list[str]]


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """uint8 pictures (B, H, W, 3) to CLIP-normalised float32 (B, 3, H, W)."""
    scaled = torch.from_numpy(images).float() / 255
    return ((scaled - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, scenes: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(scenes)


def scene_numbers(seed: int, start: int, count: int, scenes: int) -> list[int]:
    """Entries start..start+count-1 of an endless series of shuffled passes over the scenes, sorted."""
    return sorted(int(_order(seed, at // scenes, scenes)[at % scenes]) for at in range(start, start + count))


def questions(items: Sequence[Sequence[Item]], rng: random.Random) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Packed ids and labels, (B, TEXT_TOKENS) each, and the families asked."""
    packed = [pack(scene, rng) for scene in items]
    ids = torch.tensor([text.ids for text in packed])
    return ids, torch.tensor([text.labels for text in packed]), [text.families for text in packed]


def make_batch(cache: SceneCache, numbers: Sequence[int], rng: random.Random, device: torch.device) -> Batch:
    """The scenes of these numbers with one random packed text each."""
    targets, present = cache.targets(numbers)
    ids, labels, families = questions([cache.items[number] for number in numbers], rng)
    return Batch(
        normalise(cache.pixels(numbers)).to(device),
        torch.from_numpy(targets).to(device),
        torch.from_numpy(present).to(device),
        ids.to(device),
        labels.to(device),
        families,
    )
