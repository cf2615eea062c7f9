"""The command `tasks`: what a sweep can name, and what the benchmark groups need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.app.options import JsonOption
from vtc.cli.shared import IncludePath, free_stdout

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def tasks(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Show all that is known of these: data, notes, ...")
    ] = None,
    include_path: IncludePath = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also lmms-eval's own generate_until tasks; most need data from the hub.")
    ] = False,
    path: Annotated[
        bool, typer.Option("--path", help="Print the folder of the built-in tasks, for lmms-eval's --include_path.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the tasks that a sweep can name, or show what one needs: data set, columns, videos, and what to heed."""
    if path:
        from vtc.eval import TASKS

        print(TASKS)
        return
    if names:
        _show([_details(name, include_path or ()) for name in _members(names)], as_json=as_json)
        return
    with free_stdout():
        from vtc.eval.catalogue import list_tasks
        from vtc.eval.suite import BENCHMARKS, GROUPS, HEAD, rows

        listed = list_tasks(include_path or (), everything=everything)
    if as_json:
        groups: list[dict[str, Any]] = [{"name": name, "kind": "group", "folder": ""} for name in GROUPS]
        known = {entry["name"]: entry for entry in [*listed, *groups]}
        for benchmark in BENCHMARKS:
            known[benchmark.name] = {"kind": "task", "folder": ""} | known.get(benchmark.name, {}) | benchmark.record()
        print(json.dumps(list(known.values()), indent=1))
        return
    width = max((len(entry["name"]) for entry in listed), default=0)
    for entry in listed:
        print(f"{entry['name']:{width}}  {entry['kind']:5}  {entry['folder']}")
    for group, title in GROUPS.items():
        lines = [HEAD, *rows(group)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        print(f"\n{group}: {title} of lmms-eval (*: only asked where rules cannot read an answer)")
        for line in lines:
            print("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())
    print("\n`vtc tasks NAME` shows the data set, columns and videos of a task, and what to heed.")


def _members(names: Sequence[str]) -> list[str]:
    from vtc.eval.suite import expand

    return [name for name, _ in expand(names)]


def _details(name: str, include_path: Sequence[Path]) -> dict[str, str]:
    from vtc.eval.suite import benchmark_of, details

    if (benchmark := benchmark_of([name])) is not None:
        return {"name": name, **details(benchmark)}
    with free_stdout():
        from vtc.eval.catalogue import task_details

        return {"name": name, **task_details(name, include_path)}


def _show(found: Sequence[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(list(found), indent=1))
        return
    for about in found:
        print(about["name"])
        for head, text in about.items():
            if head != "name":
                print(f"  {head + ':':15}{text}")
