"""Where names stand, what the Pareto front is, and what specifications hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vtc.eval import charts
from vtc.eval.curves import _axis, axes, curves, figure, front, points, spread
from vtc.eval.results import read_results
from vtc.eval.tables import grid

WriteStore = Callable[..., Path]


@pytest.mark.parametrize("seed", range(20))
def test_names_stand_apart_in_order_and_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = np.round(rng.beta(0.4, 0.4, 14) * 100, 1).tolist()
    places = spread(wanted, 5.0, (0.0, 100.0))
    order = sorted(range(14), key=lambda n: wanted[n])
    gaps = np.diff([places[n] for n in order])
    assert gaps.min() >= 5.0 - 1e-9
    assert min(places) >= -1e-9 and max(places) <= 100.0 + 1e-9


def test_names_that_have_room_stay_where_lines_end() -> None:
    assert spread([10.0, 40.0, 20.0], 5.0, (0.0, 100.0)) == [10.0, 40.0, 20.0]


def test_names_without_room_run_over_the_upper_end_and_stay_apart() -> None:
    places = spread([1.0, 1.0, 1.0], 5.0, (0.0, 6.0))
    assert np.diff(places).min() == pytest.approx(5.0) and min(places) == 0.0


@pytest.mark.parametrize("better", [True, False])
def test_the_front_is_what_no_other_point_beats(better: bool) -> None:
    rng = np.random.default_rng(0)
    drawn = [{"x": float(rng.integers(1, 12)), "value": float(rng.integers(0, 12))} for _ in range(60)]
    sign = 1 if better else -1

    def beaten(point: dict[str, float]) -> bool:
        return any(
            other["x"] <= point["x"] and sign * other["value"] >= sign * point["value"] and other != point
            for other in drawn
        )

    expected = {(point["x"], point["value"]) for point in drawn if not beaten(point)}
    assert {(point["x"], point["value"]) for point in front(drawn, "x", better=better)} == expected


def test_a_cost_is_an_axis_where_the_store_knows_it(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path, [("none", 1.0), ("a", 0.5), ("a", 0.25)], {"t": [[1.0, 1], [1.0, 0], [0.0, 0]]})
    results = read_results(tmp_path)
    data = grid(results, "t", "accuracy")
    drawn = points(results, data)
    assert [(point["share"], point["seconds"], point["value"]) for point in drawn] == [(50, 0.5, 50), (25, 0.25, 0)]
    assert axes(drawn) == ["share", "seconds"]
    assert axes([point | {"flops": 1e9} for point in drawn]) == ["share", "flops", "seconds"]
    spec = curves(results, data, "seconds")
    assert {"seconds per answer, measured"} == {
        layer["encoding"]["x"]["axis"]["title"] for layer in spec["layer"] if layer["encoding"].get("x", {}).get("axis")
    }


def test_the_axis_holds_every_interval_that_is_shown_and_ends_at_all(tmp_path: Path, write_store: WriteStore) -> None:
    answers = [[1] * 12, [0] + [1] * 11, [1, 0, 0] * 4]
    write_store(tmp_path, [("none", 1.0), ("a", 0.5), ("b", 0.5)], {"t": answers})
    results = read_results(tmp_path)
    data = grid(results, "t", "accuracy")
    lows = [point["low"] for point in points(results, data)]
    (low, high) = curves(results, data, "share")["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert None not in lows and low < min(lows) < 30 and high == 100


def test_budgets_that_leave_as_many_tokens_stand_apart_by_their_cost(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path, [("none", 1.0), ("a", 0.5), ("a", 0.25)], {"t": [[1, 1], [1, 0], [0, 0]]})
    drawn = points(results := read_results(tmp_path), grid(results, "t", "accuracy"))
    assert _axis([point | {"flops": 1e9} for point in drawn]) == "share"
    assert _axis([point | {"flops": 1e9, "share": 100} for point in drawn]) == "flops"
    assert _axis([point | {"share": 100} for point in drawn]) == "share"


def test_a_picture_is_drawn_without_a_browser(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path, [("none", 1.0), ("a", 0.5), ("b", 0.5)], {"t": [[1.0, 1], [1.0, 0], [1.0, 1]]})
    svg = charts.picture(figure(read_results(tmp_path)), "svg").decode()
    assert all(f">{name}</text>" in svg for name in ("a", "b", "untouched", "t", "tiny"))
    assert charts.picture(figure(read_results(tmp_path)), "png")[:8] == b"\x89PNG\r\n\x1a\n"
