"""Intervals for a metric of one cell, and paired tests against the baseline.

Two cells answer the same questions, so their difference is far better known than either value: pairs are compared, not
means. Where a task names a `cluster_key` (several questions about one picture, say) whole clusters are resampled or
flipped, because questions of one cluster are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
RESAMPLES = 2000
PERMUTATIONS = 9999
ENDS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
"""Of a percentile interval."""
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """What one cell achieved on N documents, in one metric.

    `items` are the N values that the task's `process_results` returned, `aggregate` the function that turns them into
    the metric. `scores` (N) are numbers such that the metric is `scale` times their mean, None where it is not a mean.
    `clusters` (N) names each document's cluster, None where the task has none.
    """

    items: Sequence[Any]
    aggregate: Callable[[list[Any]], float]
    scores: Floats | None
    scale: float = 1.0
    clusters: Sequence[Hashable] | None = None

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return self.scores is not None and bool(np.isin(self.scores, (0.0, 1.0)).all())


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval and the name of the procedure it comes from; None where there is none."""

    low: float | None
    high: float | None
    how: str


@dataclass(frozen=True)
class Paired:
    """A cell minus the baseline on the same documents.

    `p` is two-sided, of the hypothesis of no difference; `how` names interval and test. `n_up` and `n_down` count the
    documents whose score is higher and lower than the baseline's; None for metrics that are not means.
    """

    diff: float
    low: float | None
    high: float | None
    p: float | None
    how: str
    n_up: int | None
    n_down: int | None


def interval(outcomes: Outcomes) -> Interval:
    """The interval of a metric: Wilson for 0/1 scores, else a percentile bootstrap, over clusters if there are any."""
    if outcomes.binary and outcomes.scores is not None:
        n = _effective_n(outcomes.scores, outcomes.clusters)
        low, high = wilson(float(outcomes.scores.mean()), n)
        how = "Wilson" if outcomes.clusters is None else "Wilson, effective n of clusters"
        return Interval(low * outcomes.scale, high * outcomes.scale, how)
    groups = groups_of(len(outcomes.items), outcomes.clusters)
    how = "bootstrap" if outcomes.clusters is None else "cluster bootstrap"
    if outcomes.scores is not None:
        sums, counts = cluster_sums(outcomes.scores * outcomes.scale, groups)
        if alike(sums, counts):
            return Interval(None, None, f"{how}, to which equal scores say nothing")
        return Interval(*_bootstrap_mean(sums, counts), how)
    return Interval(*_ends(_resampled([outcomes], groups, lambda values: values[0])), how)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for a share of `n` questions, which need not be a whole number.

    >>> tuple(round(end, 3) for end in wilson(0.9, 100))
    (0.826, 0.945)
    """
    low, high = proportion_confint(share * n, n, alpha=1 - LEVEL, method="wilson")
    return max(0.0, min(share, float(low))), min(1.0, max(share, float(high)))


def _effective_n(scores: Floats, clusters: Sequence[Hashable] | None) -> float:
    """Independent questions that say as much as these: N over the design effect, and at most N.

    Scores that are all equal do not tell the design effect; it is then taken as 1.
    """
    n = len(scores)
    if clusters is None:
        return float(n)
    sums, counts = cluster_sums(scores, groups_of(n, clusters))
    mean, k = scores.mean(), len(sums)
    if mean in (0.0, 1.0) or k < 2:
        return float(n)
    variance = k / (k - 1) * float(((sums - mean * counts) ** 2).sum()) / n**2
    return min(float(n), float(mean * (1 - mean)) / variance) if variance > 0 else float(n)


def paired(cell: Outcomes, baseline: Outcomes) -> Paired:
    """Compare two cells on the same N documents, which must be in the same order.

    0/1 scores without clusters: Bonett-Price interval (2012) and McNemar's exact test. Other means: bootstrap interval
    and sign-flip test of the (cluster) differences; where all of these are the same, to which a bootstrap is blind, the
    interval of `unresolved`. Metrics that are not means: both by recomputing the metric.
    """
    if cell.scores is None or baseline.scores is None:
        return _paired_aggregate(cell, baseline)
    difference = (cell.scores - baseline.scores) * cell.scale
    up, down, n = int((difference > 0).sum()), int((difference < 0).sum()), len(difference)
    if cell.binary and baseline.binary and cell.clusters is None:
        low, high = bonett_price(up, down, n)
        p = float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0
        how = "Bonett-Price, McNemar exact"
        return Paired((up - down) / n * cell.scale, low * cell.scale, high * cell.scale, p, how, up, down)
    groups = groups_of(n, cell.clusters)
    sums, counts = cluster_sums(difference, groups)
    mean, p = float(difference.mean()), float(sign_flips(sums[None])[0])
    if alike(sums, counts):
        low, high = unresolved(mean, len(groups), float(max(cell.scores.max(), baseline.scores.max())) * cell.scale)
        return Paired(mean, low, high, p, "Bonett-Price where all differ by the same, sign flips", up, down)
    low, high = _bootstrap_mean(sums, counts)
    how = "bootstrap, sign flips" if cell.clusters is None else "cluster bootstrap, sign flips of clusters"
    return Paired(mean, low, high, p, how, up, down)


def bonett_price(up: float, down: float, n: int) -> tuple[float, float]:
    """Interval of a difference of paired proportions: `up` pairs of `n` change from 0 to 1, `down` from 1 to 0.

    >>> tuple(round(end, 3) for end in bonett_price(5, 15, 100))
    (-0.186, -0.01)
    """
    gained, lost = (up + 1) / (n + 2), (down + 1) / (n + 2)
    half = Z * float(np.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2)))
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def groups_of(n: int, clusters: Sequence[Hashable] | None) -> list[NDArray[np.intp]]:
    """The positions of each cluster's documents; every document on its own without clusters."""
    if clusters is None:
        return list(np.arange(n)[:, None])
    members: dict[Hashable, list[int]] = {}
    for position, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(position)
    return [np.array(positions) for positions in members.values()]


