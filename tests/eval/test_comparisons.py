"""Derived numbers against scipy, statsmodels and slow plain references."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from vtc.eval.answers import Answers, answers
from vtc.eval.comparisons import holm, needed, pairs, retained, seeds_to_untouched
from vtc.eval.difficulty import groups, oracles
from vtc.eval.results import read_results
from vtc.eval.statistics import PERMUTATIONS, sign_flips
from vtc.eval.tables import grid

WriteStore = Callable[..., Path]


def data(
    scores: list[list[float]] | np.ndarray,
    names: list[tuple[str, float | None]],
    clusters: list[int] | None = None,
) -> Answers:
    lines = [{"method": method, "retention": retention, "higher_is_better": True} for method, retention in names]
    array = np.array(scores, dtype=float)
    kept = np.array([[100.0 * (retention or 0.3)] * array.shape[1] for _, retention in names])
    return Answers(lines, tuple(range(array.shape[1])), array, None if clusters is None else tuple(clusters), kept)


def draw(n: int, share: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(n) < share).astype(float).tolist()


def test_holm_as_statsmodels_has_it() -> None:
    values = [0.04, None, 0.01, 0.03, 0.005, 1.0]
    expected = iter(multipletests([p for p in values if p is not None], method="holm")[1])
    assert holm(values) == [None if p is None else pytest.approx(next(expected)) for p in values]
    assert holm([]) == [] and holm([None]) == [None]


def test_pairs_of_independent_questions_are_mcnemars() -> None:
    a, b, c = draw(80, 0.9, 0), draw(80, 0.7, 1), draw(80, 0.5, 2)
    found = pairs(data([[1.0] * 80, a, b, c], [("none", 1.0), ("a", 0.5), ("b", 0.5), ("c", 0.25)]))
    (pair,) = found  # c has no partner at its retention
    up = sum(x > y for x, y in zip(a, b, strict=True))
    down = sum(x < y for x, y in zip(a, b, strict=True))
    assert (pair.one, pair.other, pair.retention) == ("a", "b", 0.5)
    assert pair.diff == pytest.approx(np.mean(a) - np.mean(b))
    assert pair.p == pytest.approx(stats.binomtest(up, up + down).pvalue) == pair.p_holm


def test_pairs_with_clusters_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 4)
    methods = [(rng.random(40) < share)[clusters] * 0.5 + rng.random(160) * 0.5 for share in (0.8, 0.6, 0.7)]
    found = pairs(data(np.array(methods), [("a", 0.5), ("b", 0.5), ("c", 0.5)], clusters.tolist()))
    assert [(pair.one, pair.other) for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair, (one, other) in zip(found, itertools.combinations(range(3), 2), strict=True):
        sums = (methods[one] - methods[other]).reshape(40, 4).sum(axis=1)
        test = stats.permutation_test(
            (sums, np.zeros(40)), lambda x, y, axis=-1: (x - y).sum(axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=9999, rng=np.random.default_rng(1),
        )  # fmt: skip
        assert pair.p == pytest.approx(test.pvalue, abs=4 * math.sqrt(0.25 / PERMUTATIONS))
        ends = stats.bootstrap((sums / 4,), np.mean, method="percentile", rng=np.random.default_rng(1))
        assert (pair.low, pair.high) == pytest.approx(tuple(ends.confidence_interval), abs=0.02)
    corrected = multipletests([pair.p for pair in found], method="holm")[1]
    assert [pair.p_holm for pair in found] == pytest.approx(corrected)


def test_equal_answers_are_no_certainty_between_methods() -> None:
    hits = draw(50, 0.8, 4)
    (pair,) = pairs(data([hits, hits], [("a", 0.5), ("b", 0.5)], [n // 2 for n in range(50)]))
    assert (pair.diff, pair.p) == (0.0, 1.0)
    assert pair.low < 0.0 < pair.high


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_sign_flips_of_few_differences_are_all_tried(count: int) -> None:
    values = np.array([0.7, -0.2, 0.9, 0.4, 0.1, 0.3, 0.3, -0.1, 0.8])[:count]
    padded = np.concatenate([values, np.zeros(20)])[None]
    sums = [
        sum(s * v for s, v in zip(signs, values, strict=True)) for signs in itertools.product((-1, 1), repeat=count)
    ]
    above = np.mean([total >= values.sum() - 1e-12 for total in sums])
    below = np.mean([total <= values.sum() + 1e-12 for total in sums])
    assert sign_flips(padded)[0] == pytest.approx(min(1.0, 2 * min(above, below)))


def test_retained_percent_is_the_mean_of_ratios(tmp_path: Path, write_store: WriteStore) -> None:
    scores = {
        "t": [[1.0, 1, 1, 1, 0] * 40, draw(200, 0.6, 5), draw(200, 0.3, 6)],
        "u": [[1.0, 0, 0, 0, 1] * 40, draw(200, 0.3, 7), draw(200, 0.3, 8)],
    }
    write_store(tmp_path, [("none", 1.0), ("a", 0.5), ("b", 0.5)], scores)
    ranking = retained(read_results(tmp_path))
    assert [entry.method for entry in ranking] == ["a", "b"]
    for entry, cell in zip(ranking, (1, 2), strict=True):
        ratios = {task: 100 * sum(values[cell]) / sum(values[0]) for task, values in scores.items()}
        assert entry.tasks == pytest.approx(ratios)
        assert entry.percent == pytest.approx(np.mean(list(ratios.values())))
        assert entry.tokens == pytest.approx(50.0)
        rng, drawn = np.random.default_rng(9), []
        for _ in range(2000):
            parts = []
            for values in scores.values():
                chosen = rng.integers(0, 200, 200)
                parts.append(100 * sum(values[cell][i] for i in chosen) / sum(values[0][i] for i in chosen))
            drawn.append(np.mean(parts))
        assert (entry.low, entry.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=2.0)


def test_the_same_answers_are_no_certainty_of_a_percent(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path, [("none", 1.0), ("a", 0.5)], {"t": [[1.0, 1, 0, 1], [1.0, 1, 0, 1]]})
    (entry,) = retained(read_results(tmp_path))
    assert entry.percent == 100.0 and entry.low is not None and entry.high is not None
    assert entry.low < 70 and entry.high > 130


def test_a_method_that_lacks_a_task_is_not_ranked(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path, [("none", 1.0), ("a", 0.5)], {"t": [[1.0, 1], [1.0, 0]], "u": [[0.0, 0], [0.0, 0]]})
    (entry,) = retained(read_results(tmp_path))  # of u, where untouched is worth nothing, no percent exists
    assert (entry.tasks, entry.percent) == ({"t": 50.0}, 50.0)


def test_columns_of_a_table(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(
        tmp_path, [("none", 1.0), ("a", 0.5), ("a", 0.25)], {"t": [[1.0, 1, 1, 1], [1.0, 1, 1, 0], [1.0, 0, 0, 0]]}
    )
    lines = read_results(tmp_path).lines
    assert [line["retained"] for line in lines] == [None, 75.0, 25.0]
    assert [line["tokdense"] for line in lines] == [1.0, 1.5, 1.0]  # percent over tokens: 100 / 100, 75 / 50, 25 / 25
    assert [line["p_holm"] for line in lines] == [None, 0.02, 0.02]


def test_three_seeds_are_one_line_with_mean_and_spread(tmp_path: Path, write_store: WriteStore) -> None:
    cells = [("none", 1.0), ("a", 0.5), *(("random", 0.5, seed) for seed in (0, 1, 2)), ("random", 0.25, 0)]
    values = [[1.0] * 4, [1.0, 1, 1, 0], [1.0, 0, 0, 0], [1.0, 1, 0, 0], [1.0, 1, 1, 0], [0.0, 0, 0, 1]]
    write_store(tmp_path, cells, {"t": values})
    results = read_results(tmp_path)
    entries = grid(results, "t", "accuracy").entries
    assert set(entries) == {("a", 0.5), ("random, 3 seeds", 0.5), ("random(seed=0)", 0.25)}
    line = entries["random, 3 seeds", 0.5]
    assert (line["value"], line["spread"], line["seeds"]) == (pytest.approx(0.5), pytest.approx(0.25), 3)
    assert line["p_holm"] is None and line["ci_low"] is None
    assert len(results.lines) == 6  # metrics.csv keeps every seed
    found = answers(results, "t", "accuracy")
    assert found is not None
    (difference,) = seeds_to_untouched(found)
    assert difference.diff == pytest.approx(-0.5)
    ranked = {entry.method: entry for entry in retained(results)}
    assert ranked["random, 3 seeds"].percent == pytest.approx(50.0)
    assert ranked["random, 3 seeds"].spread == pytest.approx(25.0)


def test_questions_needed_are_those_of_a_paired_test() -> None:
    untouched, method = [1.0] * 400, [0.0] * 60 + [1.0] * 340
    (entry,) = needed(data([untouched, method], [("none", 1.0), ("a", 0.5)]), (1.0, 2.0, 5.0, 50.0))
    assert (entry.discordance, entry.design) == (pytest.approx(0.15), 1.0)
    for points in (1.0, 2.0, 5.0):
        effect = points / 100 / math.sqrt(0.15 - (points / 100) ** 2)
        expected = TTestPower().solve_power(effect_size=effect, alpha=0.05, power=0.8)
        assert entry.questions[points] == math.ceil(expected)
    # Connor (1987), without the small-sample part of the t distribution
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert entry.questions[2.0] == pytest.approx(z**2 * (0.15 - 0.02**2) / 0.02**2, rel=0.01)
    assert 50.0 not in entry.questions


def test_questions_of_a_cluster_that_answer_alike_count_once() -> None:
    untouched, change = np.ones(300), np.repeat(draw(100, 0.8, 10), 3)
    clusters = np.repeat(np.arange(100), 3).tolist()
    names: list[tuple[str, float | None]] = [("none", 1.0), ("a", 0.5)]
    alone, together = (needed(data([untouched, change], names, c))[0] for c in (None, clusters))
    assert together.design == pytest.approx(3.0 * 100 / 99, rel=1e-6)
    assert together.questions[5.0] == pytest.approx(together.design * alone.questions[5.0], rel=0.01)


def test_scores_between_zero_and_one_need_no_number() -> None:
    assert needed(data([[1.0, 0.5], [0.3, 0.2]], [("none", 1.0), ("a", 0.5)])) == []


def test_the_oracle_takes_the_least_tokens_that_are_as_right() -> None:
    rng = np.random.default_rng(11)
    names: list[tuple[str, float | None]] = [("none", 1.0), ("a", 0.5), ("a", 0.25), ("a", 0.1), ("b", 0.5)]
    scores = rng.integers(0, 2, (5, 60)).astype(float)
    (found,) = oracles(data(scores, names))  # b has a single retention
    value = tokens = 0.0
    for doc in range(60):
        options = [(100.0 * (names[cell][1] or 0), scores[cell][doc]) for cell in (1, 2, 3, 0)]
        least = min(option for option in options if option[1] >= scores[0][doc])
        tokens, value = tokens + least[0] / 60, value + least[1] / 60
    assert (found.method, found.untouched_tokens) == ("a", 100.0)
    assert (found.value, found.tokens) == (pytest.approx(value), pytest.approx(tokens))


def test_groups_are_what_down_sampling_loses_and_keeps() -> None:
    untouched = [1.0, 1, 1, 1, 0, 0]
    control = [1.0, 1, 0, 0, 1, 0]
    method = [1.0, 0, 1, 0, 1, 1]
    names: list[tuple[str, float | None]] = [("none", 1.0), ("downsample", 0.25), ("a", 0.25), ("a", 0.5)]
    hard, easy = groups(data([untouched, control, method, method], names))
    assert (hard.name, hard.questions, hard.retention) == ("A", 2, 0.25)
    assert hard.accuracy == {"downsample": 0.0, "a": 0.5}
    assert (easy.name, easy.questions, easy.accuracy["a"]) == ("B", 2, 0.5)
    assert groups(data([untouched, method], [("none", 1.0), ("a", 0.25)])) == []
