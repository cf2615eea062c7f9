"""DivPrune, CDPruner, ToDRE: choices step by step, on the matrix of all similarities as released."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testing.released import Scene
from vtc.testing.released.ranking import each, tiles


def _like(tokens: Tensor) -> Tensor:
    """[..., N, N] cosines."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    return unit @ unit.transpose(-1, -2)


def _marks(order: list[Tensor], length: int) -> Tensor:
    places = torch.stack(order, 1)
    return torch.zeros(len(places), length, dtype=torch.bool).scatter(1, places, True)


# --- DivPrune
def divprune_batched(scene: Scene) -> Tensor:
    """Farthest first, from the token whose nearest other one is farthest away."""
    distance = 1 - _like(scene.tokens)
    item = torch.arange(scene.items)
    own = distance.diagonal(dim1=1, dim2=2)
    own.fill_(torch.inf)
    order = [distance.amin(2).argmax(1)]
    nearest = torch.full((scene.items, scene.length), torch.inf)
    for _ in range(scene.keep - 1):
        nearest = torch.minimum(nearest, distance[item, order[-1]])
        nearest[item, order[-1]] = -torch.inf
        order.append(nearest.argmax(1))
    return _marks(order, scene.length)


def divprune_loop(scene: Scene) -> Tensor:
    """Every step takes the minimum over all chosen rows again."""
    marks = []
    for tokens in scene.tokens:
        distance = 1 - _like(tokens)
        chosen = torch.empty(scene.keep, dtype=torch.long)
        for step in range(scene.keep):
            if step == 0:
                nearest = distance.topk(2, dim=0, largest=False).values[1]
            else:
                nearest = distance[chosen[:step]].amin(0)
                nearest[chosen[:step]] = -1
            chosen[step] = nearest.argmax()
        marks.append(chosen.sort().values)
    return each(scene, marks)


# --- ToDRE
def todre_batched(scene: Scene) -> Tensor:
    """The lowest sum of cosines to all chosen ones, from the class token's favourite."""
    like, item = _like(scene.tokens), torch.arange(scene.items)
    favourite = scene.values[0]
    if scene.view.items.layouts[0].thumbnail is not None:
        favourite = favourite[:, : scene.length // scene.shape[0]]
    order = [favourite.argmax(1)]
    total = torch.zeros(scene.items, scene.length)
    for _ in range(scene.keep - 1):
        total = total + like[item, order[-1]]
        total[item, order[-1]] = torch.inf
        order.append(total.argmin(1))
    return _marks(order, scene.length)


def todre_loop(scene: Scene) -> Tensor:
    marks = []
    for item, tokens in enumerate(scene.tokens):
        like, favourite = _like(tokens), scene.item(item)[0]
        if scene.view.items.layouts[0].thumbnail is not None:
            favourite = favourite[: scene.length // scene.shape[0]]
        order = [int(favourite.argmax())]
        total = torch.zeros(scene.length)
        for _ in range(scene.keep - 1):
            total += like[order[-1]]
            total[order[-1]] = torch.inf
            order.append(int(total.argmin()))
        marks.append(torch.tensor(order).sort().values)
    return each(scene, marks)


# --- CDPruner
def _kernel(scene: Scene, tokens: Tensor, question: Tensor) -> Tensor:
    """[G, n, n] of tokens [I, C, n, D] and their items' question [I, D]."""
    towards = -torch.nn.functional.normalize(question, dim=-1)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    relevance = (unit @ towards[:, None, :, None])[..., 0].flatten(1)
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    quality = ((relevance - low + 1e-6) / (high - low)).view(tokens.shape[:3]).flatten(0, 1)
    return quality[:, :, None] * _like(tokens).flatten(0, 1) * quality[:, None, :]


def _greedy(kernel: Tensor, keep: int) -> list[Tensor]:
    """The fast greedy mode: a Cholesky row per step."""
    groups, size, _ = kernel.shape
    item, gain = torch.arange(groups), kernel.diagonal(dim1=1, dim2=2).clone()
    rows = torch.zeros(keep, groups, size)
    order: list[Tensor] = []
    for step in range(keep):
        token = gain.argmax(1)
        order.append(token)
        known = torch.einsum("tg,tgn->gn", rows[:step, item, token], rows[:step])
        rows[step] = (kernel[item, token] - known) / gain[item, token].sqrt()[:, None]
        gain = gain - rows[step].square()
        gain[item, token] = -torch.inf
    return order


def cdpruner_batched(scene: Scene) -> Tensor:
    """All crops at once."""
    view = scene.view
    question = (view.hidden * view.text[..., None]).sum(1)[view.items.row]
    kernel = _kernel(scene, tiles(scene, scene.tokens), question)
    order = _greedy(kernel, scene.keep // scene.shape[0])
    return _marks(order, kernel.shape[1]).view(scene.items, -1)


def cdpruner_loop(scene: Scene) -> Tensor:
    """Image after image, its crops together, as released."""
    view, marks = scene.view, []
    for item in range(scene.items):
        row = view.items.rows[item]
        question = view.hidden[row][view.text[row]].mean(0)
        tokens = tiles(scene, scene.tokens)[item : item + 1]
        kernel = _kernel(scene, tokens, question[None])
        order = _greedy(kernel, scene.keep // scene.shape[0])
        marks.append(_marks(order, kernel.shape[1]).flatten())
    return torch.stack(marks)