def cluster_sums(values: Floats, groups: Sequence[NDArray[np.intp]]) -> tuple[Floats, Floats]:
    """Sum of each cluster's values, and how many they are: [G] and [G] of `values` [N]."""
    sums = np.array([values[group].sum() for group in groups])
    return sums, np.array([len(group) for group in groups], dtype=np.float64)


def alike(sums: Floats, counts: Floats) -> NDArray[np.bool_]:
    """Whether the mean of every cluster is the same, [...] of sums [..., G]: a bootstrap would claim certainty."""
    means = sums / counts
    return np.asarray(np.isclose(means, means[..., :1], rtol=1e-9, atol=1e-12).all(axis=-1))


def unresolved(difference: float, clusters: int, top: float) -> tuple[float, float]:
    """Interval of a difference that every one of so many clusters shows alike, of scores from 0 to `top`.

    That of Bonett and Price for as many pairs of answers, so many of which change that they differ by as much.

    >>> [tuple(round(end, 2) for end in unresolved(difference, 2, 1.0)) for difference in (0.0, 1.0)]
    [(-0.69, 0.69), (-0.35, 1.0)]
    """
    share = difference / top if top else 0.0
    low, high = bonett_price(clusters * max(share, 0.0), clusters * max(-share, 0.0), clusters)
    return low * top, high * top


