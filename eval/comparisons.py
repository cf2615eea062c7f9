"""What follows from the scores of several cells: pairs of methods, performance retained, questions needed.

All intervals are percentile bootstraps over the clusters of `vtc.eval.statistics`, with draws that all cells share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats
from statsmodels.stats.power import TTestPower

from vtc.eval.answers import Answers, answers, draws
from vtc.eval.cells import BASELINE
from vtc.eval.results import Asked, Results, asked, budget_order
from vtc.eval.seeds import pools
from vtc.eval.statistics import ENDS, Floats, Z, alike, bonett_price, sign_flips, unresolved
from vtc.eval.store import Record

POINTS = (1.0, 2.0, 5.0)
POWER = 0.8


def holm(p: Sequence[float | None]) -> list[float | None]:
    """P values corrected by Holm's method for how many of them there are; what is None stays so and does not count.

    `statsmodels` has it too, and collects garbage in every call: half a second where torch is loaded.

    >>> holm([0.01, None, 0.04])
    [0.02, None, 0.04]
    """
    order = sorted((value, place) for place, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, place) in enumerate(order):
        highest = max(highest, min(1.0, value * (len(order) - rank)))
        corrected[place] = highest
    return corrected


@dataclass(frozen=True)
class Pair:
    """Method `one` minus method `other` at the same retention on the same documents, in the metric's scale.

    p: two-sided, of no difference; p_holm: corrected for all pairs of their table.
    """

    retention: Asked
    one: str
    other: str
    diff: float
    low: float
    high: float
    p: float
    p_holm: float


def pairs(data: Answers) -> list[Pair]:
    """All pairs of methods at equal retention; Holm's correction runs over the pairs of each retention."""
    made = []
    retentions = dict.fromkeys(asked(line) for line in data.lines if line["method"] != BASELINE)
    for retention in retentions:
        series = [n for n, line in enumerate(data.lines) if asked(line) == retention and n != data.baseline]
        made += paired_series(data, list(itertools.combinations(series, 2)))
    return made


def paired_series(data: Answers, couples: Sequence[tuple[int, int]]) -> list[Pair]:
    """The first minus the second series of each couple, numbers of `data`; Holm's correction runs over all of them.

    0/1 scores without clusters: McNemar's exact test and the Bonett-Price interval, else sign flips and bootstrap of
    the (cluster) differences, `unresolved` where these are all the same. `retention` is the first one's.
    """
    if not couples:
        return []
    one, other = (np.array(side) for side in zip(*couples, strict=True))
    sums, sizes = data.cluster_sums()
    weights = draws(len(sizes))
    differences = sums[one] - sums[other]
    means = (weights @ differences.T) / (weights @ sizes)[:, None]
    low, high = np.quantile(means, ENDS, axis=0)
    p = sign_flips(differences)
    top, diff = data.top, differences.sum(axis=1) / sizes.sum()
    for number in np.flatnonzero(alike(differences, sizes)):
        low[number], high[number] = unresolved(float(diff[number]), len(sizes), top)
    hits = ((data.scores == 0) | (data.scores == top)).all(axis=1) & (data.clusters is None)
    for number in np.flatnonzero(hits[one] & hits[other]):
        change = data.scores[one[number]] - data.scores[other[number]]
        up, down = int((change > 0).sum()), int((change < 0).sum())
        low[number], high[number] = (end * top for end in bonett_price(up, down, len(change)))
        p[number] = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    corrected = holm(p.tolist())
    return [
        Pair(asked(data.lines[a]), data.lines[a]["method"], data.lines[b]["method"], *map(float, numbers))
        for (a, b), *numbers in zip(couples, diff, low, high, p, corrected, strict=True)
    ]


def seeds_to_untouched(data: Answers) -> list[Pair]:
    """Series of several seeds minus the untouched model, which no line of the results has: those are about cells."""
    pooled = [number for number, line in enumerate(data.lines) if line.get("seeds")]
    return [] if data.baseline is None else paired_series(data, [(number, data.baseline) for number in pooled])


@dataclass(frozen=True)
class Retained:
    """Performance of a method in percent of the untouched model's: ratio per task, then the mean over tasks.

    low, high: 95 % bootstrap interval over questions, paired with the untouched model; None without scores by document.
    tokens: mean over tasks of the share of visual tokens that enter a layer, in percent. tasks: the percent of each.
    spread: standard deviation over seeds of a method that ran with several. resampled: the percent in each resample,
    [R], from which the interval is; None without one.
    """

    retention: Asked
    method: str
    percent: float
    low: float | None
    high: float | None
    tokens: float | None
    tasks: Mapping[str, float]
    spread: float | None = None
    resampled: Floats | None = field(default=None, repr=False, compare=False)


def retained(results: Results, seeds: Mapping[str, int] | None = None) -> list[Retained]:
    """Each method at each retention over all tasks on whose main metric more is better, the best of a retention first.

    seeds: of each task's draws, other ones for other questions; the tasks' numbers if nothing is said.
    A method that lacks one of these tasks at a retention has no mean over them and is left out there.
    """
    chosen = ranked_tasks(results)
    lines: dict[tuple[Asked, str], dict[str, Record]] = {}
    resampled: dict[tuple[Asked, str], dict[str, Floats]] = {}
    for number, task in enumerate(chosen):
        metric = results.main_metric(task)
        for _, line in pools(results, task, metric):
            if line["method"] != BASELINE:
                lines.setdefault((asked(line), line["method"]), {})[task] = line
        data = answers(results, task, metric)
        if data is not None and data.baseline is not None:
            for index, drawn in _ratios(data, number if seeds is None else seeds[task]).items():
                line = data.lines[index]
                resampled.setdefault((asked(line), line["method"]), {})[task] = drawn
    made = []
    for key, by_task in lines.items():
        if len(by_task) < len(chosen):
            continue
        ratios = list(resampled.get(key, {}).values())
        mean = np.mean(ratios, axis=0) if len(ratios) == len(chosen) else None
        low, high = ends(mean)
        percent = {task: float(line["retained"]) for task, line in by_task.items()}
        tokens = _mean(_percent(line["visual_tokens_kept"], line["visual_tokens_in"]) for line in by_task.values())
        spreads = [_percent(line.get("spread"), line["value"]) for line in by_task.values()]
        spread = _mean(None if s is None else s * percent[task] / 100 for task, s in zip(by_task, spreads, strict=True))
        made.append(Retained(*key, float(np.mean(list(percent.values()))), low, high, tokens, percent, spread, mean))
    return sorted(made, key=lambda r: (budget_order(r.retention), -r.percent, r.method))


