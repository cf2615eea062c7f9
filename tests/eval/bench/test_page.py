"""What people read of a bench: tables, files, the command, the section of a report."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vtc.cli.main import app
from vtc.errors import InputError
from vtc.eval.bench.page import cut, left_out, outcome_table, parts_table, write_bench
from vtc.eval.bench.record import Record, SceneRecord
from vtc.eval.bench.scene import Facts
from vtc.eval.bench.spec import BenchSpec
from vtc.eval.bench.summary import BreakEven, Spread, bound, lines, ratios, spread
from vtc.eval.report import write_report


def scene() -> SceneRecord:
    """Two rounds, the second twice as slow, of the untouched model, a method and its limit."""
    untouched = Facts("untouched", "", None, None, 100.0, 1000, 1000.0)
    ours = Facts("method", "random", 0.5, None, 50.0, 600, 600.0, "limit at 50 tokens")
    native = Facts("limit", "", None, None, 50.0, 600, None)

    def values(slow: float, selection: float | None, prefill: float) -> dict[str, float | None]:
        seconds = {"vision": slow, "prefill": slow * prefill, "decode": slow * 4}
        total = sum(seconds.values()) + slow * (selection or 0.0)
        return {
            **seconds, "selection": None if selection is None else slow * selection, "total": total,
            "first_token": total - slow * 4, "peak_bytes": None, "rest_bytes": None,
        }  # fmt: skip

    names = ("untouched", "random@0.5", "limit at 50 tokens")
    llm = ((None, 7), (1, 3), (None, 2))
    rounds = [{name: values(slow, *of) for name, of in zip(names, llm, strict=True)} for slow in (1.0, 2.0)]
    arms = dict(zip(names, (untouched, ours, native), strict=True))
    return SceneRecord(1, 10, 10, 2, 5, 100.0, 9, arms, [], rounds)


def test_ratios_are_of_the_same_round() -> None:
    made = scene()
    assert ratios(made, "random@0.5", "limit at 50 tokens", ["selection", "prefill"]) == Spread(2.0, 2.0, 2.0, 2)
    assert ratios(made, "random@0.5", "nobody", ["prefill"]) is None
    by_arm = {line.arm: line for line in lines(made)}
    assert by_arm["random@0.5"].median("speedup") == 12 / 9
    assert by_arm["random@0.5"].median("first_token_to_limit") == 5 / 3
    assert by_arm["random@0.5"].median("requests") == pytest.approx((2 / 9 + 2 / 18) / 2)
    assert by_arm["random@0.5"].median("tokens") == pytest.approx(5 * (2 / 9 + 2 / 18) / 2)
    assert by_arm["untouched"].median("llm_to_limit") is None
    assert bound(made, "first_token", ["selection", "prefill"]) == Spread(8.0, 8.0, 8.0, 2)
    assert spread([]) is None and spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_what_does_not_apply_is_a_dash() -> None:
    head, rows = parts_table(scene())
    selection = {row[0]: row[head.index("selection")] for row in rows}
    assert selection == {"untouched": "-", "random@0.5": "1500", "limit at 50 tokens": "-"}
    head, rows = outcome_table(scene())
    memory = {row[head.index("memory beyond rest, MB")] for row in rows}
    assert memory == {"-"} and rows[1][head.index("LLM / limit")] == "2 (2 to 2)"


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ((1, 2, 3), "pays at all of 100 to 300 visual tokens"),
        ((-1, -2, 0), "does not pay at any of 100 to 300 visual tokens"),
        ((-1, 1, 3), "pays from about 150 visual tokens on (by interpolation)"),
        ((1, 3, -1), "pays no longer from about 275 visual tokens on (by interpolation)"),
    ],
)
def test_break_even(saved: tuple[float, ...], says: str) -> None:
    points = tuple((100.0 * n, Spread(gain, gain, gain, 3)) for n, gain in enumerate(saved, 1))
    assert BreakEven("random@0.5", points).words == says


def test_files(measured: tuple[Record, Path], tmp_path: Path) -> None:
    record, _ = measured
    write_bench(record, tmp_path, "vtc bench --threads 1")
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert len(rows) == sum(len(each.arms) for each in record.scenes.values())
    assert all(float(row["total_q1"]) <= float(row["total"]) <= float(row["total_q3"]) for row in rows)
    text = (tmp_path / "bench.md").read_text()
    assert "Made by `vtc bench --threads 1`" in text and "## Batch 2" in text and "## Break-even" in text
    about = " ".join(text.split())  # where lines break depends on the name of the processor
    assert "attention: text sdpa and vision sdpa" in about and "float32" in about
    assert str(Path(record.spec.model).parent) not in text  # where a folder lies is nobody's business
    assert "downsample@0.25: downsample at 36 tokens" in about and "whole model" not in about
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert '"vision tower alone"' in (tmp_path / "bench.html").read_text()


def test_figures_of_a_cut_model_cannot_be_taken_for_the_whole(measured: tuple[Record, Path], tmp_path: Path) -> None:
    record = measured[0]
    machine = {**record.machine, "title": "llava-1.5-7b, 4 of 32 LLM layers", "layers": 4, "of_layers": 32}
    small = Record(record.spec, machine, record.scenes)
    assert cut(record) is None and (cut(small) or "").startswith("Measured with 4 of 32 LLM layers")
    write_bench(small, tmp_path)
    for name in ("bench.md", "bench.html", "bench.csv"):
        text = (tmp_path / name).read_text()
        assert "4 of 32 LLM layers" in text, name
    assert "no time, memory or ratio here is one of the whole model" in " ".join(
        (tmp_path / "bench.md").read_text().split()
    )


def test_missing_rounds_are_told(measured: tuple[Record, Path]) -> None:
    record = measured[0]
    more = Record(replace(record.spec, repeats=9), record.machine, record.scenes)
    assert sum("2 of 9 rounds are finished" in line for line in left_out(more)) == len(record.scenes)


def test_section_of_a_report(measured: tuple[Record, Path], write_store: Callable[..., Path], tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [("none", 1.0), ("random", 0.5)], {"t": [[1.0, 1.0], [1.0, 0.0]]})
    write_report(store, measured[1])
    with_bench = (store / "report.html").read_text()
    write_report(store)
    assert 'id="bench"' in with_bench and "fastv(layer=1)@0.9" in with_bench
    assert 'id="bench"' not in (store / "report.html").read_text()
    with pytest.raises(InputError, match="holds no bench"):
        write_report(store, tmp_path)


def test_the_command(measured: tuple[Record, Path], small: BenchSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "bench", "--model", small.model, "--methods", "random,fastv@0.1", "--retentions", "0.25", "--batch-sizes", "1",
        "--new-tokens", "2", "--repeats", "1", "--warmup", "0", "--images", "2", "--image-size", "168", "--loads",
        "none", "--device", "cpu", "--out", str(out), "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [line["arm"] for line in found["lines"]] == ["untouched", "random@0.25", "limit at 72 tokens"]
    assert found["lines"][0]["visual_tokens"] == 288 and found["break_even"] == {}
    assert len(found["left_out"]) == 1 and found["left_out"][0].startswith("fastv@0.1: ")
    assert (out / "bench.html").exists() and (out / "rounds.jsonl").read_text().count("\n") == 1
    shown = CliRunner().invoke(app, [*arguments[:-1], "--resume"])
    assert shown.exit_code == 0 and "limit at 72" in shown.stdout and "bench.csv" in shown.stdout
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, InputError) and "add --resume" in str(again.exception)
    bad = CliRunner().invoke(app, ["bench", "--retentions", "much", "--out", str(out)])
    assert isinstance(bad.exception, InputError) and "write 0.33,0.11" in str(bad.exception)
