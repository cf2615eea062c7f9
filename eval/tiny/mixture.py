"""Batches of a mixture of tasks, one task and one geometry each, and the model's losses on them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.eval.tiny import sequence
from vtc.eval.tiny.family import Family, Seen, media_inputs, prefix_ids
from vtc.eval.tiny.model import TRAINING_ATTENTION
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.sample import Facts, Task, pack
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.stream import Stream
from vtc.eval.tiny.targets import PATCH_CLASSES, PRESENCE_BITS, cell_targets, legible_items, presence
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.vocabulary import END, TOKEN

CHECKED = 96  # validation samples of every task


def mixed(recipe: Recipe) -> list[tuple[Task, float]]:
    """The tasks that a recipe mixes and its model can read, with their shares of the batches."""
    media = recipe.family().media
    return [(TASKS[name], share) for name, share in recipe.shares if share > 0 and TASKS[name].media in media]


def streams(recipe: Recipe, folder: Path, split: str = "train") -> list[Stream]:
    """All series of these tasks."""
    return [
        Stream(task, geometry, split, folder, max(1, recipe.different // task.geometries))
        for task, _ in mixed(recipe)
        for geometry in range(task.geometries)
    ]


def plan(recipe: Recipe, count: int) -> list[tuple[int, int]]:
    """Which of the `streams` each of the first `count` batches comes from, and with which of its entries it starts."""
    rng = random.Random(recipe.seed)
    tasks, shares = zip(*mixed(recipe), strict=True)
    first = [sum(task.geometries for task in tasks[:index]) for index in range(len(tasks))]
    used: Counter[int] = Counter()
    batches = []
    for _ in range(count):
        (index,) = rng.choices(range(len(tasks)), shares)
        chosen = first[index] + rng.randrange(tasks[index].geometries)
        batches.append((chosen, used[chosen]))
        used[chosen] += recipe.batch_size
    return batches


@dataclass(frozen=True)
class MixedBatch:
    """Inputs of the tower and of the language model for B samples of one geometry.

    targets: classes of the cells, (views, 5, cells). present: what the views hold, (views, PRESENCE_BITS). prefix: the
    prompt up to the question, (1, P). ids, labels: packed questions with answers, (B, T).
    """

    task: Task
    inputs: dict[str, Tensor]
    targets: Tensor
    present: Tensor
    prefix: Tensor
    ids: Tensor
    labels: Tensor
    families: list[list[str]]


class CellHeads(nn.Module):
    """Linear read-outs of the tower that exist in training only: content, row and column of every cell of a view.

    Class tokens are asked for what the view holds, which makes their attention point at things.
    `grid` is the number of cells per side of a view, 0 for a tower without absolute positions, which is not asked for
    rows and columns.
    """

    def __init__(self, width: int, grid: int, class_width: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.presence = nn.Linear(class_width, PRESENCE_BITS) if class_width else None
        self.content = nn.Linear(width, sum(PATCH_CLASSES.values()))
        self.place = nn.Linear(width, 2 * grid) if grid else None

    def forward(self, seen: Seen, targets: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Losses "content", for a tower that knows positions "place", for one with class tokens "presence".

        `targets` (V, 5, n) and `present` (V, PRESENCE_BITS) say what the views hold.
        """
        losses = {"content": self._content_loss(seen.cells, targets)}
        if self.place is not None:
            losses["place"] = self._place_loss(self.place(seen.cells), targets)
        if self.presence is not None:
            logits = self.presence(seen.classes).float()
            losses["presence"] = 10 * F.binary_cross_entropy_with_logits(logits, present.float())
        return losses

    def content_logits(self, cells: Tensor) -> tuple[Tensor, ...]:
        """One (V, n, classes) tensor per entry of `PATCH_CLASSES`."""
        return tuple(torch.split(self.content(cells).float(), list(PATCH_CLASSES.values()), dim=-1))

    def _content_loss(self, cells: Tensor, targets: Tensor) -> Tensor:
        """Half mean over all cells, half mean over those that hold something, summed over the kinds of content."""
        total = cells.new_zeros((), dtype=torch.float32)
        for index, logits in enumerate(self.content_logits(cells)):
            target = targets[:, index].long()
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            filled = target > 0
            total = total + 0.5 * loss.mean() + 0.5 * (loss * filled).sum() / filled.sum().clamp_min(1)
        return total

    def _place_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Row and column, mostly of cells that hold something or its centre."""
        logits = logits.float().transpose(1, 2)
        number = torch.arange(self.grid**2, device=logits.device).expand(len(logits), -1)
        row = F.cross_entropy(logits[:, : self.grid], number // self.grid, reduction="none")
        column = F.cross_entropy(logits[:, self.grid :], number % self.grid, reduction="none")
        filled, centre = targets[:, 0] > 0, targets[:, 4] > 0
        weight = 0.2 / number.numel() + filled / filled.sum().clamp_min(1) + centre / centre.sum().clamp_min(1)
        return 0.5 * (weight * (row + column)).sum()


def packed_hidden(family: Family, model: Any, batch: MixedBatch, tokens: Tensor) -> Tensor:
    """Last hidden states of the packed text behind the visual tokens, (B, T, hidden)."""
    size, prefix = len(batch.ids), batch.prefix.shape[1]
    ids = torch.cat([batch.prefix.expand(size, -1), batch.ids], dim=1)
    embedded = model.get_input_embeddings()(ids).to(tokens.dtype)
    visual = ((ids == TOKEN["<image>"]) | (ids == TOKEN["<video>"])).unsqueeze(-1)
    embedded = embedded.masked_scatter(visual, tokens)
    lengths = tuple(length for _, length in batch.task.slots)
    places = family.positions(model, batch.prefix, batch.task.media, batch.inputs, sequence.offsets(lengths))
    mask = sequence.additive_mask(prefix, lengths, tokens.dtype, ids.device)
    output = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=mask.expand(size, -1, -1, -1),
        position_ids=places.to(ids.device).expand(*places.shape[:-2], size, -1),
        use_cache=False,
        prefix=prefix,
    )
    hidden: Tensor = output.last_hidden_state[:, prefix:]
    return hidden


@dataclass
class MixTrainer:
    """Model, auxiliary heads and data of a run on one device."""

    settings: Recipe
    out: Path
    device: torch.device
    family: Family
    processor: Any
    model: Any
    heads: CellHeads
    series: list[Stream]
    batches: list[tuple[int, int]]
    prefixes: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def create(cls, recipe: Recipe, out: Path, device: torch.device) -> MixTrainer:
        """Fresh weights from the seed of the recipe."""
        torch.manual_seed(recipe.seed)
        family = recipe.family()
        model = family.build(TRAINING_ATTENTION).to(device).train()
        family.speed_up(model)
        heads = CellHeads(family.width, family.grid, family.hidden if family.has_classes else 0).to(device)
        batches = plan(recipe, sum(stage.steps for stage in recipe.stages))
        series = streams(recipe, out / "samples")
        return cls(recipe, out, device, family, family.processor(), model, heads, series, batches)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"model": self.model, "heads": self.heads}

    def compile(self) -> None:
        """Compile the layers of tower and language model, for any length of the sequence."""
        torch._dynamo.config.recompile_limit = 64  # graphs of one layer: kinds of layers, with and without gradients
        for layer in (*self.family.layers(self.model), *self.model.model.language_model.layers):
            layer.compile(dynamic=True)

    def exported(self) -> Any:
        """A copy of the model without anything of the training."""
        model = self.family.build("sdpa")
        model.load_state_dict(self.model.state_dict())
        return model

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates."""
        source = self.model if stage.language else self.family.tower(self.model)
        return [*source.named_parameters(), *((f"heads.{n}", p) for n, p in self.heads.named_parameters())]

    def batch(self, index: int, step: int) -> MixedBatch:
        """Batch of a step of a stage."""
        at = step + sum(stage.steps for stage in self.settings.stages[:index])
        chosen, start = self.batches[at]
        stream = self.series[chosen]
        numbers = [stream.number(start + n, self.settings.seed) for n in range(self.settings.batch_size)]
        return self.make(stream, numbers, random.Random(f"{self.settings.seed} {at}"))

    def make(self, stream: Stream, numbers: Sequence[int], rng: random.Random) -> MixedBatch:
        """These samples of a series with one random packed text each."""
        task = stream.task
        pictures, facts = stream.read(numbers)
        packed = [pack(task, known, rng) for known in facts]
        key = (task.name, stream.geometry)
        if key not in self.prefixes:
            self.prefixes[key] = prefix_ids(self.processor, task.media, pictures[0]).to(self.device)
        inputs = media_inputs(self.processor, task.media, pictures)
        targets, present = self._targets(task, facts)
        return MixedBatch(
            task,
            {name: value.to(self.device) for name, value in inputs.items()},
            targets.to(self.device),
            present.to(self.device),
            self.prefixes[key],
            torch.tensor([text.ids for text in packed], device=self.device),
            torch.tensor([text.labels for text in packed], device=self.device),
            [text.families for text in packed],
        )

    def _targets(self, task: Task, facts: Sequence[Facts]) -> tuple[Tensor, Tensor]:
        cells, present = [], []
        for known in facts:
            for view in self.family.views(task.media, len(known.pictures), known.size):
                items = [item for number in view.pictures for item in known.pictures[number]]
                cells.append(cell_targets(items, view.box, view.rows, view.columns))
                present.append(presence(legible_items(items, view.box, view.rows, view.columns)))
        return torch.from_numpy(np.stack(cells)), torch.from_numpy(np.stack(present))

    def losses(self, batch: MixedBatch, stage: Stage) -> dict[str, Tensor]:
        """Unweighted losses of one batch."""
        with torch.autocast(self.device.type, torch.bfloat16):
            seen = self.family.see(self.model, batch.task.media, batch.inputs)
            losses: dict[str, Tensor] = self.heads(seen, batch.targets, batch.present)
            if stage.language:
                hidden = packed_hidden(self.family, self.model, batch, seen.tokens)
                answer = self._answer_loss(hidden, batch.labels)
                losses |= {"answer": answer, batch.task.name: answer.detach()}
        return losses

    def _answer_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the answers, plus a little of the end tokens behind those of one word."""
        asked = labels != IGNORED
        loss = F.cross_entropy(self.model.lm_head(hidden[asked]).float(), labels[asked], reduction="none")
        one_word = (labels == TOKEN[END]) & (labels.roll(2, dims=1) == IGNORED)
        weight = torch.where(one_word[asked], self.settings.end_weight, 1.0)
        return (loss * weight).sum() / weight.sum()

    def total(self, losses: dict[str, Tensor], stage: Stage) -> Tensor:
        """Weighted sum to minimise."""
        auxiliary = losses["content"] + losses.get("place", 0.0) + losses.get("presence", 0.0)
        if not stage.language:
            return auxiliary
        return self.settings.language_weight * losses["answer"] + self.settings.auxiliary_weight * auxiliary


def slot_hits(batch: MixedBatch, logits: Tensor) -> Iterator[tuple[str, int, int]]:
    """Family, right answers and answers of every slot; of a list its words, given those before, count one by one."""
    asked = (batch.labels != IGNORED) & (batch.labels != TOKEN[END])
    right = (logits.argmax(-1) == batch.labels) & asked
    lengths = [length for _, length in batch.task.slots]
    good = torch.stack([part.sum(1) for part in torch.split(right, lengths, 1)], 1).tolist()
    every = torch.stack([part.sum(1) for part in torch.split(asked, lengths, 1)], 1).tolist()
    for names, hits, totals in zip(batch.families, good, every, strict=True):
        for name, hit, number in zip(names, hits, totals, strict=True):
            if name:
                yield f"{batch.task.name.removeprefix('tiny_')}/{name}", hit, number


@dataclass(frozen=True)
class MixValidation:
    """Held-out samples of every task with a fixed random text each."""

    series: list[Stream]

    @classmethod
    def create(cls, recipe: Recipe, folder: Path) -> MixValidation:
        """The first samples of the split "check"."""
        count = min(CHECKED, recipe.different)
        made = streams(recipe, folder, "check")
        return cls([replace(stream, different=max(1, count // stream.task.geometries)) for stream in made])

    @torch.no_grad()
    def measure(self, trainer: MixTrainer, stage: Stage) -> dict[str, float]:
        """Accuracy per kind of cell content, and per task and family where the stage trains the language model."""
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for stream in self.series:
            size = 32
            for start in range(0, stream.different, size):
                numbers = range(start, min(start + size, stream.different))
                batch = trainer.make(stream, numbers, random.Random(start))
                with torch.autocast(trainer.device.type, torch.bfloat16):
                    seen = trainer.family.see(trainer.model, batch.task.media, batch.inputs)
                    for index, (name, logits) in enumerate(
                        zip(PATCH_CLASSES, trainer.heads.content_logits(seen.cells), strict=True)
                    ):
                        filled = batch.targets[:, index] > 0
                        right[f"cell {name}"] += int(((logits.argmax(-1) == batch.targets[:, index]) & filled).sum())
                        total[f"cell {name}"] += int(filled.sum())
                    if stage.language:
                        hidden = packed_hidden(trainer.family, trainer.model, batch, seen.tokens)
                        for name, good, every in slot_hits(batch, trainer.model.lm_head(hidden)):
                            right[name] += good
                            total[name] += every
        return {name: right[name] / total[name] for name in sorted(total) if total[name]}
