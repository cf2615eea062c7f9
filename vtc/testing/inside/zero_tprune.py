"""Zero-TPrune, one head and token at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtc.methods.zero_tprune import ZeroTPrune
from vtc.testing.encoders import BLOCKS, PATCHES, Act, Seen
from vtc.testing.inside import InsideCase
from vtc.testing.inside.groups import cosine


def page_rank(query: Tensor, key: Tensor, rounds: int, lead: int, variance: tuple[float, float]) -> list[float]:
    """Importance of the patches from queries and keys [T, H, d] of the tokens that are there."""
    count, heads, width = query.shape
    scores = []
    for head in range(heads):
        s = [1 / count] * count
        if lead:
            s[0] = math.sqrt(count) / count
        rows = [(query[i, head] @ key[:, head].T / math.sqrt(width)).softmax(-1).tolist() for i in range(count)]
        for _ in range(rounds):
            s = [sum(rows[i][j] * s[i] for i in range(count)) for j in range(count)]
        scores.append(s[lead:])

    def spread(s: list[float]) -> float:
        scaled = [count * each for each in s]
        mean = sum(scaled) / len(scaled)
        return sum((each - mean) ** 2 for each in scaled) / len(scaled)

    passed = [s for s in scores if variance[0] <= spread(s) <= variance[1]] or scores
    return [math.sqrt(sum(s[n] ** 2 for s in passed) / len(passed)) for n in range(count - lead)]


def prune(seen: Seen, lead: int, similar: int, little: int, rounds: int, variance: tuple[float, float]) -> list[int]:
    """The patches that stay, of those in front of a pruning layer."""
    given = page_rank(seen.query, seen.key, rounds, lead, variance)
    order = sorted(range(len(given)), key=lambda n: (-given[n], n))
    half = (len(given) + 1) // 2
    important, others = order[:half], order[half:]
    keys = seen.key[lead:].mean(1)
    others.sort(key=lambda n: (-max(cosine(keys[n], keys[b]) for b in important), n))
    left = sorted(set(range(len(given))) - set(others[:similar]))
    rows = torch.tensor([*range(lead), *(lead + n for n in left)])
    again = page_rank(seen.query[rows], seen.key[rows], rounds, lead, variance)
    ranks = sorted(range(len(left)), key=lambda n: (-again[n], n))
    return sorted(left[n] for n in ranks[: len(left) - little])


def plain(method: ZeroTPrune, image: Tensor, lead: int, keep: int | None) -> Act:
    """In front of the second and third of three blocks."""
    plan = dict(zip((1, 2), method.leaving(PATCHES, keep or 0, 2), strict=True))

    def act(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        if layer not in plan or seen is None:
            return rows, None
        rounds = method.iterations[3 * (layer - 1) // BLOCKS]
        left = prune(seen, lead, *plan[layer], rounds, method.variance)
        return torch.cat([rows[:lead], rows[lead:][left]]), None

    return act


QUICK = {"similar": 2, "iterations": (7, 4, 1)}
FEW_HEADS, NO_HEAD = {"variance": (0.2, 0.4)}, {"variance": (50.0, 60.0)}
CASE = InsideCase(plain, ({}, QUICK, {**QUICK, **FEW_HEADS}, {**QUICK, **NO_HEAD}))
