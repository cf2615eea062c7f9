"""Contrastive training of `tiny-clip` on scenes and captions made from their facts.

The first blocks of the image tower come from another model and stay as they are, so every scene passes them once.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vtc.eval.tiny import clip, loop, record
from vtc.eval.tiny.batches import normalise, scene_numbers
from vtc.eval.tiny.cache import SceneCache, render_scenes
from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.captions import Caption, complete, facts, placed, random_caption
from vtc.eval.tiny.clip import SIZES
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.settings import Stage, check

VALIDATION_SCENES = 256
PASSED = 32  # scenes at once
MAX_SCALE = math.log(100)


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides the weights; the defaults are the recipe of the embedded model."""

    steps_joint: int = 250
    blocks_kept: int = 5  # first blocks of the image tower that stay as they are, and what is in front of them
    batch_size: int = 32
    captions: int = 2  # per scene and step
    seed: int = 0
    scenes: int = 2_000
    start: str = "tiny-llava"  # embedded model, or folder, whose CLIP tower comes first; fresh if empty
    weight_decay: float = 0.01
    clip: float = 2.0
    sizes: tuple[tuple[str, int], ...] = tuple(SIZES.items())

    def __post_init__(self) -> None:
        check(self, "steps_joint", "batch_size", "captions", "scenes")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Everything but the blocks that are kept."""
        return (Stage("joint", self.steps_joint, rate=2e-3, warmup=20, floor=0.02, language=True),)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and records."""
        plain = asdict(self) | {"sizes": dict(self.sizes)}
        return plain | {"stages": [asdict(stage) for stage in self.stages]}


@dataclass(frozen=True)
class ClipBatch:
    """What scenes are behind the kept blocks (B, 145, width), token numbers (N, CONTEXT), and which captions are true
    of which scenes, (B, N).
    """

    hidden: Tensor
    ids: Tensor
    true: Tensor


