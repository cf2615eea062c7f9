"""V2Drop, FitPrune, TransPrune, DART, SparseVLM: choices inside the LLM; the last one returns rows [I, K, D]."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.method.base import Rows
from vtc.testing.released import Scene
from vtc.testing.released.peaks import density_peaks, means
from vtc.testing.released.ranking import best, each

unit = torch.nn.functional.normalize


# --- V2Drop
def v2drop_batched(scene: Scene) -> Tensor:
    """The tokens that the layer before moved furthest."""
    return best((scene.tokens - scene.before.tokens).norm(dim=2), scene.keep)


def v2drop_loop(scene: Scene) -> Tensor:
    moved = [(now - then).norm(dim=1) for now, then in zip(scene.tokens, scene.before.tokens, strict=True)]
    return each(scene, [change.topk(scene.keep).indices.sort().values for change in moved])


# --- FitPrune
def fitprune_batched(scene: Scene) -> Tensor:
    """What both the image and the text attend to, by the product of their sums."""
    own, cross = scene.values[0]
    return best(own * cross, scene.keep)


def fitprune_loop(scene: Scene) -> Tensor:
    sums = (scene.item(item)[0].prod(0) for item in range(scene.items))
    return each(scene, [total.topk(scene.keep).indices.sort().values for total in sums])


# --- TransPrune
def transprune_batched(scene: Scene) -> Tensor:
    """How far the blocks in front moved tokens, and what the text pays to them, as shares of their sums."""
    view, stage = scene.view, scene.view.stage
    assert isinstance(stage, int)
    layers = [layer for layer, reading in view.llm_rows if reading == Rows.TRANSITION and layer < stage]
    moved = torch.stack([view.llm_attention(layer, Rows.TRANSITION) for layer in layers]).sum((0, 1))
    paid = view.llm_attention(stage, Rows.QUESTION_AHEAD)
    return best(moved / moved.sum(1, keepdim=True) + paid / paid.sum(1, keepdim=True), scene.keep)


def transprune_loop(scene: Scene) -> Tensor:
    view, stage, marks = scene.view, scene.view.stage, []
    assert isinstance(stage, int)
    for item in range(scene.items):
        moved = torch.zeros(scene.length)
        for layer in range(scene.method.layers[0] - 1, stage):
            attention, mlp = view.llm_attention(layer, Rows.TRANSITION)[:, item]
            moved += attention + mlp
        paid = view.llm_attention(stage, Rows.QUESTION_AHEAD)[item]
        score = moved / moved.sum() + paid / paid.sum()
        marks.append(score.topk(scene.keep).indices.sort().values)
    return each(scene, marks)


# --- DART
def dart_batched(scene: Scene) -> Tensor:
    """Pivots of largest keys, and for each of them the tokens least like it, until there are as many as asked for."""
    view, item = scene.view, torch.arange(scene.items)[:, None]
    own, text = scene.method.pivots
    first = scene.values[0].topk(own, 1).indices
    (sizes,) = view.llm_rows.values()
    spoken = sizes.masked_fill(~view.text, -1).topk(text, 1).indices
    words = view.hidden[torch.arange(len(spoken))[:, None], spoken][view.items.row]
    like = unit(scene.tokens, dim=2) @ unit(torch.cat([scene.tokens[item, first], words], 1), dim=2).transpose(1, 2)
    kept = torch.zeros(scene.items, scene.length, dtype=torch.bool).scatter(1, first, True)
    left = scene.keep - own
    for pivot in range(own + text):
        share = -(-left // (own + text - pivot))
        kept |= best(like[..., pivot].masked_fill(kept, 2).neg(), share)
        left -= share
    return kept


def dart_loop(scene: Scene) -> Tensor:
    view, marks = scene.view, []
    own, text = scene.method.pivots
    (sizes,) = view.llm_rows.values()
    for item, tokens in enumerate(scene.tokens):
        row = view.items.rows[item]
        first = scene.item(item)[0].topk(own).indices.tolist()
        said = view.text[row].nonzero()[:, 0]
        words = view.hidden[row][said[sizes[row][said].topk(text).indices]]
        kept, pool = list(first), [token for token in range(scene.length) if token not in first]
        for number, pivot in enumerate([*tokens[first], *words]):
            share = -(-(scene.keep - len(kept)) // (own + text - number))
            like = torch.cosine_similarity(tokens[pool], pivot[None])
            taken = set(like.topk(share, largest=False).indices.tolist())
            kept += [token for place, token in enumerate(pool) if place in taken]
            pool = [token for place, token in enumerate(pool) if place not in taken]
        marks.append(torch.tensor(sorted(kept)))
    return each(scene, marks)


# --- SparseVLM
def _shares(scene: Scene) -> tuple[int, int, int]:
    """Tokens that stay, that are recycled, and the groups they become."""
    for dropped in range(scene.length - scene.keep, scene.length):
        recycled = int(scene.method.tau * dropped) + 1
        groups = int(recycled / 10) + 1
        if scene.length - dropped + groups <= scene.keep:
            return scene.length - dropped, recycled, groups
    raise AssertionError("the groups alone are more than may stay")


def _recycled(scene: Scene, tokens: Tensor, score: Tensor) -> Tensor:
    """Rows of what stays of [I, N, D] by scores [I, N]: the best, and the clusters of those behind them."""
    stay, number, groups = _shares(scene)
    order = score.argsort(1, descending=True)
    again = order[:, stay : stay + number].sort(1).values
    rows = tokens.gather(1, again[..., None].expand(-1, -1, tokens.shape[2]))
    centre, into = density_peaks(rows, torch.full((len(rows),), groups), groups)
    merged = means(rows, into)[centre].view(len(rows), groups, -1)
    places = torch.cat([order[:, :stay], again[centre].view(len(rows), -1)], 1)
    kept = tokens.gather(1, order[:, :stay, None].expand(-1, -1, tokens.shape[2]))
    found = torch.cat([kept, merged], 1)
    return found.gather(1, places.argsort(1)[..., None].expand_as(found))


def sparsevlm_batched(scene: Scene) -> Tensor:
    """Raters among the words, by softmax over them; what they attend to stays."""
    row, asks = scene.view.items.row, scene.view.asking
    words = scene.before.hidden.masked_fill(~asks[..., None], 0)[row]
    like = (scene.before.tokens @ words.transpose(1, 2)).masked_fill(~asks[row][:, None], -torch.inf).softmax(2)
    total = torch.zeros(asks.shape).index_add(0, row, like.sum(1))
    rate = asks & (total >= total.sum(1, keepdim=True) / asks.sum(1, keepdim=True))
    order = (~asks).to(torch.uint8).argsort(dim=1, stable=True)[:, : scene.values[0].shape[0]]
    rates = rate.gather(1, order)[row].float()
    score = torch.einsum("tin,it->in", scene.values[0], rates) / rates.sum(1, keepdim=True)
    return _recycled(scene, scene.tokens, score)


def sparsevlm_loop(scene: Scene) -> Tensor:
    found, asks = [], scene.view.asking
    for item, tokens in enumerate(scene.tokens):
        row = scene.view.items.rows[item]
        inside = torch.cat([scene.before.tokens[other] for other, at in enumerate(scene.view.items.rows) if at == row])
        rating = (inside @ scene.before.hidden[row][asks[row]].T).softmax(1).mean(0)
        raters = (rating >= rating.mean()).nonzero()[:, 0]
        score = scene.values[0][raters, item].mean(0)
        found.append(_recycled(scene, tokens[None], score[None]))
    return torch.cat(found)
