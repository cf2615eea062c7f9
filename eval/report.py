"""The files that people read, drawn from a store: `metrics.csv`, tables, a figure, the self-contained `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtc.eval import charts, curves, difficulty
from vtc.eval.answers import Answers, answers
from vtc.eval.bench.page import section
from vtc.eval.bench.record import Record, read_record
from vtc.eval.columns import COLUMNS
from vtc.eval.comparisons import POINTS, Retained, needed, pairs, ranked_tasks, retained, seeds_to_untouched
from vtc.eval.files import files
from vtc.eval.page import Page
from vtc.eval.results import Asked, Results, read_results
from vtc.eval.samples import browsed
from vtc.eval.store import Store
from vtc.eval.tables import Grid, grid, nominal, short_names
from vtc.eval.writing import write_files


def write_report(folder: Path, bench: Path | None = None) -> Results:
    """Write `report.html` and the files of `vtc.eval.files` into `folder` from its store, and return what they show.

    bench: folder of a bench, whose figures become a section of the report.

    Raises:
        InputError: a folder holds no sweep or no bench, or cannot be written.
    """
    results = read_results(folder)
    measured = None if bench is None else read_record(bench)
    browser = browsed(Store(folder), results.run, results.lines, results.stored)
    content = files(results) | {"report.html": render(results, browser, measured).encode()}
    write_files(folder, content)
    return results


def render(results: Results, browser: dict[str, Any] | None = None, bench: Record | None = None) -> str:
    """The report as one HTML page that needs no other file; `browser` is `vtc.eval.samples.browsed`."""
    page = Page()
    order = retained(results)
    context = {
        "results": results,
        "columns": COLUMNS,
        "sweep": results.run["sweeps"][-1],
        "ranking": _ranking(page, results, order),
        "tasks": [_task(page, results, task) for task in results.tasks],
        "browser": browser or {},
        "bench": None if bench is None else section(page, bench),
    }
    return page.render("report.html", title=f"Visual-token compression on {results.run['model']['name']}", **context)


def _ranking(page: Page, results: Results, order: list[Retained]) -> dict[str, Any]:
    names = short_names(list(dict.fromkeys(entry.method for entry in order)))
    by_budget: dict[Asked, list[Retained]] = {}
    for entry in order:
        by_budget.setdefault(entry.retention, []).append(entry)
    title = "percent of the untouched model"
    boards = []
    for budget, entries in by_budget.items():
        rows = [
            {
                "name": names[each.method], "value": round(each.percent, 3),
                "low": None if each.low is None else round(each.low, 2),
                "high": None if each.high is None else round(each.high, 2),
                "tokens %": None if each.tokens is None else round(each.tokens, 1),
                "text": f"{each.percent:.1f}" + (f" ± {each.spread:.1f}" if each.spread is not None else ""),
            }
            for each in entries
        ]  # fmt: skip
        boards.append({"name": nominal(budget), "chart": page.chart(charts.dots(rows, title, at=100.0))})
    return {"boards": boards, "entries": order, "tasks": ranked_tasks(results)}


def _task(page: Page, results: Results, task: str) -> dict[str, Any]:
    metrics = results.metrics(task)
    grids: dict[str, Grid] = {metric: grid(results, task, metric) for metric in metrics}
    main = grids.get(results.main_metric(task))
    lines = [line for line in results.lines if line["task"] == task]
    made: dict[str, Any] = {
        "name": task,
        "settings": results.run["tasks"][task],
        "main": main,
        "grids": grids,
        "intervals": sorted({line["ci_method"] for line in lines}),
        "tests": sorted({line["diff_method"] for line in lines if line["diff_method"]}),
    }
    if main is None:
        return made
    pooled = answers(results, task, main.metric)
    for pair in seeds_to_untouched(pooled) if pooled is not None else ():
        main.entries[pair.one, pair.retention] |= {"diff_ci_low": pair.low, "diff_ci_high": pair.high, "p": pair.p}
    drawn = curves.points(results, main)
    made["curves"] = [
        {"name": curves.AXES[axis], "chart": page.chart(curves.curves(results, main, axis))}
        for axis in curves.axes(drawn)
    ]
    made["differences"] = [
        {"name": nominal(retention), "chart": page.chart(charts.dots(rows, _unit("difference", main), at=0.0))}
        for retention in main.retentions
        if (rows := charts.differences(main, retention))
    ]
    made["families"] = [
        {"name": f"{metric} ({data.baseline['n'] if data.baseline else '?'} questions)", "chart": page.chart(spec)}
        for metric, data in grids.items()
        if metric != main.metric and curves.axes(curves.points(results, data))
        for spec in [curves.curves(results, data, "share", height=150, labels=False)]
    ]
    single = answers(results, task, main.metric, pool=False)
    if pooled is None or single is None:
        return made | {"derived": False}
    return made | _derived(page, main, pooled, single)


def _unit(words: str, data: Grid) -> str:
    return f"{words} in {data.metric}" + (" (points)" if data.percent else "")


def _derived(page: Page, main: Grid, pooled: Answers, single: Answers) -> dict[str, Any]:
    """What is computed from scores by document, with seeds as one series and as they are."""
    factor = 100.0 if main.percent else 1.0
    names = short_names(main.methods)
    boards = []
    found = pairs(pooled)
    for retention in main.retentions:
        cells = []
        for pair in (pair for pair in found if pair.retention == retention):
            star = "*" if pair.p_holm < 0.05 else ""
            for sign, one, other in ((1, pair.one, pair.other), (-1, pair.other, pair.one)):
                ends = sorted((sign * pair.low * factor, sign * pair.high * factor))
                diff = sign * pair.diff * factor + 0.0
                cells.append({
                    "one": names[one], "other": names[other], "diff": round(diff, 3), "text": f"{diff:+.1f}{star}",
                    "from": round(ends[0], 3), "to": round(ends[1], 3), "p": float(f"{pair.p:.3g}"),
                    "p_holm": float(f"{pair.p_holm:.3g}"),
                })  # fmt: skip
        if cells:
            order = [names[method] for method in main.methods]
            title = _unit("row minus column, difference", main)
            boards.append({"name": nominal(retention), "chart": page.chart(charts.matrix(cells, order, title))})
    return {
        "derived": True,
        "pairs": boards,
        "oracles": difficulty.oracles(single),
        "groups": _groups(page, single),
        "points": POINTS,
        "needed": needed(single),
        "factor": factor,
    }


def _groups(page: Page, single: Answers) -> list[dict[str, Any]]:
    """A board per retention that has the control: accuracy of each method on both groups."""
    by_retention: dict[Asked, list[difficulty.Group]] = {}
    for group in difficulty.groups(single):
        by_retention.setdefault(group.retention, []).append(group)
    boards = []
    for retention, both in by_retention.items():
        kinds = {"A": "A: down-sampling loses them", "B": "B: down-sampling keeps them"}
        hard = next(group for group in both if group.name == "A").accuracy
        rows = [
            {"name": method, "value": round(100 * share, 2), "group": kinds[group.name], "questions": group.questions}
            for group in both
            for method, share in sorted(group.accuracy.items(), key=lambda entry: -hard.get(entry[0], 0.0))
        ]
        if rows:
            counts = ", ".join(f"{group.name} {group.questions}" for group in both)
            spec = charts.dots(rows, "right, % of the group", colour="group")
            boards.append({"name": nominal(retention), "chart": page.chart(spec), "counts": counts})
    return boards
