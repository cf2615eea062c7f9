"""The reproduction ledger: its files, the commands in them, and the comparison with a store written by hand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmms_eval
import pytest
import yaml

from vtc.errors import InputError
from vtc.eval.cells import make_methods
from vtc.eval.ledger import BASELINE, FOLDER, Ledger, read_ledger
from vtc.eval.ledger_check import Finding, check, identity, unmatched
from vtc.eval.spec import SweepSpec
from vtc.eval.store import Store
from vtc.method.budget import Budget

WEIGHTS = {"atp.safetensors": "atp-tiny-llava", "vqtoken.safetensors": "vqtoken-tiny-llava"}
"""Files that a reader of the ledger has to make, and what stands in for them."""
LEDGER = read_ledger()


def with_weights(text: str) -> str:
    """A method text or command whose weights exist."""
    for name, stand_in in WEIGHTS.items():
        text = text.replace(name, stand_in)
    return text


Command = Callable[..., tuple[int, str, str]]


# The files that ship


@pytest.fixture(scope="module")
def declared() -> dict[str, tuple[set[str], bool]]:
    """Tasks of lmms-eval by name: the metrics in their files and those these include, and whether each is a group."""
    found: dict[str, tuple[set[str], bool]] = {}
    for path in (Path(lmms_eval.__file__).parent / "tasks").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="replace")
        named = re.search(r"^(task|group) *: *[\"']?([\w-]+)", text, re.MULTILINE)
        if named is None:
            continue
        included = re.search(r"^include: *[\"']?([\w./-]+)", text, re.MULTILINE)
        if included and (path.parent / included[1]).is_file():
            text += "\n" + (path.parent / included[1]).read_text(encoding="utf-8")
        metrics = {each.strip() for each in re.findall(r"^ *- metric: *[\"']?([^\"'#\n]+)", text, re.MULTILINE)}
        found[named[2]] = metrics, named[1] == "group"
    return found


def test_every_method_of_the_ledger_can_be_made() -> None:
    methods = {row.method for table in LEDGER.tables.values() for row in table.rows} - {BASELINE}
    assert {identity(text)[0] for text in methods} >= {
        "vtc_cls", "globalcom2", "hiprune", "todre", "atp", "mustdrop", "aim", "vqtoken", "fastv", "pyramiddrop",
    }  # fmt: skip
    for text in methods:
        ((entry, runs),) = make_methods(SweepSpec(methods=with_weights(text), keep=(8,)))
        assert all(run is not None and run.name == identity(text)[0] for _, run in runs), entry


def test_tasks_and_metrics_are_those_of_lmms_eval(declared: dict[str, tuple[set[str], bool]]) -> None:
    for name in LEDGER.tables:
        for column, about in LEDGER.benchmarks(name).items():
            if about.task is None:
                continue
            assert declared[about.task][1] == bool(about.parts), column
            for task in about.asked:
                assert set(about.metrics) <= declared[task][0], (column, task)


@pytest.mark.parametrize("name", LEDGER.tables)
def test_the_command_of_a_table_runs_all_its_rows(name: str, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    table = LEDGER.tables[name]
    asked: list[SweepSpec] = []

    def remember(spec: SweepSpec, progress: Any) -> None:
        asked.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr("vtc.eval.sweep.run_sweep", remember)
    program, *arguments = shlex.split(with_weights(table.command))
    code, _, err = command(*arguments)
    assert (program, code) == ("vtc", 130), err
    (spec,) = asked
    assert (spec.model, str(spec.out)) == (table.checkpoint, f"results/ledger/{name}")
    made = {
        (run.name, str(run.described()), budget)
        for _, runs in make_methods(spec)
        for budget, run in runs
        if run is not None
    }
    for row in table.rows:
        tasks = [about.task for each in row.values for about in (LEDGER.benchmarks(name)[each],) if about.task]
        parts = [each for column in row.values for each in LEDGER.benchmarks(name)[column].over]
        assert {*tasks, *(LEDGER.benchmarks(name)[part].task for part in parts)} <= set(spec.tasks)
        if row.method != BASELINE:
            one = spec.model_copy(update={"methods": SweepSpec(methods=with_weights(row.method)).methods})
            assert any(
                (run.name, str(run.described()), budget) in made and fits(name, row, budget)
                for _, runs in make_methods(one)
                for budget, run in runs
                if run is not None
            ), row


def fits(name: str, row: Any, budget: Budget | None) -> bool:
    """Whether a cell at this budget has the tokens of a row; cells without a budget decide themselves."""
    if budget is None:
        return True
    table = LEDGER.tables[name]
    given = budget.keep if budget.retention is None else budget.retention * (table.total or 1.0)
    assert given is not None
    wanted = row.kept or row.share * (table.total or 1.0)
    return abs(given - wanted) <= 0.01 * wanted


def test_the_ledger_claims_nothing_that_was_not_run() -> None:
    assert {row.status for table in LEDGER.tables.values() for row in table.rows} == {"not run here"}


def test_means_of_other_columns_follow_from_the_figures_beside_them() -> None:
    table = LEDGER.tables["todre-llava-next-7b"]
    base, quarter, tenth = (row.values for row in table.rows[:3])
    over = table.benchmarks["mean of eight"].over
    for row in (quarter, tenth):
        assert 100 * sum(row[each] / base[each] for each in over) / len(over) == pytest.approx(
            row["mean of eight"], abs=0.1
        )


# What a file may hold

BENCH = {"task": "t", "metric": "accuracy", "scale": 100, "unit": "%", "tolerance": 2, "why": "chosen"}
TABLE: dict[str, Any] = {
    "paper": "P", "arxiv": "2401.00001", "source": "table 1", "certainty": "as printed", "model": "M",
    "checkpoint": "some/tiny", "total": 100, "prompt": "not stated", "harness": "not stated", "command": "vtc sweep",
    "rows": [
        {"method": "none", "values": {"T": 90}, "status": "not run here"},
        {"method": "fastv(layer=3)", "kept": 50, "values": {"T": 80}, "status": "not run here"},
    ],
}  # fmt: skip


def write(folder: Path, table: dict[str, Any], **benchmarks: Any) -> Ledger:
    """A ledger of one table."""
    folder.mkdir(exist_ok=True)
    shared = {"T": BENCH, "U": {**BENCH, "task": "u"}, **benchmarks}
    (folder / "benchmarks.yaml").write_text(yaml.safe_dump(shared))
    (folder / "one.yaml").write_text(yaml.safe_dump(table))
    return read_ledger(folder)


def row(**changes: Any) -> list[dict[str, Any]]:
    """The rows of a table of one row."""
    return [{**TABLE["rows"][1], **changes}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arxive": "2401.00001"}, "one.yaml: unknown key 'arxive'; did you mean 'arxiv'?"),
        ({"rows": row(keept=5)}, "one.yaml: unknown key 'rows.0.keept'; did you mean 'kept'?"),
        ({"rows": row(values={"TT": 5})}, "one.yaml: unknown benchmark 'TT'; did you mean 'T'?"),
        ({"rows": row(status="done")}, "rows.0.status"),
        ({"rows": row(method="a,b")}, "'a,b' is not one method without a budget"),
        ({"rows": row(method="fastv@64")}, "'fastv@64' is not one method without a budget"),
        ({"rows": row(kept=None)}, "write either kept or share, and for none neither"),
        ({"rows": row(method="none")}, "write either kept or share, and for none neither"),
        ({"rows": row(kept=101)}, "kept 101 of 100 visual tokens"),
        ({"rows": row(kept=None, share=0.5)}, "a share cannot be compared as count; write compare: share"),
        ({"rows": []}, "one.yaml: rows"),
        ({"arxiv": "abs/2401"}, "one.yaml: arxiv"),
        ({"benchmarks": {"T": BENCH}}, "'T' stands in benchmarks.yaml already"),
        ({"benchmarks": {"V": {**BENCH, "over": ["T"]}}}, "a benchmark has a task and a metric, or stands over others"),
        ({"benchmarks": {"V": {"unit": "%", "tolerance": 1, "why": "x"}}}, "a benchmark has a task and a metric"),
        ({"benchmarks": {"V": {**BENCH, "tolerence": 1}}}, "unknown key 'benchmarks.V.tolerence'; did you mean 'toler"),
    ],
)
def test_what_a_table_must_not_hold_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        write(tmp_path, {**TABLE, **changes})


def test_a_ledger_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"holds no benchmarks.yaml; name a checkout's with --folder"):
        read_ledger(tmp_path)
    monkeypatch.setattr("vtc.eval.ledger.FOLDER", tmp_path)
    with pytest.raises(InputError, match="an installed package has none; name a checkout's with --folder"):
        read_ledger()
    write(tmp_path, TABLE)
    (tmp_path / "two.yaml").write_text("paper: [")
    with pytest.raises(InputError, match=r"two\.yaml: not readable as YAML"):
        read_ledger(tmp_path)
    (tmp_path / "two.yaml").write_text("- a")
    with pytest.raises(InputError, match="expected 'key: value' lines"):
        read_ledger(tmp_path)
    (tmp_path / "two.yaml").unlink()
    assert [each["method"] for each in write(tmp_path, TABLE).of("fast*").listed()] == ["fastv(layer=3)"]
    with pytest.raises(InputError, match="no figures of 'slow'; it has some of fastv, none"):
        read_ledger(tmp_path).of("slow")


# Against a sweep

FASTV = {"schedule": None, "layer": 3, "ratio": None, "scope": "item"}
Value = tuple[str, str, float]


def sweep(folder: Path, values: list[Value], *, asked: int = 40, **changes: dict[str, Any]) -> Path:
    """A store in which cells (named by `changes`) have these values of a metric (cell, task or task/metric, value)."""
    cells = {
        "base": {"method": "none", "parameters": {}, "retention": 1.0},
        "fast": {"method": "fastv", "parameters": FASTV, "retention": 0.5},
        **changes,
    }
    tasks = {
        name: {"fingerprint": "f", "documents": asked, "of": 40, "repeats": 1, "main_metric": "accuracy", "cells": []}
        for name in sorted({task.split("/")[0] for _, task, _ in values})
    }
    with Store(folder).writing() as writer:
        writer.save_run({"model": {"name": "here/Tiny/"}, "seed": 0, "generation": {}, "tasks": tasks, "sweeps": []})
        writer.add_cells(
            {"cell": key, "label": cell["method"], "version": 1, "positions": None, "seed": 0, "model": {}} | cell
            for key, cell in cells.items()
        )
        records: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for key, place, value in values:
            task, _, metric = place.partition("/")
            kept = cells[key].get("tokens", 100 * (cells[key]["retention"] or 1.0))
            records.setdefault((key, task), []).append({
                "cell": key, "task": task, "task_fp": "f", "documents": asked, "metric": metric or "accuracy",
                "value": value, "ci_low": value - 0.05, "ci_high": value + 0.05, "ci_method": "Wilson", "n": asked,
                "higher_is_better": True, "visual_tokens_in": 100.0, "visual_tokens_kept": kept, "scores": None,
                "paired": None,
            })  # fmt: skip
        for together in records.values():
            writer.add_metrics(together)
    return folder


BOTH: list[Value] = [("base", "t", 0.895), ("fast", "t", 0.75)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Two figures on task t: the untouched model's 90 and FastV's 80 at 50 of 100 tokens."""
    return write(tmp_path / "ledger", TABLE)