@dataclass(frozen=True)
class Passed:
    """Scenes behind the kept blocks: hidden states [scenes, 145, width] in float16 in a file, and their items."""

    hidden: NDArray[np.float16]
    items: list[tuple[Item, ...]]

    @classmethod
    @torch.no_grad()
    def create(cls, scenes: SceneCache, model: Any, kept: int, out: Path) -> Passed:
        """Pass the scenes through, or open the file of the same weights and scenes that a killed run left."""
        visual = model.visual
        front = {name: each for name, each in visual.state_dict().items() if clip.before_block(name, kept)}
        digest = hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in front.values()))
        digest.update(repr(scenes.items).encode())
        path = out / f"hidden-{digest.hexdigest()[:12]}.npy"
        if not path.exists():
            numbers = range(len(scenes))
            parts = [
                clip.to_block(visual, normalise(scenes.pixels(part)).to(model.logit_scale.device), kept).half().cpu()
                for start in range(0, len(scenes), PASSED)
                if (part := numbers[start : start + PASSED])
            ]
            partial = path.with_suffix(".part")
            with partial.open("wb") as file:
                np.save(file, torch.cat(parts).numpy())
            os.replace(partial, path)
        return cls(np.load(path, mmap_mode="r"), scenes.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class ClipTrainer:
    """Model and scenes of a run on one device."""

    settings: ClipRecipe
    out: Path
    device: torch.device
    scenes: Passed
    held_out: Passed
    model: Any
    words: Any

    @classmethod
    def create(cls, recipe: ClipRecipe, out: Path, device: torch.device, scenes: SceneCache) -> ClipTrainer:
        """Fresh weights from the seed of the recipe, but for those that its start gives."""
        torch.manual_seed(recipe.seed)
        model = clip.build(dict(recipe.sizes))
        if recipe.start:
            clip.take_over_tower(model, recipe.start)
        model = model.to(device).train()
        held_out = render_scenes(out / "scenes", "check", min(VALIDATION_SCENES, recipe.scenes), 0)
        passed, checked = (Passed.create(each, model, recipe.blocks_kept, out) for each in (scenes, held_out))
        return cls(recipe, out, device, passed, checked, model, clip.tokenizer())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"model": self.model}

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates; those that it leaves alone get no gradients."""
        blocks = tuple(f"visual.transformer.resblocks.{number}." for number in range(self.settings.blocks_kept))
        still = ("visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre", *blocks)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(still))
        return [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]

    def batch(self, index: int, step: int) -> ClipBatch:
        """Batch of a step of a stage: one caption that names everything, then random ones."""
        size, before = self.settings.batch_size, sum(stage.steps for stage in self.settings.stages[:index])
        numbers = scene_numbers(self.settings.seed, (before + step) * size, size, len(self.scenes))
        rng = random.Random(f"{self.settings.seed} {index} {step}")
        captions = []
        for number in numbers:
            items = self.scenes.items[number]
            first = complete(items, rng) if rng.random() < 0.5 else placed(items, rng)
            captions += [first, *(random_caption(items, rng) for _ in range(self.settings.captions - 1))]
        return self.make(self.scenes, numbers, captions)

    def make(self, cache: Passed, numbers: Sequence[int], captions: Sequence[Caption]) -> ClipBatch:
        """Scenes of these numbers with any captions."""
        known = [facts(cache.items[number]) for number in numbers]
        true = torch.tensor([[caption.claims <= each for caption in captions] for each in known])
        ids = clip.tokens([caption.text for caption in captions], self.words)
        hidden = torch.from_numpy(cache.hidden[list(numbers)]).float()
        return ClipBatch(hidden.to(self.device), ids.to(self.device), true.to(self.device))

    def losses(self, batch: ClipBatch, stage: Stage) -> dict[str, Tensor]:
        """Cross entropies with all captions true of a scene, and all scenes that a caption is true of, as answers."""
        with loop.mixed(self.device):
            images, texts = self._features(batch)
        scale = self.model.logit_scale.clamp(max=MAX_SCALE).exp()
        logits = scale * images.float() @ texts.float().T
        return {"to text": _answers(logits, batch.true), "to image": _answers(logits.T, batch.true.T)}

    def total(self, losses: dict[str, Tensor], stage: Stage) -> Tensor:
        """Mean of both directions."""
        return (losses["to text"] + losses["to image"]) / 2

    def _features(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        images = clip.from_block(self.model.visual, batch.hidden, self.settings.blocks_kept)
        texts = clip.encode_texts(self.model, batch.ids)
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    @torch.no_grad()
    def measure(self, stage: Stage) -> dict[str, float]:
        """Share of held-out scenes, and of complete captions, whose nearest neighbour fits."""
        numbers = list(range(len(self.held_out)))
        captions = [complete(self.held_out.items[number], random.Random(number)) for number in numbers]
        images, texts = [], []
        for start in range(0, len(numbers), self.settings.batch_size):
            part = slice(start, start + self.settings.batch_size)
            batch = self.make(self.held_out, numbers[part], captions[part])
            features = self._features(batch)
            images.append(features[0])
            texts.append(features[1])
        near = torch.cat(images) @ torch.cat(texts).T
        true = torch.tensor([[c.claims <= facts(self.held_out.items[n]) for c in captions] for n in numbers])
        true = true.to(near.device)
        return {
            "to text": float(true.gather(1, near.argmax(1, keepdim=True)).float().mean()),
            "to image": float(true.gather(0, near.argmax(0, keepdim=True)).float().mean()),
        }


def _answers(logits: Tensor, true: Tensor) -> Tensor:
    """Mean cross entropy of rows whose right answers are all that `true` marks, in equal shares."""
    share = true / true.sum(1, keepdim=True)
    return -(share * F.log_softmax(logits, dim=1)).sum(1).mean()


def train_clip(
    out: Path,
    recipe: ClipRecipe | None = None,
    device: str = "auto",
    threads: int = 0,
    workers: int | None = None,
    save_every: int = 50,
    on_step: loop.StepHook = lambda stage, step: None,
) -> Path:
    """Train tiny-clip into `out`, or go on with the run that `out` holds; returns the exported folder `out/model`.

    The parameters are those of `train.train`.
    """
    recipe = recipe or ClipRecipe()
    chosen = loop.pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        count = torch.get_num_threads() if workers is None else workers
        scenes = render_scenes(out / "scenes", "train", recipe.scenes, count, reporter.rendering(recipe.scenes))
        trainer = ClipTrainer.create(recipe, out, chosen, scenes)
        seconds = loop.run(trainer, reporter, save_every, on_step, log_every=20)
    folder = out / "model"
    clip.export(trainer.model, dict(recipe.sizes), folder)
    record.write(folder, recipe.as_dict(), seconds, chosen.type)
    return folder
