"""The training-free part of VQToken: all tokens of an item as a few cluster means (arXiv:2503.16980)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.registry import register
from vtc.methods.vqtoken import cluster
from vtc.methods.vqtoken.cluster import Members
from vtc.ops.hashing import fingerprint
from vtc.ops.host import put
from vtc.ops.select import front_pack, take_rows

Space = Literal["raw", "normalized"]


@dataclass(frozen=True)
class Clustering(Compressor):
    """What both forms share: all tokens of an item, frames and tiles together, fall into K clusters.

    clusters: "budget" makes K what retention or keep grants the item; "elbow" chooses K per item among k_min to k_max
    and takes no budget. elbow_rule: "official" gives 12 to 22 at the published bounds, "corrected" the K at the kink.
    iterations: at most so many k-means steps, None: 50 with a given K, 100 with the elbow. tolerance: a move of all
    centres together below it ends them. empty: a cluster that ends without members takes the token that fits its own
    cluster worst ("split", so that there are exactly K) or is left out ("drop"). seed: of the k-means++ draws, which
    depend on it and on the item's pixels alone. pooled: cluster the tokens that enter the LLM; False: what the
    projector makes of every patch, ahead of the pooling of frames in families that pool behind it, as published.
    """

    clusters: Literal["budget", "elbow"] = "budget"
    k_min: int = 12
    k_max: int = 32
    elbow_rule: Literal["official", "corrected"] = "official"
    iterations: int | None = None
    tolerance: float = 1e-4
    empty: Literal["split", "drop"] = "split"
    seed: int = 0
    pooled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_min < 1 or self.k_max < self.k_min + 2:
            raise VTCError(
                f"k_min={self.k_min}, k_max={self.k_max} leave no kink to find; the elbow needs at least three numbers "
                "of clusters from 1 up, the paper uses 12 to 32"
            )
        if self.iterations is not None and self.iterations < 1:
            raise VTCError(f"iterations={self.iterations} assigns no token; pass at least 1, the paper uses 50")

    @property
    def needs_budget(self) -> bool:
        return self.clusters == "budget"

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(unpooled=not self.pooled)
        return dataclasses.replace(super().plan(model), needs=needs, positions="compact")

    @torch.no_grad()
    def assign(self, view: StageView) -> tuple[Tensor, Tensor, int]:
        """Cluster number of every patch [I, P], clusters of every item [I], and the most there can be."""
        tokens = view.patches.rows
        if self.clusters == "budget":
            counts, most = put(view.keep, tokens.device), max(view.keep)
        else:
            counts, most = self._elbow(view)
        steps = self.iterations or (50 if self.clusters == "budget" else 100)
        labels = self._runs(view, counts[:, None], most, view.fingerprint, steps).labels[:, 0]
        if self.empty == "split":
            labels = cluster.split_empty(tokens, labels, counts, most, view.patches.mask)
        return labels, counts, most

    def _runs(self, view: StageView, counts: Tensor, most: int, key: Tensor, steps: int) -> cluster.Clusters:
        tokens, mask = view.patches.rows, view.patches.mask
        start = cluster.seed_centres(tokens, counts, most, key, view.patches.number, mask, seed=self.seed)
        return cluster.kmeans(tokens, start, counts, mask, iterations=steps, tolerance=self.tolerance)

    def _elbow(self, view: StageView) -> tuple[Tensor, int]:
        """Clusters of every item and the most the rule can give; an item never gets more than its tokens."""
        device, candidates = view.device, self.k_max - self.k_min + 1
        held = put(view.items.counts, device)
        counts = torch.minimum(torch.arange(self.k_min, self.k_max + 1, device=device), held[:, None])
        key = fingerprint(torch.stack([view.fingerprint, torch.ones_like(view.fingerprint)], 1))  # not the last run's
        runs = self._runs(view, counts, self.k_max, key, self.iterations or 100)
        apart = cluster.distortion(view.patches.rows, runs, view.patches.mask)
        kink = cluster.elbow(apart, self.k_min, rule=self.elbow_rule)
        most = max(self.k_min, candidates + 1) if self.elbow_rule == "official" else self.k_max - 1
        return torch.minimum(kink, held), min(most, max(view.items.counts))


def lay(view: StageView, marks: Tensor, rows: Tensor, owner: Tensor, counts: Sequence[int] | None) -> Selection:
    """Put `rows` [I, K, D] in their order on tokens; marks: [I, P] patches that stand for them, owner: [I, P] row that
    each patch went into.
    """
    kept, owner = view.patches.anchors(marks, view.items.mask), view.patches.of_tokens(owner)
    slots = front_pack(kept, min(rows.shape[1], kept.shape[1]))
    item = torch.arange(len(kept), device=kept.device)[:, None]
    tokens = torch.empty_like(view.tokens)  # rows of tokens that go are not read
    tokens.index_put_((item, slots), rows[:, : slots.shape[1]].to(tokens.dtype))
    return Selection(kept, counts, tokens=tokens, merged_into=slots.gather(1, owner.clamp(max=slots.shape[1] - 1)))


@register
class VQTokenCodebook(Clustering):
    """VQToken (codebook only, training-free): cluster all tokens of an item and send the K cluster means to the LLM.

    Acts before the LLM, needs no attention and no weights, sees no text. Cosine k-means over the projected tokens with
    k-means++ seeding; the mean of each cluster replaces its tokens (arXiv:2503.16980, without the trained block that
    restores positions: the paper itself loses much this way, 35.2 against 57.5 on NExT-QA). Results carry the name
    `vqtoken_codebook` and must not be reported as VQToken.

    clusters, k_min, k_max, elbow_rule, iterations, tolerance, empty, seed: how tokens are clustered; "budget" (default)
    makes the number of clusters what retention or keep grants, "elbow" chooses it per item between k_min and k_max by
    the released rule ("official") or its intent ("corrected"). codebook_space: means of the tokens ("raw", as the
    LLM knows them) or of the tokens scaled to length one ("normalized", as the released code). representative: the
    mean, or the medoid, the real token closest in cosine to the normalized mean. order: rows by first member
    ("first"), as numbered by k-means ("cluster_id", the released order), larger clusters first ("size"), or by the
    place of the anchor, which is the first member or the medoid ("place"). pooled: cluster the tokens that enter the
    LLM; False: what the projector makes of every patch, ahead of the pooling of frames in families that pool behind it,
    as published (rows then lie on the first tokens of the video).

    Departures from the paper and its code: raw means of pooled tokens by default; images are clustered as videos of one
    frame; several crops or tiles of an image share one codebook; draws depend on pixels and seed, not on a global
    generator; clusters that end empty are filled, so that the budget is exact; under multi-axis rotary positions, which
    say where a token lies in the picture, rows keep those of their anchors, unless their order is another than that of
    the anchors: then, as everywhere else, they get consecutive ones.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("vqtoken_codebook").plan(llava).positions
    'compact'
    """

    codebook_space: Space = "raw"
    representative: Literal["mean", "medoid"] = "mean"
    order: Literal["first", "cluster_id", "size", "place"] = "first"

    name: ClassVar[str] = "vqtoken_codebook"
    version: ClassVar[int] = 2

    def plan(self, model: ModelSpec) -> Plan:
        anchored = self.order == "place" or (self.order == "first" and self.representative == "mean")
        return dataclasses.replace(super().plan(model), positions="preserve" if model.mrope and anchored else "compact")

    def select(self, view: StageView) -> Selection | None:
        if not any(view.items.counts):  # an earlier stage dropped everything
            return None
        labels, _, most = self.assign(view)
        tokens, mask = view.patches.rows, view.patches.mask
        normalized = self.codebook_space == "normalized"
        codes, _ = cluster.codebook(tokens, labels, most, mask, normalized=normalized)
        members = cluster.describe(labels, most, mask)
        anchor = members.first
        if self.representative == "medoid":
            anchor = cluster.medoids(tokens, labels, most, mask)
            codes = take_rows(tokens, anchor.clamp(min=0)).float()
            codes = torch.nn.functional.normalize(codes, dim=-1) if normalized else codes
        placed = Members(members.sizes, anchor)
        order = cluster.ordering(placed, "first") if self.order == "place" else cluster.ordering(members, self.order)
        marks = cluster.marked(anchor, labels.shape[1])
        exact = self.clusters == "budget" and self.empty == "split"
        return lay(view, marks, take_rows(codes, order), cluster.relabel(labels, order), view.keep if exact else None)