def test_figures_within_the_tolerance_are_reproduced_and_others_deviate(tmp_path: Path, ledger: Ledger) -> None:
    base, fast = check(ledger, sweep(tmp_path / "s", BOTH))
    assert (base.verdict, base.published, base.ours, base.difference) == (
        "reproduced", 90, pytest.approx(89.5), pytest.approx(-0.5),
    )  # fmt: skip
    assert (base.low, base.high, base.tokens) == (pytest.approx(84.5), pytest.approx(94.5), "100")
    assert (fast.verdict, fast.ours, fast.agrees, fast.tokens) == ("deviates", pytest.approx(75), False, "50 of 100")
    assert fast.record()["difference"] == pytest.approx(-5)


def only(findings: list[Finding]) -> str:
    """Why the row of FastV was not compared."""
    (found,) = [each for each in findings if each.method.startswith("fastv")]
    assert (found.agrees, found.ours, found.verdict) == (None, None, "nothing to compare")
    return found.reason


@pytest.mark.parametrize(
    ("values", "cells", "asked", "said"),
    [
        (BOTH, {"fast": {"method": "random", "parameters": {}, "retention": 0.5}}, 40, "fastv was not swept"),
        (BOTH, {"fast": {"method": "fastv", "parameters": {**FASTV, "layer": 2}, "retention": 0.5}}, 40,
         "fastv was swept with other hyper-parameters than fastv(layer=3)"),
        (BOTH, {"fast": {"method": "fastv", "parameters": FASTV, "retention": 0.5, "version": 0}}, 40,
         "fastv was swept in another version than 1, which is the one here"),
        (BOTH, {"fast": {"method": "fastv", "parameters": FASTV, "retention": 0.5, "tokens": 53.0}}, 40,
         "tokens of fastv(layer=3) differ by more than 5%: 53 here, not 50"),
        (BOTH, {"fast": {"method": "fastv", "parameters": FASTV, "retention": 0.5, "tokens": None}}, 40,
         "the sweep does not tell its visual tokens"),
        ([("base", "t", 0.9), ("fast", "u", 0.8)], {}, 40, "t was not swept"),
        ([("base", "t", 0.9), ("fast", "t/words", 0.8)], {}, 40, "t was not scored by accuracy"),
        (BOTH, {}, 10, "only 10 of the 40 questions of t were asked"),
    ],
)  # fmt: skip
def test_what_has_nothing_to_compare_says_why(
    tmp_path: Path, ledger: Ledger, values: list[Value], cells: dict[str, Any], asked: int, said: str
) -> None:
    assert only(check(ledger, sweep(tmp_path / "s", values, asked=asked, **cells))) == said


