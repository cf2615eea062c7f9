"""Which batches a mixture of tasks is made of, one task and one geometry each, and the model's states on them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError
from vtc.eval.tiny import sequence
from vtc.eval.tiny.family import Family
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.sample import Task
from vtc.eval.tiny.stream import Stream
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.vocabulary import IMAGE, TOKEN, VIDEO


def mixed(recipe: Recipe) -> list[tuple[Task, float]]:
    """The tasks that a recipe mixes and its model can read, with their shares of the batches.

    Raises:
        InputError: the model reads none of them.
    """
    media = recipe.family().media
    found = [(TASKS[name], share) for name, share in recipe.shares if share > 0 and TASKS[name].media in media]
    if not found:
        names = ", ".join(dict(recipe.shares))
        raise InputError(f"{recipe.model} reads {', '.join(media)} and none of {names}: give another task a share")
    return found


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

    targets: classes of the cells, (views, 5, cells). present: what the views hold, (views, PRESENCE_BITS). places:
    where visual tokens of clips show an actor, (B, n, 2), and clues: what answers follow from, (B, T, 4), both as in
    `vtc.eval.tiny.places`. prefix: the prompt up to the question, (1, P). ids, labels: packed questions with answers,
    (B, T).
    """

    task: Task
    inputs: dict[str, Tensor]
    targets: Tensor
    present: Tensor
    places: Tensor | None
    clues: Tensor
    prefix: Tensor
    ids: Tensor
    labels: Tensor
    families: list[list[str]]


def visual_places(ids: Tensor) -> Tensor:
    """Where ids stand for visual tokens."""
    return (ids == TOKEN[IMAGE]) | (ids == TOKEN[VIDEO])


def packed_hidden(family: Family, model: Any, batch: MixedBatch, tokens: Tensor) -> Tensor:
    """Last hidden states of the packed text behind the visual tokens, (B, T, hidden)."""
    size, prefix = len(batch.ids), batch.prefix.shape[1]
    ids = torch.cat([batch.prefix.expand(size, -1), batch.ids], dim=1)
    embedded = model.get_input_embeddings()(ids).to(tokens.dtype)
    embedded = embedded.masked_scatter(visual_places(ids).unsqueeze(-1), tokens)
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
