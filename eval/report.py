"""The files that people read, drawn from a store: `metrics.csv`, `figure.png`, the self-contained `report.html`."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval import figure
from vtc.eval.columns import COLUMNS
from vtc.eval.results import Results, read_results, to_csv
from vtc.eval.tables import Grid, grid, nominal, significant, tokens

TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path) -> Results:
    """Write the three files into `folder` from the store that it holds, and return what they show.

    Raises:
        InputError: the folder holds no sweep, or cannot be written.
    """
    results = read_results(folder)
    picture = figure.draw(results)
    files = {
        "metrics.csv": to_csv(results).encode(),
        "figure.png": picture,
        "report.html": render(results, picture).encode(),
    }
    for name, content in files.items():
        temporary = folder / f"{name}.new"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
        except OSError as error:
            raise InputError(f"cannot write {str(folder / name)!r}: {error.strerror or error}") from error
    return results


def render(results: Results, picture: bytes) -> str:
    """The report as one HTML page that needs no other file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(significant=significant, tokens=tokens, plain=_plain, nominal=nominal)
    return environment.get_template("report.html").render(
        results=results,
        columns=COLUMNS,
        run=results.run,
        sweep=results.run["sweeps"][-1],
        picture=base64.b64encode(picture).decode(),
        caption=_caption(results),
        tasks=[_task(results, task) for task in results.tasks],
    )


def _caption(results: Results) -> str:
    """The captions of all panels, each task named where they differ."""
    words = {task: figure.caption(grid(results, task, results.main_metric(task))) for task in results.tasks}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return " ".join(f"{task}: {text}" for task, text in words.items())


def _plain(value: Any) -> str:
    """A setting as text: lists and mappings without brackets and quotes."""
    if isinstance(value, dict):
        if value.get("parts"):
            return str(value["name"])
        rest = ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items() if key != "name")
        return f"{value['name']}({rest})" if "name" in value and rest else str(value.get("name", rest))
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _task(results: Results, task: str) -> dict[str, Any]:
    metrics = results.metrics(task)
    grids: dict[str, Grid] = {metric: grid(results, task, metric) for metric in metrics}
    main = grids.get(results.main_metric(task))
    methods = sorted({line["ci_method"] for line in results.lines if line["task"] == task})
    tests = sorted({line["diff_method"] for line in results.lines if line["task"] == task and line["diff_method"]})
    return {
        "name": task,
        "settings": results.run["tasks"][task],
        "main": main,
        "grids": grids,
        "intervals": methods,
        "tests": tests,
    }