def test_another_model_is_compared_with_nothing(tmp_path: Path) -> None:
    other = write(tmp_path / "ledger", {**TABLE, "checkpoint": "some/large"})
    findings = check(other, sweep(tmp_path / "s", BOTH))
    assert unmatched(findings) == [("one: another model was swept, here/Tiny/", 2)]


def test_of_several_cells_the_one_with_the_nearest_tokens_counts(tmp_path: Path, ledger: Ledger) -> None:
    near = {"method": "fastv", "parameters": {**FASTV, "layer": 3.0}, "retention": 0.51}
    values: list[Value] = [("near", "t", 0.1), ("fast", "t", 0.8)]
    assert check(ledger, sweep(tmp_path / "s", values, near=near))[1].ours == pytest.approx(80)


def test_shares_of_tokens_and_budgets_asked_for_can_be_compared_instead(tmp_path: Path) -> None:
    table = {**TABLE, "total": 2880, "compare": "share", "rows": row(kept=1440)}
    assert check(write(tmp_path / "a", table), sweep(tmp_path / "s", BOTH))[0].ours == pytest.approx(75)
    no_total = {**TABLE, "compare": "share", "rows": row(kept=None, share=0.5)}
    del no_total["total"]
    assert check(write(tmp_path / "b", no_total), tmp_path / "s")[0].ours == pytest.approx(75)
    asked = {**TABLE, "total": 2880, "compare": "asked", "rows": row(kept=1440)}
    ledger = write(tmp_path / "c", asked)
    off = {"method": "fastv", "parameters": FASTV, "retention": 0.5, "tokens": 90.0}
    assert check(ledger, sweep(tmp_path / "s2", BOTH, fast=off))[0].ours == pytest.approx(75)
    kept = {"method": "fastv", "parameters": FASTV, "retention": None, "keep": 1440, "tokens": 90.0}
    assert check(ledger, sweep(tmp_path / "s3", BOTH, fast=kept))[0].ours == pytest.approx(75)
    assert only(check(ledger, sweep(tmp_path / "s4", BOTH, fast={**kept, "keep": 64}))).endswith("64 here, not 1440")
    flops = {"method": "fastv", "parameters": FASTV, "retention": 0.5, "quantity": "flops", "setting": 0.6}
    assert "does not tell" in only(check(ledger, sweep(tmp_path / "s6", BOTH, fast=flops)))
    own = {"method": "fastv", "parameters": FASTV, "retention": None}
    assert check(ledger, sweep(tmp_path / "s5", BOTH, fast=own))[0].ours == pytest.approx(75)


