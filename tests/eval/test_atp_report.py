"""The embedded ATP weights: trained thresholds beat every form without training at the same mean number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtc import learned, weights
from vtc.eval.training.atp_report import OTHERS, WEIGHTS, advantage, compare, page
from vtc.eval.training.measure import Measurement

FAMILIES = ("existence", "words")


def made(right: list[bool], kept: float = 36.0) -> Measurement:
    return Measurement(tuple(right), FAMILIES * (len(right) // 2), (kept,) * len(right), 144, (144.0, 30.0))


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


def test_the_page_holds_every_form() -> None:
    labels = ("untouched", "trained", *OTHERS)
    text = page(WEIGHTS, {label: made([True, False, True, True]) for label in labels}, 2)
    assert all(f"| {label} | " in text for label in labels)
    assert "4 questions about held-out scenes" in text


def test_the_embedded_weights_load_by_name() -> None:
    method = learned.load(WEIGHTS)
    assert method.name == "atp" and method.weights == WEIGHTS
    assert weights.find(WEIGHTS).stat().st_size < 400_000


@pytest.mark.slow
def test_training_pays(tmp_path: Path) -> None:
    found = compare(WEIGHTS, 30, tmp_path)
    trained = found["trained"]
    for label in ("exact counts", "calibrated", "random modules"):
        other = found[label]
        assert other.retention == pytest.approx(trained.retention, abs=0.02), label
        assert trained.accuracy["mean"] > other.accuracy["mean"], label
