"""The command `ledger`: published figures, and whether a finished sweep reproduces them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtc.app.options import JsonOption, PluginOption, use_plugins

if TYPE_CHECKING:
    from vtc.eval.ledger import Ledger
    from vtc.eval.ledger_check import Finding

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def ledger(
    method: Annotated[str, typer.Argument(help="Figures of this method; * stands for any letters.")] = "*",
    check: Annotated[
        Path | None, typer.Option("--check", metavar="DIR", help="Compare with the finished sweep in this folder.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the ledger lies; docs/ledger of the checkout by default.")
    ] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """List published figures with the commands that would reproduce them (--json), or check a sweep against them.

    With --check the exit status is 1 if a figure deviates by more than its tolerance.
    """
    from vtc.eval.ledger import read_ledger

    use_plugins(plugin or [])
    found = read_ledger(folder).of(method)
    if check is None:
        print(json.dumps(found.listed(), indent=1)) if as_json else _list(found)
        return
    from vtc.eval.ledger_check import check as compare

    findings = compare(found, check)
    print(json.dumps([each.record() for each in findings], indent=1)) if as_json else _report(findings)
    if any(each.agrees is False for each in findings):
        raise typer.Exit(1)


def _list(found: Ledger) -> None:
    lines = [("method", "model", "tokens", "table", "values", "status")]
    for name, table in found.tables.items():
        for row in table.rows:
            tokens = table.tokens_text(row)
            lines.append((row.method, table.model, tokens, name, str(len(row.values)), row.status))
    _print(lines, (24, 18, 14, 21, 6, 12))
    count = sum(len(row.values) for table in found.tables.values() for row in table.rows)
    print(f"{count} figures in {len(found.tables)} tables; --json prints them, their sources and the commands to run")


def _report(findings: Sequence[Finding]) -> None:
    from vtc.eval.ledger_check import unmatched

    lines = [("method", "tokens", "benchmark", "published", "ours", "diff", "95 % of ours", "within", "verdict")]
    for each in findings:
        if each.ours is None or each.difference is None:
            continue
        interval = "-" if each.low is None or each.high is None else f"{each.low:.1f} to {each.high:.1f}"
        figures = (f"{each.published:.5g}", f"{each.ours:.1f}", f"{each.difference:+.1f}", interval)
        lines.append((each.method, each.tokens, each.benchmark, *figures, f"{each.tolerance:g}", each.verdict))
    if len(lines) > 1:
        _print(lines, (18, 13, 14, 9, 6, 6, 16, 6, 10))
    for reason, count in unmatched(findings):
        print(f"nothing to compare: {reason} ({count} figure{'s' if count > 1 else ''})")
    verdicts = [each.agrees for each in findings]
    print(f"{verdicts.count(True)} reproduced, {verdicts.count(False)} deviate, {verdicts.count(None)} not compared")


def _print(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Columns of at most these widths; a longer text goes on in further lines."""
    fitted = [min(width, max(len(line[i]) for line in lines)) for i, width in enumerate(widths)]
    for line in lines:
        pieces = [_folded(text, width) for text, width in zip(line, fitted, strict=True)]
        for number in range(max(map(len, pieces))):
            shown = [each[number] if number < len(each) else "" for each in pieces]
            print(" ".join(f"{text:{width}}" for text, width in zip(shown, fitted, strict=True)).rstrip())


def _folded(text: str, width: int) -> list[str]:
    """A text in pieces of this width, broken behind a sign where one is near enough.

    >>> _folded("aim(merge_ratio=0.25, schedule=[21, 29])", 24)
    ['aim(merge_ratio=0.25,', 'schedule=[21, 29])']
    """
    pieces = []
    while len(text) > width:
        cut = max(text.rfind(sign, width // 3, width) for sign in " ,-(=") + 1 or width
        pieces.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    return [*pieces, text]
