"""Budgets of operations, cache and time: the retention that meets them, and what the results say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtc.errors import BudgetError, InputError
from vtc.eval import settling
from vtc.eval.cells import Cell, make_cells, of_tokens
from vtc.eval.generation import make_generation
from vtc.eval.progress import SilentProgress
from vtc.eval.runner import Runner
from vtc.eval.settling import Settler, at, bisect
from vtc.eval.spec import make_spec
from vtc.eval.store import Store
from vtc.eval.sweep import run_sweep

GREEDY = make_generation({"max_new_tokens": 2}, source="test")
TOGETHER = "hiprune+mustdrop(merge=off,filter=off)"


@pytest.fixture(scope="module")
def chats(blobs: Any) -> list[Any]:
    return [blobs.conversation(doc_id) for doc_id in range(3)]


@pytest.fixture(scope="module")
def settler(runner: Runner, chats: list[Any]) -> Settler:
    return Settler(runner, chats)


def cell_of(method: str, share: float, budget: str = "kv") -> Cell:
    spec = make_spec({"methods": [method], "retentions": [share], "budget": budget})
    return next(cell for cell in make_cells(spec, {}) if not cell.is_baseline)


def shares(runner: Runner, chats: list[Any], cell: Cell, field: str) -> list[float]:
    return [getattr(answer, field) for answer in runner.answer(runner.prepare(chats), cell, GREEDY)]


@pytest.mark.parametrize("budget", ["kv", "flops"])
@pytest.mark.parametrize("method", ["random", "stride", "vtc_cls", "fastv(layer=1)", TOGETHER])
def test_the_setting_meets_the_share(
    settler: Settler, runner: Runner, chats: list[Any], method: str, budget: str
) -> None:
    """To within what one token of each prompt moves; answers then say the same as the search did."""
    cell = settler.settle(cell_of(method, 0.9, budget))
    assert (
        cell.retention == 0.9 and cell.setting is not None and cell.setting < 0.9
    )  # text and tower are not compressed
    found = shares(runner, chats, cell, f"{budget}_share")
    assert cell.achieved == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert cell.achieved == pytest.approx(0.9, abs=1 / 144)


def test_a_share_of_one_is_everything(settler: Settler, runner: Runner, chats: list[Any]) -> None:
    cell = settler.settle(cell_of("random", 1.0, "flops"))
    assert (cell.setting, cell.achieved) == (1.0, 1.0)
    assert shares(runner, chats, cell, "flops_share") == [1.0] * 3


def test_a_share_of_one_costs_what_it_costs(settler: Settler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that adds operations of its own exceeds the untouched model where it keeps everything."""
    monkeypatch.setattr(settler.runner, "prefill", lambda batch, cell: ([{"flops_share": 1.02}], 1.0))
    cell = settler.settle(cell_of("vtc_cls", 1.0, "flops"))
    assert (cell.setting, cell.achieved) == (1.0, 1.02)


def test_budgets_that_stay_tokens_are_named() -> None:
    def named(**settings: Any) -> list[str]:
        return of_tokens(make_spec({"budget": "flops", **settings}))

    shares = "hiprune@0.5+aim(merge=False)@0.6"
    assert named(methods=["random", "stride@9", shares], retentions=[0.5], keep=[4]) == [
        "random at 4 tokens", "stride at 9 tokens", shares,
    ]  # fmt: skip
    assert named(methods=["random@0.5"], keep=[4]) == [] == named(methods=["none"], keep=[4])
    assert named(methods=[shares], budget="tokens") == []
    for settings in ({"methods": ["random"], "keep": [4]}, {"methods": [shares], "retentions": [0.5]}):
        with pytest.raises(BudgetError, match=r"'flops' is what a retention is a share of, and none is given .* here"):
            named(**settings)


def test_tokens_stay_tokens(settler: Settler) -> None:
    cells = make_cells(make_spec({"methods": ["random"], "retentions": [0.5], "keep": [9], "budget": "kv"}), {})
    assert [cell.quantity for cell in cells] == ["tokens", "kv", "tokens"]
    assert [settler.settle(cell) is cell for cell in cells] == [True, False, True]
    assert make_cells(make_spec({"methods": ["random"], "retentions": [0.5]}), {})[1].key() != cells[1].key()


