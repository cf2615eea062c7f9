"""VQToken: an image or video as a few cluster means, plus positions that a small attention block reads (2503.16980)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc import weights as store
from vtc.compressor import Compressor, ModelSpec, Plan, Selection, StageView
from vtc.errors import BudgetError, UnsupportedMethod, VTCError, unknown_name
from vtc.learned import LearnedCompressor, load_tensors
from vtc.ops import cluster
from vtc.ops.cluster import Members
from vtc.ops.grid import Grid, cell_centres
from vtc.ops.hashing import fingerprint, uniform
from vtc.ops.select import front_pack, take_rows, top_k
from vtc.ops.vq_attention import VQAttention
from vtc.registry import register

OFFICIAL_PREFIX = "model.cross_attention."
Space = Literal["raw", "normalized"]


@dataclass(frozen=True)
class Clustering(Compressor):
    """What both forms share: all tokens of an item, frames and tiles together, fall into K clusters.

    clusters: "budget" makes K what retention or keep grants the item; "elbow" chooses K per item among k_min to k_max
    and takes no budget. elbow_rule: "official" gives 12 to 22 at the published bounds, "corrected" the K at the kink.
    iterations: at most so many k-means steps, None: 50 with a given K, 100 with the elbow. tolerance: a move of all
    centres together below it ends them. empty: a cluster that ends without members takes the token that fits its own
    cluster worst ("split", so that there are exactly K) or is left out ("drop"). seed: of the k-means++ draws, which
    depend on it and on the item's pixels alone.
    """

    clusters: Literal["budget", "elbow"] = "budget"
    k_min: int = 12
    k_max: int = 32
    elbow_rule: Literal["official", "corrected"] = "official"
    iterations: int | None = None
    tolerance: float = 1e-4
    empty: Literal["split", "drop"] = "split"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in self._choices().items():
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        if self.k_min < 1 or self.k_max < self.k_min + 2:
            raise VTCError(
                f"k_min={self.k_min}, k_max={self.k_max} leave no kink to find; the elbow needs at least three numbers "
                "of clusters from 1 up, the paper uses 12 to 32"
            )
        if self.iterations is not None and self.iterations < 1:
            raise VTCError(f"iterations={self.iterations} assigns no token; pass at least 1, the paper uses 50")

    def _choices(self) -> dict[str, Sequence[str]]:
        return {
            "clusters": ("budget", "elbow"),
            "elbow_rule": ("official", "corrected"),
            "empty": ("split", "drop"),
        }

    @property
    def needs_budget(self) -> bool:
        return self.clusters == "budget"

    def plan(self, model: ModelSpec) -> Plan:
        return dataclasses.replace(super().plan(model), positions="compact")

    @torch.no_grad()
    def assign(self, view: StageView) -> tuple[Tensor, Tensor, int]:
        """Cluster number of every token [I, N], clusters of every item [I], and the most there can be."""
        tokens, items = view.tokens, view.items
        if self.clusters == "budget":
            counts, most = torch.tensor(view.keep, device=tokens.device), max(view.keep)
        else:
            counts, most = self._elbow(view)
        steps = self.iterations or (50 if self.clusters == "budget" else 100)
        labels = self._runs(view, counts[:, None], most, view.fingerprint, steps).labels[:, 0]
        if self.empty == "split":
            labels = cluster.split_empty(tokens, labels, counts, most, items.mask)
        return labels, counts, most

    def _runs(self, view: StageView, counts: Tensor, most: int, key: Tensor, steps: int) -> cluster.Clusters:
        tokens, mask = view.tokens, view.items.mask
        start = cluster.seed_centres(tokens, counts, most, key, view.items.token, mask, seed=self.seed)
        return cluster.kmeans(tokens, start, counts, mask, iterations=steps, tolerance=self.tolerance)

    def _elbow(self, view: StageView) -> tuple[Tensor, int]:
        """Clusters of every item and the most the rule can give; an item never gets more than its tokens."""
        device, candidates = view.hidden.device, self.k_max - self.k_min + 1
        held = torch.tensor(view.items.counts, device=device)
        counts = torch.minimum(torch.arange(self.k_min, self.k_max + 1, device=device), held[:, None])
        key = fingerprint(torch.stack([view.fingerprint, torch.ones_like(view.fingerprint)], 1))  # not the last run's
        runs = self._runs(view, counts, self.k_max, key, self.iterations or 100)
        kink = cluster.elbow(cluster.distortion(view.tokens, runs, view.items.mask), self.k_min, rule=self.elbow_rule)
        most = max(self.k_min, candidates + 1) if self.elbow_rule == "official" else self.k_max - 1
        return torch.minimum(kink, held), min(most, max(view.items.counts))


def lay(view: StageView, keep: Tensor, rows: Tensor, owner: Tensor, counts: Sequence[int] | None) -> Selection:
    """Put `rows` [I, K, D] in their order on the anchors `keep` [I, N]; owner: [I, N] row that each token went into."""
    slots = front_pack(keep, min(rows.shape[1], keep.shape[1]))
    item = torch.arange(len(keep), device=keep.device)[:, None]
    base = torch.zeros_like(view.tokens)
    tokens = base.index_put((item, slots), rows[:, : slots.shape[1]].to(base.dtype))
    return Selection(keep, counts, tokens=tokens, merged_into=slots.gather(1, owner.clamp(max=slots.shape[1] - 1)))


@register
@dataclass(frozen=True)
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
    place of the anchor, which is the first member or the medoid ("place").

    Departures from the paper and its code: raw means by default; images are clustered as videos of one frame; several
    crops or tiles of an image share one codebook; draws depend on pixels and seed, not on a global generator; clusters
    that end empty are filled, so that the budget is exact; under multi-axis rotary positions rows get consecutive
    positions, or keep those of their medoids with representative="medoid", order="place".
    """

    codebook_space: Space = "raw"
    representative: Literal["mean", "medoid"] = "mean"
    order: Literal["first", "cluster_id", "size", "place"] = "first"

    name: ClassVar[str] = "vqtoken_codebook"

    def _choices(self) -> dict[str, Sequence[str]]:
        return super()._choices() | {
            "codebook_space": get_args(Space),
            "representative": ("mean", "medoid"),
            "order": ("first", "cluster_id", "size", "place"),
        }

    def plan(self, model: ModelSpec) -> Plan:
        placed = model.mrope and (self.representative, self.order) == ("medoid", "place")
        return dataclasses.replace(super().plan(model), positions="preserve" if placed else "compact")

    def select(self, view: StageView) -> Selection:
        labels, _, most = self.assign(view)
        tokens, mask = view.tokens, view.items.mask
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
        keep = cluster.marked(anchor, labels.shape[1])
        exact = self.clusters == "budget" and self.empty == "split"
        return lay(view, keep, take_rows(codes, order), cluster.relabel(labels, order), view.keep if exact else None)


