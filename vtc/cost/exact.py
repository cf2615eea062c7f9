"""What really runs: vision tower, projector, grouped-query attention, logits, decoding, and what a method adds.

Operations are those of the matrix products and of attention, two per multiply-accumulate, as
`torch.utils.flop_counter` counts them: attention over the whole square, norms and activations left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vtc.cost.roofline import Operator
from vtc.cost.shapes import NOTHING, Encoded, LLMShape, ModelShape, TowerShape
from vtc.cost.token_counts import TokenCounts

Shortened = tuple[tuple[int, float], ...]
"""(layer, rows of each crop from there on, in the mean) of stages inside the tower, in order; one behind the last layer
that is read shortens what is projected."""


@dataclass(frozen=True)
class Work:
    """One prompt. visual: tokens entering each LLM layer, text: beside them. encoded: what the tower runs on.

    shortened: by stages inside the tower. projected: tokens that leave the projector, where stages there changed it;
    projectors of deeper features are taken to see as many.
    cached: visual tokens that the cache holds of each layer after the prefill, `visual` by default. method: operations
    of the compression method. method_weights: that it holds beside the model's. new_tokens: that are generated; the
    prefill yields the first. logits: rows that the prefill computes logits of.
    """

    visual: TokenCounts
    text: float
    encoded: Encoded = NOTHING
    shortened: Shortened = ()
    projected: float | None = None
    cached: TokenCounts | None = None
    method: float = 0
    method_weights: int = 0
    new_tokens: int = 1
    logits: int = 1


@dataclass(frozen=True)
class Cost:
    """Of one prompt: operations by part, bytes of the cache at the end of the prefill and of everything else."""

    tower: float
    projector: float
    llm: float
    head: float
    method: float
    decode: float
    kv_bytes: float
    activation_bytes: float
    weight_bytes: float

    @property
    def prefill(self) -> float:
        """Operations until the first new token is known."""
        return self.tower + self.projector + self.llm + self.head + self.method

    @property
    def total(self) -> float:
        """Operations of the prefill and of decoding."""
        return self.prefill + self.decode


@functools.lru_cache(4096)  # questions of a benchmark come in few sizes
def cost(shape: ModelShape, work: Work, element: int = 2) -> Cost:
    """The cost of `work` on a model; element: bytes of a number."""
    llm, encoded = shape.llm, work.encoded
    entering, cached = work.visual.plus(work.text), (work.cached or work.visual).plus(work.text)
    projected = encoded.projected if work.projected is None else work.projected
    return Cost(
        tower=tower_operations(shape.tower, encoded, work.shortened),
        projector=2 * projected * shape.projector.per_token,
        llm=llm_operations(llm, entering),
        head=2 * work.logits * llm.hidden * llm.vocabulary,
        method=work.method,
        decode=decode_operations(llm, cached, work.new_tokens),
        kv_bytes=sum(llm.kv_bytes(tokens, element) for _, tokens in cached.each()),
        activation_bytes=element * max(activations(llm, layer, tokens) for layer, tokens in entering.each()),
        weight_bytes=element * (weights(shape) + work.method_weights),
    )


def tower_operations(tower: TowerShape, encoded: Encoded, shortened: Shortened = ()) -> float:
    """Operations of the vision tower."""
    total: float = 2 * encoded.patches * tower.inputs * tower.hidden
    rows, full, windows = encoded.rows, encoded.pairs, encoded.window_pairs
    steps = dict(shortened)
    for layer in range(tower.layers):
        if layer in steps:
            share = encoded.crops * steps[layer] / encoded.rows  # of every sequence, and of its windows
            rows, full, windows = (share * encoded.rows, share**2 * encoded.pairs, share**2 * encoded.window_pairs)
        pairs = full if tower.is_full(layer) else windows
        total += 2 * rows * tower.per_row + 4 * pairs * tower.inner
    if tower.pooling:  # one query per crop over all rows, keys and values of these, and a feed-forward of one row
        d = tower.hidden
        total += 2 * (2 * rows * d**2 + 2 * rows * d + encoded.crops * (2 * d**2 + 2 * d * tower.intermediate))
    return total


def encoder_operations(tower: TowerShape, patches: TokenCounts) -> float:
    """Operations of a vision encoder alone on one image; patches: that enter each layer. Projections are left out."""
    first, last = patches.spans[0][1], patches.spans[-1][1]
    whole = tower_operations(replace(tower, layers=0), Encoded(crops=1, patches=first, rows=last + tower.prefix))
    rows = [count for _, count in patches.plus(tower.prefix).each()]
    return whole + sum(2 * count * tower.per_row + 4 * count**2 * tower.inner for count in rows)


def llm_operations(llm: LLMShape, entering: TokenCounts) -> float:
    """Operations of the decoder layers in a prefill; entering: all tokens of each layer."""
    return sum(2 * tokens * llm.per_token(layer) + 4 * tokens**2 * llm.query_width for layer, tokens in entering.each())


def decode_operations(llm: LLMShape, cached: TokenCounts, new_tokens: int) -> float:
    """Operations of the forward passes behind the prefill, one for each new token but the first.

    cached: rows that each layer's cache holds when the first of them begins. The pass of token t attends to t more.
    """
    passes = max(0, new_tokens - 1)
    head: float = 2 * passes * llm.hidden * llm.vocabulary
    attended = passes * (passes + 1) / 2
    return head + sum(
        2 * passes * llm.per_token(layer) + 4 * llm.query_width * (passes * tokens + attended)
        for layer, tokens in cached.each()
    )


def activations(llm: LLMShape, layer: int, tokens: float) -> float:
    """Numbers that are alive at once in a layer of a prefill, an estimate: the residual stream and its copy beside
    the queries, keys, values and output of attention, or beside the three tensors of the feed-forward part.
    """
    attention = 2 * (llm.query_width + llm.kv_width)
    return tokens * (2 * llm.hidden + max(attention, 3 * llm.ffn_width(layer)))


def weights(shape: ModelShape) -> int:
    """Matrix weights of the model, embeddings counted once."""
    llm, tower = shape.llm, shape.tower
    decoder = sum(llm.weights(layer) for layer in range(llm.layers)) + llm.hidden * llm.vocabulary
    encoder = tower.layers * tower.per_row + tower.inputs * tower.hidden
    return decoder + encoder + shape.projector.per_token


def operators(shape: ModelShape, work: Work, element: int = 2, batch: int = 1) -> Iterator[Operator]:
    """The prefill of `batch` such prompts in operators for a roofline estimate.

    Attention is fused: its scores never leave the device's caches.
    """
    encoded, tower, llm = work.encoded, shape.tower, shape.llm

    def operator(name: str, operations: float, read: float, numbers: float) -> Operator:
        """read: weights; operations and numbers: of one prompt."""
        return Operator(name, batch * operations, element * (read + batch * numbers))

    if encoded.crops:
        per_layer = tower_operations(tower, encoded, work.shortened) / tower.layers
        for _ in range(tower.layers):
            yield operator("tower layer", per_layer, tower.per_row, 8 * encoded.rows * tower.hidden)
        tokens, projector = encoded.projected if work.projected is None else work.projected, shape.projector
        numbers = tokens * (projector.inputs + projector.outputs)
        yield operator("projector", 2 * tokens * projector.per_token, projector.per_token, numbers)
    for layer, n in work.visual.plus(work.text).each():
        read: float = llm.weights(layer)
        if llm.experts is not None and llm.has_experts(layer):  # few tokens do not reach all experts
            reached = min(1.0, batch * n * llm.experts.active / llm.experts.count)
            read = llm.projections + reached * (read - llm.projections)
        attention = 2 * n * (llm.query_width + llm.kv_width)
        linear = attention + n * (4 * llm.hidden + 3 * llm.ffn_width(layer))
        yield operator("matrices", 2 * n * llm.per_token(layer), read, linear)
        yield operator("attention", 4 * n**2 * llm.query_width, 0, attention)
        yield operator("norms and additions", 0, 0, 8 * n * llm.hidden)
    head = llm.hidden * llm.vocabulary
    yield operator("logits", 2 * work.logits * head, head, work.logits * llm.vocabulary)
    if work.method:
        yield operator("method", work.method, work.method_weights, 0)


def decoding(shape: ModelShape, work: Work, element: int = 2, batch: int = 1) -> Iterator[Operator]:
    """The passes behind the prefill, one operator each: all weights and the whole cache are read."""
    llm, cached = shape.llm, (work.cached or work.visual).plus(work.text)
    read = sum(llm.weights(layer) for layer in range(llm.layers)) + llm.hidden * llm.vocabulary
    for step in range(1, work.new_tokens):
        held = cached.plus(step - 1)
        moved = element * read + batch * sum(llm.kv_bytes(tokens, element) for _, tokens in held.each())
        yield Operator("token", batch * decode_operations(llm, held, 2), moved)
