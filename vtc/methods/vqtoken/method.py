"""VQToken: a video as a few cluster means, and an attention block that reads where they lie (arXiv:2503.16980)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method import weights as store
from vtc.method.base import ModelSpec, Plan, Selection, StageView
from vtc.method.learned import LearnedCompressor, load_tensors
from vtc.method.patches import Patches
from vtc.method.registry import register
from vtc.methods.vqtoken import cluster
from vtc.methods.vqtoken.attention import VQAttention
from vtc.methods.vqtoken.codebook import Clustering, Space, lay
from vtc.ops.grid import Grid, cell_centres
from vtc.ops.hashing import uniform
from vtc.ops.host import put
from vtc.ops.select import top_k

OFFICIAL_PREFIX = "model.cross_attention."


def occupancy(numbers: Tensor, frames: Tensor, width: int) -> Tensor:
    """[I, width, P] share of an item's frames in which each cluster holds each of the P cells.

    numbers: [I, F, P] cluster of every cell. frames: [I] frames of each item, at most F.
    """
    items, most, cells = numbers.shape
    weight = ((torch.arange(most, device=frames.device) < frames[:, None]) / frames[:, None])[..., None]
    place = numbers * cells + torch.arange(cells, device=numbers.device)
    found = torch.zeros(items, width * cells, device=numbers.device)
    return found.scatter_add(1, place.flatten(1), weight.expand_as(place).flatten(1)).view(items, width, cells)


@register
class VQToken(Clustering, LearnedCompressor):
    """VQToken: K cluster means of all tokens of a video, mixed by a trained block that reads where the clusters lie.

    Acts before the LLM, needs weights, sees no text (arXiv:2503.16980). Cosine k-means gives a codebook of K means and
    the map of cluster numbers, [frames, rows, columns]. One row of the map, cluster numbers as they are, is projected
    to one query; a Transformer decoder layer (self-attention, cross-attention to the codebook, feed-forward, each
    followed by a LayerNorm) turns the queries into the rows for the LLM. Queries and codes are repeated to the longer
    of the two, so max(queries, K) rows come out: a budget below the number of queries is refused.

    weights: a file or embedded name, see `vtc train --method vqtoken`; files of the authors are understood. clusters,
    k_min, k_max, elbow_rule, iterations, tolerance, empty, seed, pooled: as in `vqtoken_codebook`; the published block
    reads frames of 27 x 27 patches, which LLaVA-OneVision has ahead of its pooling alone: pooled=False. codebook_space:
    means of tokens scaled to length one ("normalized", as released) or of raw tokens. queries: what one row of the map
    is: "frame", a whole frame (as published; an image then has one query and all its output rows are equal), "line", a
    line of a frame, or "cluster", where a cluster lies: its share of every cell over the frames instead of numbers, so
    that there are K distinct queries, query j belongs to code j, and no budget is too small. grid: rows and columns of
    a frame the block was made for. resample: take other rasters to that grid by nearest neighbour; refused otherwise.
    heads, inner, dropout: of the decoder layer. residual: add code j to query j and to output row j, so that the block
    only has to learn the difference. canonical_ids: number clusters by first appearance. ablation: Gaussian noise for
    the map ("random_map") or the codes ("random_codebook").

    Departures from the paper and its code: LayerNorm gains of a fresh block start at 1, not near 0; the block computes
    in float32; images work (see queries; "line", "cluster" and residual are ours), every raster of a tiled image counts
    as a frame; draws depend on pixels and seed; clusters that end empty are filled; the number of clusters follows the
    budget by default, not the elbow.

    >>> import vtc
    >>> vtc.create("vqtoken", weights="vqtoken-tiny-llava").trained
    True
    """

    codebook_space: Space = "normalized"
    queries: Literal["frame", "line", "cluster"] = "frame"
    grid: tuple[int, int] = (27, 27)
    resample: bool = False
    heads: int = 8
    inner: int = 2048
    dropout: float = 0.1
    residual: bool = False
    canonical_ids: bool = False
    ablation: Literal["none", "random_map", "random_codebook"] = "none"

    name: ClassVar[str] = "vqtoken"
    small: ClassVar[Mapping[str, Any]] = {"resample": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(*self.grid, self.heads, self.inner) < 1:
            raise VTCError(
                f"grid={self.grid}, heads={self.heads}, inner={self.inner} describe no attention block; write for "
                "example grid=(27, 27), heads=8, inner=2048"
            )
        if not 0 <= self.dropout < 1:
            raise VTCError(f"dropout={self.dropout} is outside [0, 1); it is a share of zeros, the paper uses 0.1")

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
        } | ({} if self.pooled else {"pooled": "false"})

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
        patches = view.patches
        places, rows = self._map(view, patches)
        if self.queries != "cluster":
            self._check(view, rows)
        labels, counts, most = self.assign(view)
        mask, device = patches.mask, view.device
        if self.canonical_ids:
            labels = cluster.relabel(labels, cluster.ordering(cluster.describe(labels, most, mask)))
        codes, _ = cluster.codebook(patches.rows, labels, most, mask, normalized=self.codebook_space == "normalized")
        lines = put(rows, device)
        numbers = labels.gather(1, places.flatten(1)).view_as(places).float()
        if self.queries == "cluster":
            numbers, lines = occupancy(numbers.long(), lines, most), counts
        if self.ablation == "random_map":
            numbers = self._noise(view, numbers)
        elif self.ablation == "random_codebook":
            codes = self._noise(view, codes)
        mixed: Tensor = view.module["vq_attn"](numbers, codes, lines, counts, residual=self.residual)
        first = cluster.describe(labels, most, mask).first
        marks = top_k(cluster.marked(first, labels.shape[1]).float(), torch.maximum(lines, counts), mask)
        if self.clusters == "elbow":
            return lay(view, marks, mixed, labels, None)
        selection = lay(view, marks, mixed, labels, view.keep)
        whole = [granted == held for granted, held in zip(view.keep, view.items.counts, strict=True)]
        assert selection.tokens is not None
        if any(whole):  # alone, such an item would not reach the method
            untouched = put(whole, device)[:, None, None]
            selection = dataclasses.replace(selection, tokens=torch.where(untouched, view.tokens, selection.tokens))
        return selection

    def _map(self, view: StageView, patches: Patches) -> tuple[Tensor, tuple[int, ...]]:
        """[I, Q, places] token of every entry of the map, and the queries of every item."""
        maps, items = [], view.items
        for item, held, regions, pooled in zip(
            items.layouts, items.counts, patches.regions, patches.pooled, strict=True
        ):
            whole = regions and (pooled or held == item.selectable)
            if not whole or not (self.resample or all(region[1:] == self.grid for region in regions)):
                shape = ", ".join("x".join(map(str, region)) for region in regions) if whole else "no full raster"
                raise UnsupportedMethod(
                    f"{self.name!r} reads maps of {self.grid[0]}x{self.grid[1]} tokens, this {item.kind} has {shape}; "
                    "pass resample=True for other rasters, leave tokens whole before it, or use 'vqtoken_codebook'"
                )
            maps.append(_raster(regions, self.grid).view(-1, self.places))
        rows = tuple(len(places) for places in maps)
        return pad_sequence(maps, batch_first=True).to(view.device, non_blocking=True), rows

    def _check(self, view: StageView, rows: tuple[int, ...]) -> None:
        """Refuse items that get fewer tokens than there are queries, unless they stay whole anyway."""
        fixed = self.clusters == "budget"
        grants = view.keep if fixed else view.items.counts
        for item, granted, held, queries in zip(view.items.layouts, grants, view.items.counts, rows, strict=True):
            if granted >= queries or (fixed and granted == held):
                continue
            need = queries + item.newlines
            least = f"ask for at least keep={need} (retention {math.ceil(1000 * need / item.n_tokens) / 1000:.3f}), "
            given = f"the budget grants {granted}; {least}" if fixed else f"it has {granted}; "
            raise BudgetError(
                f"{self.name!r} gives the LLM one row per query, {queries} for this {item.kind}, and {given}"
                "use queries='cluster', fewer frames, or 'vqtoken_codebook'"
            )

    def _noise(self, view: StageView, like: Tensor) -> Tensor:
        """Standard normal numbers of a shape, by pixels and seed."""
        flat = like.flatten(1)
        number = torch.arange(flat.shape[1], device=like.device).expand_as(flat)
        radius, angle = (uniform(view.fingerprint, 2 * number + part, self.seed) for part in (0, 1))
        return (torch.sqrt(-2 * torch.log(1 - radius)) * torch.cos(2 * math.pi * angle)).view_as(like)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may meet a training later
def _raster(regions: tuple[Grid, ...], grid: tuple[int, int]) -> Tensor:
    """Token of every cell when each frame of the rasters is taken to `grid` by nearest neighbour."""
    parts, first = [], 0
    for region in regions:
        parts.append(first + cell_centres(region, (region[0], *grid)))
        first += math.prod(region)
    return torch.cat(parts)
