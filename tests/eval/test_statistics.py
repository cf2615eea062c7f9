"""Intervals and paired tests, against scipy and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vtc.eval.statistics import PERMUTATIONS, RESAMPLES, Outcomes, bonett_price, interval, paired, wilson


def mean(items: list[float]) -> float:
    return float(np.mean(items))


def outcomes(scores: list[float] | np.ndarray, *, scale: float = 1.0, clusters: list[int] | None = None) -> Outcomes:
    array = np.asarray(scores, dtype=float)
    return Outcomes(list(array), mean, array, scale, clusters)


def draw(n: int, share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (20, 20), (13, 20), (700, 720)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_scores_of_zero_and_one_get_wilsons_interval_in_the_metrics_own_scale() -> None:
    scores = draw(200, 0.8, 0)
    one, hundred = interval(outcomes(scores)), interval(outcomes(scores, scale=100.0))
    assert one.how == "Wilson"
    assert (one.low, one.high) == pytest.approx(wilson(scores.mean(), 200))
    assert (hundred.low, hundred.high) == pytest.approx((100 * one.low, 100 * one.high))


def test_questions_that_always_agree_within_a_cluster_count_once() -> None:
    scores = draw(60, 0.7, 1)
    repeated, clusters = np.repeat(scores, 5), list(np.repeat(np.arange(60), 5))
    found = interval(outcomes(repeated, clusters=clusters))
    assert found.how == "Wilson, effective n of clusters"
    assert (found.low, found.high) == pytest.approx(wilson(scores.mean(), 60), abs=0.003)


def test_clusters_of_one_change_nothing() -> None:
    scores = draw(300, 0.7, 2)
    found, plain = interval(outcomes(scores, clusters=list(range(300)))), interval(outcomes(scores))
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-3)


def test_other_scores_get_a_bootstrap_close_to_the_normal_interval() -> None:
    scores = np.random.default_rng(3).random(500)
    found = interval(outcomes(scores))
    error = 1.96 * scores.std(ddof=1) / np.sqrt(500)
    assert found.how == "bootstrap"
    assert (found.low, found.high) == pytest.approx((scores.mean() - error, scores.mean() + error), abs=0.003)


def test_metrics_that_are_no_means_are_recomputed_on_resamples() -> None:
    items = list(np.random.default_rng(4).normal(size=200))
    found = interval(Outcomes(items, lambda chosen: float(np.median(chosen)), None))
    assert found.low is not None and found.high is not None
    assert found.low < float(np.median(items)) < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 1.2533 / np.sqrt(200), rel=0.3)


def test_an_aggregate_that_fails_on_subsets_leaves_no_interval() -> None:
    def whole_only(items: list[int]) -> float:
        if items != list(range(10)):
            raise ValueError("needs every document")
        return 1.0

    cell = Outcomes(list(range(10)), whole_only, None)
    assert interval(cell).low is None
    found = paired(cell, cell)
    assert (found.diff, found.low, found.p) == (0.0, None, None)


def test_mcnemar_and_its_interval() -> None:
    ours = np.array([1.0] * 5 + [0.0] * 15 + [1.0] * 80)
    theirs = np.array([0.0] * 5 + [1.0] * 15 + [1.0] * 80)
    found = paired(outcomes(ours), outcomes(theirs))
    assert (found.n_up, found.n_down) == (5, 15)
    assert found.diff == pytest.approx(-0.1)
    assert found.p == pytest.approx(stats.binomtest(5, 20).pvalue)
    assert (found.low, found.high) == pytest.approx(bonett_price(5, 15, 100))
    # Bonett and Price (2012): one change of each kind is added, then the interval is that of Wald.
    gained, lost = 6 / 102, 16 / 102
    half = 1.959964 * np.sqrt((gained + lost - (gained - lost) ** 2) / 102)
    assert (found.low, found.high) == pytest.approx((gained - lost - half, gained - lost + half), abs=1e-6)


def test_no_difference_is_not_certainty() -> None:
    scores = draw(100, 0.9, 5)
    for clusters in (None, list(range(100))):
        found = paired(outcomes(scores, clusters=clusters), outcomes(scores, clusters=clusters))
        assert found.diff == 0.0 and found.p == 1.0
        assert found.low is not None and found.high is not None
        assert found.low < 0.0 < found.high


@pytest.mark.parametrize("scores", [(1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), (1.0, 0.0, 1.0, 0.0)])
@pytest.mark.parametrize("clusters", [[0, 0, 1, 1], [0, 0, 0, 0], None])
def test_clusters_that_agree_are_not_certainty(scores: tuple[float, ...], clusters: list[int] | None) -> None:
    if clusters is None and scores[1] == 0.0:
        pytest.skip("these documents differ")
    found = paired(outcomes(np.array(scores), clusters=clusters), outcomes(np.zeros(4), clusters=clusters))
    assert found.low is not None and found.high is not None and found.diff == np.mean(scores)
    assert found.high - found.low > 0.4 and found.low <= found.diff <= found.high
    if clusters is not None:
        assert found.low < 0 < found.high and found.p is not None and found.p >= 0.5
    alone = interval(outcomes(np.full(4, 0.5), clusters=clusters))
    assert alone.low is None and alone.high is None


def test_clusters_widen_a_paired_interval() -> None:
    rng = np.random.default_rng(6)
    theirs = np.repeat((rng.random(50) < 0.9).astype(float), 6)
    ours = np.where(np.repeat(rng.random(50) < 0.2, 6), 0.0, theirs)
    clusters = list(np.repeat(np.arange(50), 6))
    alone = paired(outcomes(ours), outcomes(theirs))
    grouped = paired(outcomes(ours, clusters=clusters), outcomes(theirs, clusters=clusters))
    assert grouped.diff == pytest.approx(alone.diff)
    assert grouped.how == "cluster bootstrap, sign flips of clusters"
    assert None not in (grouped.low, grouped.high, alone.low, alone.high, grouped.p, alone.p)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)  # type: ignore[operator]
    assert grouped.p > alone.p  # type: ignore[operator]


def test_the_sign_flip_test_is_exact_for_few_differences() -> None:
    ours = outcomes([0.9, 0.8, 0.7, 0.5, 0.5])
    theirs = outcomes([0.1, 0.2, 0.3, 0.5, 0.5])
    found = paired(ours, theirs)
    assert found.p == pytest.approx(2 / 2**3)
    assert paired(outcomes([0.9, 0.5]), outcomes([0.1, 0.5])).p == 1.0


def test_pairs_of_metrics_that_are_no_means() -> None:
    rng = np.random.default_rng(7)
    theirs = list(rng.normal(size=80))
    ours = [value + 1.0 for value in theirs]

    def median(items: list[float]) -> float:
        return float(np.median(items))

    found = paired(Outcomes(ours, median, None), Outcomes(theirs, median, None))
    assert found.diff == pytest.approx(1.0)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))
    assert found.p is not None and found.p < 0.01 and found.n_up is None


def test_no_number_of_resamples_proves_anything() -> None:
    """The observed arrangement is one of those that could be: p is never 0."""
    theirs = list(np.random.default_rng(8).normal(size=60))
    ours = [value + 5.0 for value in theirs]

    def lowest(items: list[float]) -> float:
        return min(items)

    swapped = paired(Outcomes(ours, lowest, None), Outcomes(theirs, lowest, None))
    extreme = swapped.p * (RESAMPLES + 1) - 1 if swapped.p is not None else -1.0
    assert extreme >= -1e-9 and extreme == pytest.approx(round(extreme), abs=1e-6)

    def median(items: list[float]) -> float:
        return float(np.median(items))

    assert paired(Outcomes(ours, median, None), Outcomes(theirs, median, None)).p == 1 / (RESAMPLES + 1)
    flipped = paired(outcomes(np.array(ours)), outcomes(np.array(theirs)))
    assert flipped.p == pytest.approx(2 / (PERMUTATIONS + 1))


def test_a_cluster_brings_its_sum_and_its_size_together() -> None:
    """Drawn apart, sums and sizes of unequal clusters would make a mean of anything."""
    sizes = np.arange(1, 31)
    clusters = list(np.repeat(np.arange(30), sizes))
    scores = 0.5 + np.where(np.array(clusters) % 2, 0.01, -0.01)
    found = interval(outcomes(scores, clusters=clusters))
    assert found.how == "cluster bootstrap"
    assert found.low is not None and found.high is not None
    assert 0.49 <= found.low < found.high <= 0.51


def test_both_cells_are_recomputed_on_the_same_documents() -> None:
    theirs = list(np.random.default_rng(9).normal(size=40))
    ours = [value + 1.0 for value in theirs]
    cells = [Outcomes(values, lambda chosen: float(np.median(chosen)), None) for values in (ours, theirs)]
    found = paired(*cells)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))


def test_the_design_effect_of_few_clusters() -> None:
    """The variance of a mean over k clusters, with k / (k - 1) for the mean that was estimated from them."""
    scores = np.array([1.0, 1, 1, 1, 1, 1, 0, 0, 0])
    clusters = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    mean = 6 / 9
    residues = [4 - 4 * mean, 2 - 3 * mean, 0 - 2 * mean]
    variance = 3 / 2 * sum(residue**2 for residue in residues) / 9**2
    effective = mean * (1 - mean) / variance
    assert effective < 9
    found = interval(outcomes(scores, clusters=clusters))
    assert (found.low, found.high) == pytest.approx(wilson(mean, effective), abs=1e-12)