@register
@dataclass(frozen=True)
class VQToken(Clustering, LearnedCompressor):
    """VQToken: K cluster means of all tokens of a video, mixed by a trained block that reads where the clusters lie.

    Acts before the LLM, needs weights, sees no text (arXiv:2503.16980). Cosine k-means gives a codebook of K means and
    the map of cluster numbers, [frames, rows, columns]. One row of the map, cluster numbers as they are, is projected
    to one query; a Transformer decoder layer (self-attention, cross-attention to the codebook, feed-forward, each
    followed by a LayerNorm) turns the queries into the rows for the LLM. Queries and codes are repeated to the longer
    of the two, so max(queries, K) rows come out: a budget below the number of queries is refused.

    weights: a file or embedded name, see `vtc train --method vqtoken`; files of the authors are understood. clusters,
    k_min, k_max, elbow_rule, iterations, tolerance, empty, seed: as in `vqtoken_codebook`. codebook_space: means of
    tokens scaled to length one ("normalized", as released) or of raw tokens. queries: what one row of the map is, a
    whole frame ("frame", as published: an image then has one query and all its output rows are equal) or one line of
    a frame ("line"). grid: rows and columns of a frame the block was made for. resample: take other rasters to that
    grid by nearest neighbour; refused otherwise. heads, inner, dropout: of the decoder layer. residual: add code j to
    query j and to output row j, so that the block only has to learn the difference. canonical_ids: number clusters by
    first appearance. ablation: Gaussian noise for the map ("random_map") or the codes ("random_codebook").

    Departures from the paper and its code: LayerNorm gains of a fresh block start at 1, not near 0; the block computes
    in float32; images work (see queries), every raster of a tiled image counts as a frame; draws depend on pixels and
    seed; clusters that end empty are filled; the number of clusters follows the budget by default, not the elbow.
    """

    codebook_space: Space = "normalized"
    queries: Literal["frame", "line"] = "frame"
    grid: tuple[int, int] = (27, 27)
    resample: bool = False
    heads: int = 8
    inner: int = 2048
    dropout: float = 0.1
    residual: bool = False
    canonical_ids: bool = False
    ablation: Literal["none", "random_map", "random_codebook"] = "none"

    name: ClassVar[str] = "vqtoken"

    def _choices(self) -> dict[str, Sequence[str]]:
        return super()._choices() | {
            "codebook_space": get_args(Space),
            "queries": ("frame", "line"),
            "ablation": ("none", "random_map", "random_codebook"),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", tuple(self.grid))  # lists come from configuration files
        if len(self.grid) != 2 or min(self.grid) < 1 or min(self.heads, self.inner) < 1:
            raise VTCError(
                f"grid={self.grid}, heads={self.heads}, inner={self.inner} describe no attention block; write for "
                "example grid=(27, 27), heads=8, inner=2048"
            )

    # --- the block and its weights
    @property
    def places(self) -> int:
        """Entries of one row of the map."""
        return self.grid[1] if self.queries == "line" else math.prod(self.grid)

    def plan(self, model: ModelSpec) -> Plan:
        if model.width % self.heads:
            raise UnsupportedMethod(
                f"heads={self.heads} does not divide the width {model.width} of this {model.family} model; pass heads= "
                "a divisor of it"
            )
        return super().plan(model)

    def build(self, model: ModelSpec) -> nn.Module:
        block = VQAttention(self.places, model.width, heads=self.heads, inner=self.inner, dropout=self.dropout)
        if self.residual:
            nn.init.zeros_(block.transformer_decoder.layers[0].norm3.weight)  # it begins as the codebook alone
        return nn.ModuleDict({"vq_attn": block})

    def settings(self, model: ModelSpec) -> dict[str, str]:
        return {
            "query_dim": str(self.places),
            "context_dim": str(model.width),
            "num_heads": str(self.heads),
            "dim_feedforward": str(self.inner),
            "codebook_space": self.codebook_space,
            "queries": self.queries,
            "grid": "x".join(map(str, self.grid)),
            "residual": str(self.residual).lower(),
            "canonical_ids": str(self.canonical_ids).lower(),
        }

    def save(
        self, path: str | Path, module: nn.Module, model: ModelSpec, extra: Mapping[str, str] | None = None
    ) -> Path:
        notes = {"elbow_mode": self.elbow_rule, "base_model": model.family}
        return super().save(path, module, model, {**notes, **(extra or {})})

    def module(self, model: ModelSpec) -> nn.Module:
        tensors: dict[str, Any] = store.read(self.weights)[0] if self.weights is not None else {}
        official = {k.removeprefix(OFFICIAL_PREFIX): v for k, v in tensors.items() if k.startswith(OFFICIAL_PREFIX)}
        if not official:
            return super().module(model)
        module = self.build(model).float()
        load_tensors(str(self.weights), module, {f"vq_attn.{name}": tensor for name, tensor in official.items()})
        return module.train(self.training).requires_grad_(self.training)

    # --- one call
    def select(self, view: StageView) -> Selection:
        assert isinstance(view.module, nn.ModuleDict)
        places, rows = self._map(view)
        if self.clusters == "budget":
            self._check(view, rows)
        labels, counts, most = self.assign(view)
        mask, device = view.items.mask, view.hidden.device
        if self.canonical_ids:
            labels = cluster.relabel(labels, cluster.ordering(cluster.describe(labels, most, mask)))
        codes, _ = cluster.codebook(view.tokens, labels, most, mask, normalized=self.codebook_space == "normalized")
        numbers = labels.gather(1, places.flatten(1)).view_as(places).float()
        if self.ablation == "random_map":
            numbers = self._noise(view, numbers)
        elif self.ablation == "random_codebook":
            codes = self._noise(view, codes)
        lines = torch.tensor(rows, device=device)
        mixed: Tensor = view.module["vq_attn"](numbers, codes, lines, counts, residual=self.residual)
        first = cluster.describe(labels, most, mask).first
        keep = top_k(cluster.marked(first, labels.shape[1]).float(), torch.maximum(lines, counts), mask)
        return lay(view, keep, mixed, labels, view.keep if self.clusters == "budget" else None)

    def _map(self, view: StageView) -> tuple[Tensor, tuple[int, ...]]:
        """[I, Q, places] token of every entry of the map, and the queries of every item."""
        maps = []
        for item, held in zip(view.items.layouts, view.items.counts, strict=True):
            whole = item.regions and held == item.n_tokens - item.newlines
            if not whole or not (self.resample or all(region[1:] == self.grid for region in item.regions)):
                shape = ", ".join("x".join(map(str, region)) for region in item.regions) if whole else "no full raster"
                raise UnsupportedMethod(
                    f"{self.name!r} reads maps of {self.grid[0]}x{self.grid[1]} tokens, this {item.kind} has {shape}; "
                    "pass resample=True for other rasters, leave tokens whole before it, or use 'vqtoken_codebook'"
                )
            maps.append(_raster(item.regions, self.grid).view(-1, self.places))
        rows = tuple(len(places) for places in maps)
        return pad_sequence(maps, batch_first=True).to(view.hidden.device), rows

    def _check(self, view: StageView, rows: tuple[int, ...]) -> None:
        for item, granted, queries in zip(view.items.layouts, view.keep, rows, strict=True):
            if granted < queries:
                need = queries + item.newlines
                share = math.ceil(1000 * need / item.n_tokens) / 1000
                raise BudgetError(
                    f"{self.name!r} gives the LLM one row per query, {queries} for this {item.kind}, and the budget "
                    f"grants {granted}; ask for at least keep={need} (retention {share:.3f}), use queries='frame' or "
                    "fewer frames, or 'vqtoken_codebook'"
                )

    def _noise(self, view: StageView, like: Tensor) -> Tensor:
        """Standard normal numbers of a shape, by pixels and seed."""
        flat = like.flatten(1)
        number = torch.arange(flat.shape[1], device=like.device).expand_as(flat)
        radius, angle = (uniform(view.fingerprint, 2 * number + part, self.seed) for part in (0, 1))
        return (torch.sqrt(-2 * torch.log(1 - radius)) * torch.cos(2 * math.pi * angle)).view_as(like)


@lru_cache(maxsize=256)
def _raster(regions: tuple[Grid, ...], grid: tuple[int, int]) -> Tensor:
    """Token of every cell when each frame of the rasters is taken to `grid` by nearest neighbour."""
    parts, first = [], 0
    for region in regions:
        parts.append(first + cell_centres(region, (region[0], *grid)))
        first += math.prod(region)
    return torch.cat(parts)