def test_metrics_are_added_up_parts_averaged_and_columns_set_against_the_untouched_model(tmp_path: Path) -> None:
    more = {
        "sum": {**BENCH, "metric": ["accuracy", "words"], "scale": 1},
        "group": {**BENCH, "task": "g", "parts": ["t", "u"]},
    }
    over = {"mean": {"over": ["T", "U"], "unit": "% of none", "tolerance": 1, "why": "chosen"}}
    columns = {"sum": 1.25, "group": 60, "mean": 70}
    table = {**TABLE, "benchmarks": over, "rows": row(values=columns)}
    ledger = write(tmp_path / "ledger", table, **more)
    values: list[Value] = [
        ("base", "t", 0.8), ("base", "u", 0.5), ("fast", "t", 0.75), ("fast", "t/words", 0.5), ("fast", "u", 0.25),
    ]  # fmt: skip
    found = {each.benchmark: each for each in check(ledger, sweep(tmp_path / "s", values))}
    assert {name: each.ours for name, each in found.items()} == {
        "sum": pytest.approx(1.25), "group": pytest.approx(50),
        "mean": pytest.approx(100 * (0.75 / 0.8 + 0.25 / 0.5) / 2),
    }  # fmt: skip
    assert {each.low for each in found.values()} == {None}
    bare = check(ledger, sweep(tmp_path / "s2", values[2:]))
    assert [each.reason for each in bare if each.benchmark == "mean"] == ["none was not swept"]
    zero = check(ledger, sweep(tmp_path / "s3", [("base", "t", 0.0), *values[1:]]))
    assert [each.reason for each in zero if each.benchmark == "mean"] == ["the untouched model has 0 on T"]


