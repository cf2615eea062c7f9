"""The embedded ATP weights: trained thresholds beat the forms without training at the same mean number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtc.eval.training.atp_report import OTHERS, WEIGHTS, advantage, compare, report
from vtc.eval.training.measure import Measurement
from vtc.method import learned, weights

FAMILIES = ("existence", "words")


def made(right: list[bool], kept: float = 36.0) -> Measurement:
    return Measurement(
        tuple(right), FAMILIES * (len(right) // 2), (kept,) * len(right), (144,) * len(right), (144.0, 30.0)
    )


def test_the_advantage_is_paired() -> None:
    a, b = made([True, True, False, True]), made([True, False, False, True])
    mean, half = advantage(a, b)
    assert mean == 0.25
    assert half == pytest.approx(1.96 * 0.5 / 2)
    assert advantage(a, a) == (0.0, 0.0)


def test_a_measurement_counts_by_family() -> None:
    found = made([True, True, False, True], kept=72.0)
    assert found.accuracy == {"existence": 0.5, "words": 1.0, "mean": 0.75}
    assert found.kept_by_family() == {"existence": 0.5, "words": 0.5}
    assert (found.retention, found.spread) == (0.5, 0.0)
    other = Measurement(
        (True, True), FAMILIES, (10.0, 10.0), (100, 20), (60.0,)
    )  # a question of few tokens counts less
    assert (other.retention, other.tokens) == (20 / 120, 60)
    assert other.spread == pytest.approx(0.2)


def test_the_page_holds_every_form() -> None:
    labels = ("untouched", "trained", *OTHERS)
    found = {label: made([True, False, True, True]) for label in labels}
    text = report(dict.fromkeys(WEIGHTS, found), 2)
    assert all(text.count(f"| {label} | ") >= 2 for label in labels)
    assert "4 questions of tiny_image about held-out samples, tiny-llava" in " ".join(text.split())
    assert text.count("vtc train --method atp") == len(WEIGHTS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_embedded_weights_load_by_name(name: str) -> None:
    method = learned.load(name)
    assert method.name == "atp" and method.weights == name
    assert weights.find(name).stat().st_size < 400_000


@pytest.mark.slow
def test_training_pays(tmp_path: Path) -> None:
    found = compare(WEIGHTS[0], 20, tmp_path)
    trained = found["trained"]
    for label in OTHERS:
        assert found[label].retention == pytest.approx(trained.retention, abs=0.02), label
    for label in ("exact counts", "calibrated", "random modules"):  # the counts are what was learned: see the page
        assert trained.accuracy["mean"] > found[label].accuracy["mean"], label
