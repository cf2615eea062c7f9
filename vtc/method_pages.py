"""The document about all methods, made of their docstrings and their plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = """# Methods

Made by `vtc methods --markdown` from the docstrings; `vtc methods --long` prints the same texts. Budgets mean the same
everywhere: `retention` (or `keep`) is the mean over the LLM's layers of the visual tokens that enter a layer, per image
or video, as a share of (or a count among) its tokens in the input. Methods without a budget decide for themselves; what
they kept is in the statistics of every run. Layers count from 0, and "llm layer k" means in front of it.

| method | acts | reads | learned weights | positions |
|---|---|---|---|---|
"""


def method_pages(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown of the entries that `describe_methods` gives."""
    rows = [
        f"| [`{entry['name']}`](#{entry['name']}) | {_list(entry['stages'])} | {_list(entry['needs'])} | "
        f"{'yes' if entry['trained'] else 'no'} | {_list(entry['positions'])} |"
        for entry in entries
    ]
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(_page(entry) for entry in entries)


def _list(words: Sequence[str]) -> str:
    return ", ".join(words) or "-"


def _page(entry: dict[str, Any]) -> str:
    options = ", ".join(f"`{name}={value!r}`" for name, value in entry["hyper_parameters"].items()) or "none"
    plans = dict.fromkeys((plan["family"], _list(plan["stages"]), _list(plan["needs"])) for plan in entry["plans"])
    same: dict[tuple[str, str], list[str]] = {}
    for family, stages, needs in plans:
        same.setdefault((stages, needs), []).append(family)
    rows = [f"| {_list(list(dict.fromkeys(who)))} | {where} | {reads} |" for (where, reads), who in same.items()]
    table = "\n".join(["| on reference checkpoints of | acts at | reads |", "|---|---|---|", *rows])
    budget = "takes a budget" if entry["needs_budget"] else "takes no budget"
    return (
        f"## {entry['name']}\n\nVersion {entry['version']}, {budget} by default. Hyper-parameters: {options}.\n\n"
        f"{entry['description'].replace('``', '`')}\n\n{table}\n"
    )