def test_what_cannot_be_met_is_refused(settler: Settler) -> None:
    with pytest.raises(
        BudgetError, match=r"0.1 of .* prefill operations cannot be met by 'random' here, which takes at"
    ):
        settler.settle(cell_of("random", 0.1, "flops"))
    with pytest.raises(BudgetError, match=r"KV cache cannot be met by 'fastv\(layer=1\)'"):
        settler.settle(cell_of("fastv(layer=1)", 0.3))
    with pytest.raises(BudgetError, match="'downsample' here, which takes at least 1"):
        settler.settle(cell_of("downsample", 0.5))


def test_time_is_measured_beside_the_untouched_model(
    settler: Settler, chats: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that charges by visual tokens: the setting is where they cost the share, and the cell says so."""
    runs: list[bool] = []

    def prefill(batch: Any, cell: Cell) -> tuple[list[Any], float]:
        runs.append(cell.compressor is None)
        return [{}], 2.0 if cell.compressor is None else 0.5 + 1.5 * (cell.setting or 1.0)

    monkeypatch.setattr(settler.runner, "prefill", prefill)
    cell = settler.settle(cell_of("random", 0.5, "time"))
    assert cell.setting == pytest.approx(1 / 3, abs=0.03) and cell.achieved == pytest.approx(0.5, abs=0.02)
    assert runs[:4] == [False, True, False, True]  # interleaved
    with pytest.raises(BudgetError, match="prefill time cannot be met"):
        settler.settle(cell_of("random", 0.2, "time"))


def test_time_really_runs(settler: Settler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "STEPS", {"time": 2})
    monkeypatch.setattr(settling, "MISS", {"time": 100.0})
    cell = settler.settle(cell_of("hiprune", 0.9, "time"))
    assert cell.setting in (0.25, 0.5, 0.75) and (cell.achieved or 0) > 0


def test_an_earlier_sweep_has_settled_it_already(settler: Settler, runner: Runner, chats: list[Any]) -> None:
    """The stored setting is taken as it is, for several methods together as well, and is the same cell."""
    for method in ("random", TOGETHER):
        cell = settler.settle(cell_of(method, 0.8))
        again = Settler(runner, [], {cell.key(): cell.record()}).settle(cell_of(method, 0.8))
        assert again == cell and again.key() == cell.key() and again.achieved == cell.achieved


def test_keys_tell_settings_apart_and_achievements_not() -> None:
    cell = at(cell_of("random", 0.5), 0.25)
    assert cell.key() != at(cell, 0.3).key() != cell_of("random", 0.5).key()
    assert dataclasses.replace(cell, achieved=0.4, asked="x").key() == cell.key()
    assert cell.budget is not None and cell.budget.retention == 0.25


def test_nothing_is_counted_without_sizes(settler: Settler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler.runner, "prefill", lambda batch, cell: ([{}], 1.0))
    with pytest.raises(InputError, match="nothing is known of the sizes"):
        settler.settle(cell_of("random", 0.5))


def test_bisection() -> None:
    """Steps, refusals below a bound, and an unreachable target."""
    tried = bisect(lambda x: round(10 * x) / 10, 0.52, steps=12, close=1e-3)
    assert tried[min(tried, key=lambda x: abs(tried[x] - 0.52))] == 0.5

    def refusing(share: float) -> float:
        if share < 0.4:
            raise BudgetError("too little")
        return share

    assert min(bisect(refusing, 0.1, steps=8, close=1e-3)) >= 0.4
    assert bisect(lambda x: x, 0.5, steps=12, close=1e-3) == {0.5: 0.5}


def test_a_sweep_of_cache_shares(model_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """Columns say what was asked and achieved; a second run settles nothing anew and adds what is missing."""
    notes: list[str] = []
    progress = SilentProgress()
    progress.note = notes.append  # type: ignore[method-assign]

    def run(**more: Any) -> Any:
        settings = {
            "model": str(model_folder), "methods": ["random", "fastv(layer=1)"], "retentions": [0.8, 0.3],
            "tasks": ["blobs"], "include_path": [task_folder], "batch_size": 4, "out": tmp_path / "out", "budget": "kv",
        }  # fmt: skip
        return run_sweep(make_spec(settings | more), progress)

    first = run()
    assert [note for note in notes if "left out" in note and "0.3 of the untouched model's KV cache" in note]
    lines = {(line["method"], line["retention"]): line for line in first.results.select("blobs", "accuracy")}
    assert list(lines) == [("none", 1.0), ("random", 0.8), ("random", 0.3), ("fastv(layer=1)", 0.8)]
    for (method, share), line in lines.items():
        assert line["achieved"] == pytest.approx(share, abs=0.01)
        if method != "none":
            assert line["budget"] == "kv" and line["setting"] < share and line["kv_share"] == line["achieved"]
            assert line["flops"] < lines["none", 1.0]["flops"]
    assert lines["none", 1.0]["budget"] == "tokens" and lines["none", 1.0]["flops_share"] == 1
    assert run().answered == 0
    more = run(budget="tokens", retentions=[0.8])
    assert more.answered == 20  # other cells, told apart in one table
    names = {line["method"] for line in more.results.select("blobs", "accuracy")}
    assert {"random [budget=kv]", "random [budget=tokens]"} <= names


def test_a_sweep_of_which_nothing_is_left_is_refused(model_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(model_folder), "methods": ["fastv(layer=1)"], "retentions": [0.3], "tasks": ["blobs"],
        "include_path": [task_folder], "out": tmp_path / "out", "budget": "kv",
    }  # fmt: skip
    with pytest.raises(BudgetError, match=r"no method of this sweep can .* 0\.3 of the untouched model's KV cache"):
        run_sweep(make_spec(settings))
    assert not (tmp_path / "out").exists()


def test_rows_hold_the_tokens_of_each_layer(sweep_rows: Callable[[], list[dict[str, Any]]]) -> None:
    for row in sweep_rows():
        spans = row["layer_tokens"]
        assert sum(layers for layers, _ in spans) == 2
        assert sum(layers * tokens for layers, tokens in spans) / 2 == pytest.approx(
            row["visual_tokens_kept"], abs=1e-3
        )
        assert 0 < row["kv_share"] <= 1 and row["flops"] > 0


@pytest.fixture
def sweep_rows(model_folder: Path, task_folder: Path, tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    def rows() -> list[dict[str, Any]]:
        settings = {
            "model": str(model_folder), "methods": ["fastv(layer=1)"], "retentions": [0.7], "tasks": ["blobs"],
            "include_path": [task_folder], "limit": 4, "out": tmp_path / "rows",
        }  # fmt: skip
        run_sweep(make_spec(settings))
        return list(Store(tmp_path / "rows").rows())

    return rows


def test_downsampled_pictures_are_compared_with_those_that_came(
    video_model_folder: Path, blobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where smaller pictures have fewer tokens, the control has costs of its own and shares of the original's."""
    from vtc.app import loading

    runner = Runner(loading.load(str(video_model_folder), device="cpu"))
    chats = [blobs.conversation(0)]
    try:
        cell = Settler(runner, chats).settle(cell_of("downsample", 0.6))
    except BudgetError:
        pytest.skip("this processor makes the same tokens of any picture")
    assert cell.achieved is not None and 0.3 < cell.achieved < 0.9
    batch = runner.prepare(chats)
    assert cell.scales is not None
    (small,) = runner.answer(runner.scaled(chats, cell.scales, batch), cell, GREEDY)
    (whole,) = runner.answer(batch, dataclasses.replace(cell, method="none"), GREEDY)
    assert small.kv_share == pytest.approx(cell.achieved, abs=1e-5) and whole.kv_share == 1
    assert small.flops is not None and whole.flops is not None
    assert small.flops_share == pytest.approx(small.flops / whole.flops, abs=1e-4)
