"""Cells: which there are, and what their key depends on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import vtc
from vtc.errors import UnknownName, VTCError
from vtc.eval.cells import BASELINE, Cell, make_cells
from vtc.eval.spec import make_spec

MODEL = {"weights": "0123", "dtype": "float32"}


def cells(**settings: Any) -> list[Cell]:
    return make_cells(make_spec(settings), MODEL)


def test_the_baseline_comes_first_and_is_not_doubled_by_naming_it() -> None:
    made = cells(methods=["none", "stride"], retentions=[0.5])
    assert [(c.method, c.retention) for c in made] == [(BASELINE, 1.0), ("stride", 0.5)]
    assert made[0].is_baseline and not made[1].is_baseline


def test_retention_one_is_a_cell_of_its_own() -> None:
    made = cells(methods=["stride"], retentions=[1.0])
    assert len({cell.key() for cell in made}) == 2


def test_equal_cells_merge() -> None:
    assert len(cells(methods=["random", "random", {"name": "random", "seed": 0}], retentions=[0.5, 0.5])) == 2


def test_the_sweeps_seed_reaches_methods_that_have_one() -> None:
    made = cells(methods=["random", {"name": "random", "seed": 7}, "stride"], retentions=[0.5], seed=3)
    assert [c.parameters.get("seed") for c in made] == [None, 3, 7, None]
    assert [c.label for c in made] == [BASELINE, "random", "random(seed=7)", "stride"]


def test_the_key_is_the_same_in_every_process() -> None:
    baseline = Cell(BASELINE, BASELINE, 1, {}, 1.0, None, 0, {}, MODEL)
    assert baseline.key() == "022d931865f8a7a5"
    assert cells(methods=["stride"])[1].key() == cells(methods=["stride", "pool"])[1].key()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "pool"},
        {"version": 2},
        {"parameters": {"seed": 1}},
        {"retention": 0.25},
        {"positions": "compact"},
        {"seed": 1},
        {"generation": {"max_new_tokens": 2}},
        {"model": {**MODEL, "dtype": "bfloat16"}},
    ],
)
def test_whatever_can_change_an_answer_changes_the_key(change: dict[str, Any]) -> None:
    cell = cells(methods=["random"], retentions=[0.5])[1]
    assert dataclasses.replace(cell, **change).key() != cell.key()


def test_the_label_does_not_change_the_key() -> None:
    cell = cells()[1]
    assert dataclasses.replace(cell, label="other").key() == cell.key()


def test_unknown_methods_and_hyper_parameters_are_refused() -> None:
    with pytest.raises(UnknownName, match="unknown method 'strid'; did you mean 'stride'"):
        cells(methods=["strid"])
    with pytest.raises(VTCError, match="did you mean 'seed'"):
        cells(methods=[{"name": "random", "sed": 1}])


def test_a_method_that_takes_no_budget_is_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(vtc.create("stride")), "needs_budget", False)
    assert [(c.method, c.retention) for c in cells(methods=["stride"])] == [(BASELINE, 1.0), ("stride", None)]