def test_weights_and_seeds_are_no_part_of_a_method() -> None:
    assert identity("atp(weights=mine.safetensors)") == ("atp", 1, {})
    assert identity("vqtoken(weights=a, resample=true)")[2] == {"resample": "true"}
    assert "seed" not in identity("random(seed=4)")[2]
    assert identity("fastv") == identity("fastv(layer=2, ratio=none)") != identity("fastv(layer=3)")
    with pytest.raises(InputError, match="fastv has no 'depth'; it has schedule, layer, ratio, scope"):
        identity("fastv(depth=3)")


# The command


def test_the_list_fits_a_hundred_columns_and_json_holds_the_commands(command: Command) -> None:
    code, out, _ = command("ledger")
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 100
    assert lines[0].split() == ["method", "model", "tokens", "table", "values", "status"]
    code, out, _ = command("ledger", "vtc_*", "--json")
    entries = json.loads(out)
    assert [(each["method"], each["tokens"]) for each in entries] == [
        ("vtc_cls", "256 of 576"), ("vtc_cls", "128 of 576"), ("vtc_cls", "64 of 576"),
    ]  # fmt: skip
    assert entries[0]["command"].startswith("vtc sweep --model llava-hf/llava-1.5-7b-hf --methods vtc_cls")
    assert entries[0]["values"]["GQA"] == 60.3 and entries[0]["benchmarks"]["GQA"]["task"] == "gqa"
    code, _, err = command("ledger", "nobody")
    assert code == 2 and "the ledger has no figures of 'nobody'" in err


def test_a_check_tells_every_figure_and_fails_on_a_deviation(tmp_path: Path, ledger: Ledger, command: Command) -> None:
    store = sweep(tmp_path / "s", BOTH)
    code, out, _ = command("ledger", "--check", store, "--folder", tmp_path / "ledger")
    assert code == 1 and max(map(len, out.splitlines())) <= 100
    assert re.search(r"none +100 +T +90 +89\.5 +-0\.5 +84\.5 to 94\.5 +2 +reproduced", out)
    assert re.search(r"fastv\(layer=3\) +50 of 100 +T +80 +75\.0 +-5\.0 +70\.0 to 80\.0 +2 +deviates", out)
    assert out.splitlines()[-1] == "1 reproduced, 1 deviate, 0 not compared"
    code, out, _ = command("ledger", "none", "--check", store, "--folder", tmp_path / "ledger", "--json")
    (entry,) = json.loads(out)
    assert code == 0 and (entry["verdict"], entry["ours"]) == ("reproduced", pytest.approx(89.5))
    code, out, _ = command("ledger", "--check", store, "--folder", FOLDER)
    assert code == 0 and out.splitlines()[-1].startswith("0 reproduced, 0 deviate, ")
    assert "vtc-cls-llava-1.5-7b: another model was swept, here/Tiny/ (32 figures)" in out
    assert command("ledger", "--check", tmp_path)[0] == 2
