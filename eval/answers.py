"""Scores of several cells by document, side by side: what derived numbers are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vtc.eval.cells import BASELINE
from vtc.eval.results import Results
from vtc.eval.seeds import pools
from vtc.eval.statistics import RESAMPLES, Floats, cluster_sums, groups_of
from vtc.eval.store import Record


@dataclass(frozen=True)
class Answers:
    """C series on the same N documents in one metric that is a mean; a series is a cell, or seeds of one method.

    lines: the C series' lines of the results, those of seeds pooled. scores: [C, N] in the metric's own scale, so that
    the metric is their mean over N. clusters: [N], numbers; None where documents are independent. kept: [C, N], visual
    tokens entering a layer; None where the store does not tell.
    """

    lines: Sequence[Record]
    doc_ids: tuple[int, ...]
    scores: Floats
    clusters: tuple[int, ...] | None
    kept: Floats | None

    @property
    def groups(self) -> list[NDArray[np.intp]]:
        """The positions of each cluster's documents."""
        return groups_of(len(self.doc_ids), self.clusters)

    @property
    def baseline(self) -> int | None:
        """Which series is the untouched model."""
        return next((number for number, line in enumerate(self.lines) if line["method"] == BASELINE), None)

    @property
    def top(self) -> float:
        """The highest score; 1 where no score is above 0."""
        return max(float(self.scores.max()), 0.0) or 1.0

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or `top`."""
        return bool(((self.scores == 0) | (self.scores == self.top)).all())

    def only(self, doc_ids: Sequence[int]) -> Answers:
        """The same on these documents, which must be among its own."""
        where = {doc_id: position for position, doc_id in enumerate(self.doc_ids)}
        chosen = [where[doc_id] for doc_id in doc_ids]
        clusters = None if self.clusters is None else tuple(self.clusters[position] for position in chosen)
        kept = None if self.kept is None else self.kept[:, chosen]
        return replace(self, doc_ids=tuple(doc_ids), scores=self.scores[:, chosen], clusters=clusters, kept=kept)

    def cluster_sums(self) -> tuple[Floats, Floats]:
        """Sum of scores of each cluster, [C, G], and sizes of the clusters, [G]."""
        groups = self.groups
        sums = np.stack([cluster_sums(row, groups)[0] for row in self.scores])
        return sums, np.array([len(group) for group in groups], dtype=np.float64)


def answers(results: Results, task: str, metric: str, *, pool: bool = True) -> Answers | None:
    """The series of one metric of one task, the untouched model first if it is there; None where documents are unknown.

    They are unknown for metrics that are not means and in stores that an earlier scoring than version 3 computed.
    Series about other documents than the first one's are left out. pool: whether three or more seeds of a method become
    one series.
    """
    lines = results.select(task, metric)
    groups = pools(results, task, metric) if pool else [([line], line) for line in lines]
    found: list[tuple[Record, list[Record]]] = []
    for members, line in groups:
        stored = [results.stored.get((task, metric, member["cell"]), {}) for member in members]
        if all(each.get("scores") and "clusters" in each for each in stored):
            found.append((line, stored))
    if not found:
        return None
    found.sort(key=lambda entry: entry[0]["method"] != BASELINE)
    first = found[0][1][0]
    ids = list(first["scores"])
    same = [(line, stored) for line, stored in found if all(list(each["scores"]) == ids for each in stored)]
    scores = np.stack([np.mean([_scores(each) for each in stored], axis=0) for _, stored in same])
    kept = None
    if all(each["kept"] is not None for _, stored in same for each in stored):
        kept = np.stack([np.mean([each["kept"] for each in stored], axis=0) for _, stored in same])
    clusters = None if first["clusters"] is None else tuple(first["clusters"])
    return Answers([line for line, _ in same], tuple(map(int, ids)), scores, clusters, kept)


def _scores(stored: Record) -> Floats:
    return np.array(list(stored["scores"].values()), dtype=np.float64) * float(stored["scale"])


@lru_cache(maxsize=16)
def draws(groups: int, seed: int = 0) -> Floats:
    """How often each of G clusters is drawn in each bootstrap resample, [`RESAMPLES`, G], read-only.

    One set of draws serves all series, so that differences and ratios of any two are paired.
    """
    rng = np.random.default_rng(seed)
    made = rng.multinomial(groups, np.full(groups, 1 / groups), RESAMPLES).astype(np.float64)
    made.flags.writeable = False
    return made
