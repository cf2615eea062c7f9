"""VisionZip's tokens, one crop and one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.methods.visionzip.contextual import add_mean, dominant_and_targets
from vtc.ops.nearest import means, nearest, nearest_target, streamed
from vtc.testing.plain import OpCase, Size


def plain_dominant_and_targets(
    score: Tensor, dominant: Tensor, contextual: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sort by falling score; then walk through the rest with the step."""
    best, target = torch.zeros_like(mask), torch.zeros_like(mask)
    for crop in range(len(score)):
        row = score[crop].tolist()
        real = [j for j, there in enumerate(mask[crop].tolist()) if there]
        first = sorted(real, key=lambda j: (-row[j], j))[: int(dominant[crop])]
        rest = [j for j in real if j not in set(first)]
        count = int(contextual[crop])
        step = max(1, len(rest) // max(1, count))
        best[crop, first] = True
        target[crop, rest[::step][:count]] = True
    return best, target


def plain_nearest(x: Tensor, others: Tensor, there: Tensor, block: int = 0) -> Tensor:
    """As `vtc.ops.nearest.nearest`, token by token."""
    found = torch.zeros(x.shape[:2], dtype=torch.long)
    for group, row in enumerate(x):
        places = [place for place in range(others.shape[1]) if there[group, place]]
        for token, own in enumerate(row):
            cosines = {place: float(torch.cosine_similarity(own, others[group, place], dim=0)) for place in places}
            if cosines:
                found[group, token] = max(places, key=lambda place: (round(cosines[place], 6), -place))
    return found


def plain_streamed(
    x: Tensor, others: Tensor, there: Tensor, read: Callable[[Tensor, Tensor], Tensor], block: int = 0
) -> Tensor:
    """All products at once."""
    return read(x.float(), (x.float() @ others.transpose(1, 2)).masked_fill(~there[:, None], -torch.inf))


def highest_arguments(size: Size) -> dict[str, Any]:
    return {**other_arguments(size), "read": lambda _, products: products.amax(2), "block": 100}


def plain_nearest_target(metric: Tensor, target: Tensor, left: Tensor, most: int, block: int = 0) -> Tensor:
    """Compare every token with every target of its crop."""
    into = torch.full(target.shape, -1, dtype=torch.long)
    for crop in range(len(metric)):
        unit = metric[crop].float() / metric[crop].float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        targets = [j for j, there in enumerate(target[crop].tolist()) if there]
        for j in (j for j, there in enumerate(left[crop].tolist()) if there and targets):
            cosine = (unit[targets] @ unit[j]).tolist()
            into[crop, j] = j if j in targets else targets[max(range(len(targets)), key=lambda t: (cosine[t], -t))]
    return into


def plain_means(x: Tensor, into: Tensor) -> Tensor:
    """Collect what goes to each token."""
    found = torch.zeros_like(x)
    for crop, goes in enumerate(into.tolist()):
        for place in set(goes) - {-1}:
            found[crop, place] = x[crop, [j for j, each in enumerate(goes) if each == place]].double().mean(0)
    return found


def plain_add_mean(tokens: Tensor, into: Tensor, kept: Tensor) -> Tensor:
    """x_t + mean of the assigned, the kept ones first."""
    found = tokens.clone()
    for crop in range(len(tokens)):
        goes = into[crop].tolist()
        marks = kept[crop].tolist()
        members: dict[int, list[int]] = {}
        for j, t in enumerate(goes):
            if t >= 0 and not marks[j]:
                members.setdefault(t, []).append(j)
        for t, given in members.items():
            mean = sum(tokens[crop, j].double() for j in given) / len(given)
            found[crop, t] = (tokens[crop, t].double() + mean).to(tokens.dtype)
        found[crop] = found[crop, sorted(range(len(marks)), key=lambda j: not marks[j])]
    return found


# --- arguments
def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choice_arguments(size: Size) -> dict[str, Any]:
    """Scores with ties, crops of several lengths, from no token kept to all."""
    crops, length = (7, 13) if size == "small" else (200, 576)
    score = (random(crops, length) * 3).round()
    mask = torch.arange(length) < torch.tensor([length - i % 4 for i in range(crops)])[:, None]
    keep = torch.linspace(0, 1, crops) * mask.sum(1)
    dominant = (keep * 0.8).long()
    return {"score": score, "dominant": dominant, "contextual": keep.long() - dominant, "mask": mask}


def target_arguments(size: Size) -> dict[str, Any]:
    given = choice_arguments(size)
    given = {name: value[: 7 if size == "small" else 64] for name, value in given.items()}
    best, target = dominant_and_targets(**given)
    most = int(target.sum(1).max())
    metric = random(*target.shape, 5 if size == "small" else 64)
    return {"metric": metric, "target": target, "left": given["mask"] & ~best, "most": most} | (
        {"block": 7 * most * 3} if size == "small" else {}
    )


def other_arguments(size: Size) -> dict[str, Any]:
    given = target_arguments(size)
    return {
        "x": given["metric"],
        "others": random(*given["metric"].shape, seed=2)[:, : given["most"]],
        "there": given["left"][:, : given["most"]],
    }


def sum_arguments(size: Size) -> dict[str, Any]:
    given = target_arguments(size)
    tokens = random(*given["metric"].shape, seed=1)
    return {
        "tokens": tokens,
        "into": nearest_target(**given),
        "kept": given["target"],
    }


def mean_arguments(size: Size) -> dict[str, Any]:
    given = sum_arguments(size)
    return {"x": given["tokens"], "into": given["into"]}


CASES = (
    OpCase(dominant_and_targets, plain_dominant_and_targets, choice_arguments),
    OpCase(nearest, plain_nearest, other_arguments),
    OpCase(streamed, plain_streamed, highest_arguments, 1e-6),
    OpCase(nearest_target, plain_nearest_target, target_arguments),
    OpCase(means, plain_means, mean_arguments, 1e-6),
    OpCase(add_mean, plain_add_mean, sum_arguments, 1e-6),
)
