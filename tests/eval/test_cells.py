"""Cells: which there are, and what their key depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vtc
from vtc.errors import BudgetError, InputError, UnknownName, VTCError
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


def test_numbers_of_tokens_stand_beside_or_instead_of_retentions() -> None:
    made = cells(methods=["stride", "random@9"], keep=[64, 16])
    assert [(c.label, c.retention, c.keep) for c in made[1:]] == [
        ("stride", None, 64), ("stride", None, 16), ("random", None, 9),
    ]  # fmt: skip
    made = cells(methods=["stride"], retentions=[0.5], keep=64)
    assert [(c.retention, c.keep) for c in made[1:]] == [(0.5, None), (None, 64)]
    assert len({cell.key() for cell in made}) == 3
    both = [{"name": "random", "keep": 32}, {"name": "aim", "merge": False, "retention": 0.5}]
    (cell,) = cells(methods=[both])[1:]
    assert cell.label == "random@32+aim(merge=False)@0.5" and cell.budget is None
    assert cell.compressor is not None and cell.parameters["parts"][0]["budget"] == {"retention": None, "keep": 32}
    with pytest.raises(BudgetError, match="keep=0 is not a positive whole number of tokens"):
        cells(methods=["stride"], keep=[0])
    with pytest.raises(BudgetError, match="both of retention and keep"):
        cells(methods=[{"name": "stride", "keep": 3, "retention": 0.5}])


def test_seeds_are_as_many_methods() -> None:
    made = cells(methods=["random(seeds=3)", {"name": "random", "seeds": 2, "keep": 5}], retentions=[0.5])
    assert [(c.parameters["seed"], c.retention, c.keep) for c in made[1:]] == [
        (0, 0.5, None), (1, 0.5, None), (2, 0.5, None), (0, None, 5), (1, None, 5),
    ]  # fmt: skip
    for wrong in ({"seeds": 0}, {"seeds": True}, {"seeds": 2, "seed": 1}):
        with pytest.raises(InputError, match="write a number such as seeds=3, and no seed"):
            cells(methods=[{"name": "random", **wrong}])
    with pytest.raises(VTCError, match="seed"):
        cells(methods=["stride(seeds=2)"])


def test_downsample_is_a_cell_without_a_compressor() -> None:
    made = cells(methods=["downsample"], retentions=[0.5], keep=[9])
    assert [(c.method, c.retention, c.keep, c.compressor) for c in made[1:]] == [
        ("downsample", 0.5, None, None), ("downsample", None, 9, None),
    ]  # fmt: skip
    assert not made[1].is_baseline and made[1].scales == vtc.Budget(0.5) and made[0].scales is None
    with pytest.raises(InputError, match="has no hyper-parameters"):
        cells(methods=["downsample(factor=2)"])


def test_the_reading_of_videos_is_part_of_the_key() -> None:
    plain, few = (cells(methods=["stride"], video=video)[1] for video in ({}, {"frames": 4}))
    assert plain.key() != few.key() and few.video == {"frames": 4}


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


def test_a_cell_has_a_position_policy_of_its_own() -> None:
    made = cells(methods=["todre", "todre(positions=preserve)", "stride"], retentions=[0.5], positions="compact")[1:]
    assert [cell.positions for cell in made] == ["compact", "preserve", "compact"]
    assert made[0].label == made[1].label and made[0].key() != made[1].key() and "positions" not in made[1].parameters
    for wrong, words in (
        ("todre(positions=squeeze)", "input should be 'preserve', 'compact'"),
        ("downsample(positions=compact)", "has no hyper-parameters"),
        ("hiprune@0.5+aim(merge=false, positions=compact)@0.6", "have one position policy"),
    ):
        with pytest.raises(VTCError, match=words):
            cells(methods=[wrong], retentions=[0.5])


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


def test_a_retention_of_its_own_is_one_cell_in_the_methods_row() -> None:
    made = cells(methods=["random@0.3", "random"], retentions=[0.5, 0.3])
    assert [(c.label, c.retention) for c in made[1:]] == [("random", 0.3), ("random", 0.5)]


def test_methods_together_are_one_cell_where_each_has_its_retention() -> None:
    made = cells(methods=["hiprune@0.5+aim(merge=false)@0.6+mustdrop(merge=off,filter=off)"], retentions=[0.5, 0.25])[
        1:
    ]
    assert [(c.method, c.retention) for c in made] == [("hiprune+aim+mustdrop", None)]
    parts = made[0].parameters["parts"]
    assert [(p["method"], p["budget"] and p["budget"]["retention"]) for p in parts] == [
        ("hiprune", 0.5),
        ("aim", 0.6),
        ("mustdrop", None),
    ]
    assert parts[1]["merge"] is False


def test_methods_together_are_swept_where_one_takes_a_budget() -> None:
    made = cells(methods=[["random", {"name": "mustdrop", "merge": "off", "filter": "off"}]], retentions=[0.5, 0.25])[
        1:
    ]
    assert [c.retention for c in made] == [0.5, 0.25]
    assert len({c.key() for c in made}) == 2
    assert [c.compressor.budgets[0] for c in made] == [vtc.Budget(0.5), vtc.Budget(0.25)]  # type: ignore[union-attr]


def test_the_keys_of_combinations_follow_every_part() -> None:
    def key(text: str, **more: Any) -> str:
        return cells(methods=[text], **more)[1].key()

    base = key("random@0.5+mustdrop(merge=off,filter=off)")
    assert base == key("random@0.5+mustdrop(merge=off,filter=off)", retentions=[0.1])
    others = {
        key("random@0.4+mustdrop(merge=off,filter=off)"),
        key("random(scope=item)@0.5+mustdrop(merge=off,filter=off)"),
        key("random@0.5+mustdrop(merge=off,filter=off,layers=[1])"),
        key("random@0.5+mustdrop(merge=off,filter=off)", seed=1),
        key("stride@0.5+mustdrop(merge=off,filter=off)"),
    }
    assert len(others - {base}) == 5


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["hiprune+aim(merge=false)"], "take a retention each"),
        (["hiprune@0.5+aim(merge=false)"], r"write aim@0\.5"),
        (["fastv(ratio=0.5)@0.5"], "takes no retention"),
        (["random@0.5+mustdrop(merge=off,filter=off)@0.5"], "takes no retention"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(methods: list[str], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        cells(methods=methods)


@dataclass(frozen=True)
class Own(vtc.ScoringCompressor):
    """Not registered."""

    power: float = 1.0
    name: ClassVar[str] = "own"

    def score(self, view: vtc.StageView) -> Any:
        return view.tokens.norm(dim=-1) ** self.power


@dataclass(frozen=True)
class Thief(Own):
    """Takes a name that is registered."""

    name: ClassVar[str] = "random"


def test_an_object_is_a_cell_without_being_registered() -> None:
    made = cells(methods=[Own(power=2.0), Own()], retentions=[0.5])[1:]
    assert [(c.label, c.method, c.parameters["power"]) for c in made] == [
        ("own(power=2.0)", "own", 2.0),
        ("own", "own", 1),
    ]
    assert made[0].compressor == Own(power=2.0)
    assert cells(methods=[[Own(), vtc.create("mustdrop", merge="off", filter="off")]])[1].method == "own+mustdrop"
    with pytest.raises(InputError, match="Thief has the name 'random' of a registered method"):
        cells(methods=[Thief()])


def test_plugins_of_a_spec_are_loaded(tmp_path: Path) -> None:
    file = tmp_path / "nothing.py"
    file.write_text("")
    with pytest.raises(InputError, match="registers no method"):
        cells(plugins=[str(file)])