def _bootstrap_mean(sums: Floats, counts: Floats) -> tuple[float, float]:
    def ratio(total: Floats, count: Floats, axis: int = -1) -> Floats:
        quotient: Floats = total.sum(axis=axis) / count.sum(axis=axis)
        return quotient

    result = stats.bootstrap(
        (sums, counts),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(sums)),
        confidence_level=LEVEL,
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def sign_flips(differences: Floats) -> Floats:
    """Two-sided p of "each difference could as well have the other sign", for each of P comparisons over G clusters.

    differences: [P, G]. Exact where at most 13 of a row are not zero, else over `PERMUTATIONS` draws that all rows
    share: `scipy.stats.permutation_test` draws for each row, which takes a hundred times as long.
    """
    rows, count = differences.shape
    observed = differences.sum(axis=1)
    slack = 1e-9 * np.abs(differences).sum(axis=1)  # sums of the same numbers in another order are ties
    low, high = np.zeros(rows), np.zeros(rows)
    rng = np.random.default_rng(0)
    step = max(1, 4_000_000 // max(1, count))
    for start in range(0, PERMUTATIONS, step):
        signs = rng.choice((-1.0, 1.0), (min(step, PERMUTATIONS - start), count))
        sums = signs @ differences.T
        low += (sums <= observed + slack).sum(axis=0)
        high += (sums >= observed - slack).sum(axis=0)
    p = np.minimum(1.0, 2 * (np.minimum(low, high) + 1) / (PERMUTATIONS + 1))
    for row in np.flatnonzero((differences != 0).sum(axis=1) < np.log2(PERMUTATIONS)):
        nonzero = differences[row][differences[row] != 0]
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(nonzero)))).reshape(2 ** len(nonzero), -1)
        sums = signs @ nonzero
        extreme = min((sums <= observed[row] + slack[row]).mean(), (sums >= observed[row] - slack[row]).mean())
        p[row] = min(1.0, 2 * extreme)
    return p


def _resampled(
    cells: Sequence[Outcomes], groups: Sequence[NDArray[np.intp]], combine: Callable[[list[float]], float]
) -> list[float]:
    """`combine` of the cells' metrics over resampled clusters; nothing if it cannot be computed."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples(len(cells[0].items))):
        chosen = np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))])
        try:
            draws.append(combine([float(c.aggregate([c.items[i] for i in chosen])) for c in cells]))
        except Exception:  # the task's own code, on a subset that it may not have been written for
            return []
    return draws


def _ends(drawn: Sequence[float]) -> tuple[float | None, float | None]:
    """The percentile interval, None where there are no draws or all are the same."""
    if not drawn or min(drawn) == max(drawn):
        return None, None
    low, high = np.quantile(drawn, ENDS)
    return float(low), float(high)


def resamples(documents: int) -> int:
    """How often a metric that is no mean is computed anew for an interval, on so many documents."""
    return int(np.clip(1_000_000 // max(1, documents), 200, RESAMPLES))


def _paired_aggregate(cell: Outcomes, baseline: Outcomes) -> Paired:
    groups = groups_of(len(cell.items), cell.clusters)

    def difference(values: list[float]) -> float:
        return values[0] - values[1]

    observed = float(cell.aggregate(list(cell.items))) - float(baseline.aggregate(list(baseline.items)))
    drawn = _resampled([cell, baseline], groups, difference)
    how = "bootstrap, swaps" if cell.clusters is None else "cluster bootstrap, swaps of clusters"
    p = _swaps(cell, baseline, groups, observed) if drawn else None
    return Paired(observed, *_ends(drawn), p, how, None, None)


def _swaps(cell: Outcomes, baseline: Outcomes, groups: Sequence[NDArray[np.intp]], observed: float) -> float:
    """Two-sided p of "the answers to each cluster could as well be the other's"."""
    rng = np.random.default_rng(0)
    count = resamples(len(cell.items))
    extreme = 0
    for _ in range(count):
        ours, theirs = list(cell.items), list(baseline.items)
        for group, swap in zip(groups, rng.random(len(groups)) < 0.5, strict=True):
            if swap:
                for i in group:
                    ours[i], theirs[i] = theirs[i], ours[i]
        extreme += abs(float(cell.aggregate(ours)) - float(cell.aggregate(theirs))) >= abs(observed) - 1e-12
    return (extreme + 1) / (count + 1)