def ends(resampled: Floats | None) -> tuple[float | None, float | None]:
    """The 95 % interval of a figure from what it is in each resample; None where that is not known."""
    if resampled is None:
        return None, None
    low, high = np.nanquantile(resampled, ENDS)
    return float(low), float(high)


def ranked_tasks(results: Results) -> list[str]:
    """The tasks that `retained` is about: the untouched model has a positive value, and more of it is better."""
    chosen = []
    for task in results.tasks:
        lines = [line for line in results.select(task, results.main_metric(task)) if line["method"] == BASELINE]
        if lines and lines[0]["higher_is_better"] and lines[0]["value"] > 0:
            chosen.append(task)
    return chosen


def _percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return float(np.mean(known)) if known and len(known) == len(numbers) else None


def _ratios(data: Answers, task: int) -> dict[int, Floats]:
    """Percent of the untouched model in each resample, [R], by number of the series; each `task` is drawn apart."""
    assert data.baseline is not None
    sums, sizes = data.cluster_sums()
    others = [number for number in range(len(data.lines)) if number != data.baseline]
    noise, totals = np.random.default_rng(task), draws(len(sizes), task) @ sums.T
    both = ([n, data.baseline] for n in others)
    return {each[0]: resampled_ratio(totals[:, each], sums[each], sizes, data.top, noise) for each in both}


def resampled_ratio(totals: Floats, sums: Floats, sizes: Floats, top: float, noise: np.random.Generator) -> Floats:
    """[R] percent of the second of two series that the first reaches in each resample of the clusters.

    totals: [R, 2] in each resample. sums: [2, G] of the clusters, sizes: [G]. Where all clusters show the same
    difference, what is drawn is `noise`, as wide as the interval of `unresolved`.
    """
    one, base = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios: Floats = 100 * totals[:, 0] / np.where(totals[:, 1] > 0, totals[:, 1], np.nan)
    if alike(one - base, sizes):
        difference, mean = float((one - base).sum() / sizes.sum()), float(base.sum() / sizes.sum())
        low, high = unresolved(difference, len(sizes), top)
        ratios += noise.normal(0, 100 * (high - low) / 2 / Z / mean, len(ratios)) if mean > 0 else np.nan
    return ratios


@dataclass(frozen=True)
class Needed:
    """Questions that a true difference needs to be found at p < 0.05 in four of five sweeps.

    discordance: share of questions on which a method and the untouched model differ, mean over the methods.
    design: how many clustered questions say as much as one that is independent. questions: by points of difference.
    """

    retention: Asked
    discordance: float
    design: float
    questions: Mapping[float, int]


def needed(data: Answers, points: Sequence[float] = POINTS) -> list[Needed]:
    """Questions needed at each retention, from the paired differences to the untouched model that were observed.

    Paired 0/1 scores that differ on a share d of the questions have differences of variance d - x^2 under a true
    difference x; the number is that of a paired test of such differences (`statsmodels` TTestPower), times the design
    effect of clusters. None where scores are not 0/1 or no method differs.
    """
    if not data.binary or data.baseline is None:
        return []
    top = data.top
    sums, sizes = data.cluster_sums()
    made = []
    retentions = dict.fromkeys(asked(line) for line in data.lines if line["method"] != BASELINE)
    for retention in retentions:
        series = [n for n, line in enumerate(data.lines) if asked(line) == retention and n != data.baseline]
        single = [n for n in series if not data.lines[n].get("seeds")]
        differences = (data.scores[single] - data.scores[data.baseline]) / top
        discordance = float((differences != 0).mean()) if single else 0.0
        if discordance == 0.0:
            continue
        clustered = (sums[single] - sums[data.baseline]) / top
        design = _design_effect(differences, clustered, sizes)
        questions = {}
        for point in points:
            variance = discordance - (point / 100) ** 2
            if variance <= 0:
                continue  # no such difference can be with so few questions that differ
            effect = point / 100 / float(np.sqrt(variance))
            alone = float(TTestPower().solve_power(effect_size=effect, alpha=0.05, power=POWER))
            questions[point] = int(np.ceil(max(alone, 2.0) * design))
        made.append(Needed(retention, discordance, design, questions))
    return made


def _design_effect(differences: Floats, clustered: Floats, sizes: Floats) -> float:
    """Variance of the mean difference by clusters over that of independent questions, over all series; at least 1."""
    n, k = differences.shape[1], len(sizes)
    if k == n or k < 2:
        return 1.0
    means = differences.mean(axis=1, keepdims=True)
    by_cluster = k / (k - 1) * ((clustered - means * sizes) ** 2).sum()
    alone = ((differences - means) ** 2).sum()
    return max(1.0, float(by_cluster / alone)) if alone > 0 else 1.0
