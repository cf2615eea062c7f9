"""The document about all methods, made of their docstrings and their plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtc import adapters
from vtc.app.pages import page, table

ABOUT = """the docstrings, which `vtc methods --long` prints as well. Budgets mean the same everywhere: `retention` (or
`keep`) is the mean over the LLM's layers of the visual tokens that enter a layer, per image or video, as a share of
(or a count among) its tokens in the input; for methods that act after the prefill alone, of the visual entries that
stay in a layer's KV cache. Methods without a budget decide for themselves; what they kept is in the
statistics of every run. Layers count from 0, and "llm layer k" means in front of it."""


def method_pages(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown of the entries that `describe_methods` gives."""
    return page("Methods", "vtc methods --markdown", ABOUT, overview(entries), *map(_page, entries))


def overview(entries: Sequence[dict[str, Any]], pages: str = "") -> str:
    """A Markdown table with a line for each of the entries that `describe_methods` gives.

    pages: the address of what `method_pages` made, seen from where the table stands.
    """
    families = len(adapters.families())
    rows = [
        [
            f"[`{entry['name']}`]({pages}#{entry['name']})",
            *(_list(entry[key]) for key in ("stages", "needs")),
            "yes" if entry["trained"] else "no",
            "all" if len(entry["families"]) == families else _list(entry["families"]),
            _list(entry["positions"]),
        ]
        for entry in entries
    ]
    return table(["method", "acts", "reads", "learned weights", "families", "positions"], rows)


def _list(words: Sequence[str]) -> str:
    return ", ".join(words) or "-"


def _page(entry: dict[str, Any]) -> str:
    options = ", ".join(f"`{name}={value!r}`" for name, value in entry["hyper_parameters"].items()) or "none"
    plans = dict.fromkeys((plan["family"], _stages(plan["stages"]), _list(plan["needs"])) for plan in entry["plans"])
    same: dict[tuple[str, str], list[str]] = {}
    for family, stages, needs in plans:
        same.setdefault((stages, needs), []).append(family)
    rows = [[_list(list(dict.fromkeys(who))), where, reads] for (where, reads), who in same.items()]
    plan = table(["on reference checkpoints of", "acts at", "reads"], rows)
    budget = "takes a budget" if entry["needs_budget"] else "takes no budget"
    return (
        f"## {entry['name']}\n\nVersion {entry['version']}, {budget} by default. Hyper-parameters: {options}.\n\n"
        f"{_paragraphs(entry['description'])}\n\n{plan}"
    )


def _paragraphs(text: str) -> str:
    """A docstring as Markdown, a line per paragraph, so that no formula begins a list; examples as they are."""
    return "\n\n".join(map(_paragraph, text.replace("``", "`").split("\n\n")))


def _paragraph(part: str) -> str:
    return f"```python\n{part}\n\n```" if part.startswith(">>>") else " ".join(part.split())


def _stages(names: Sequence[str]) -> str:
    """Stages in words, neighbouring layers as a range.

    >>> _stages(["pre-llm", "llm layer 3", "llm layer 4", "llm layer 5", "llm layer 9", "after prefill"])
    'pre-llm, llm layers 3 to 5, llm layer 9, after prefill'
    >>> _stages(["after prefill", "after prefill from llm layer 1", "after prefill from llm layer 2"])
    'after prefill, after prefill from llm layers 1 to 2'
    """
    found: list[tuple[str, list[int]]] = []
    for name in names:
        kind, _, number = name.rpartition(" layer ")
        layer = int(number) if kind and number.isdecimal() else None
        before, run = found[-1] if found else ("", [])
        if layer is not None and kind == before and run and run[-1] + 1 == layer:
            run.append(layer)
        else:
            found.append((name, []) if layer is None else (kind, [layer]))
    parts = [kind if not run else f"{kind} layer{_range(run)}" for kind, run in found]
    return ", ".join(parts) or "-"


def _range(run: Sequence[int]) -> str:
    return f" {run[0]}" if len(run) == 1 else f"s {run[0]} to {run[-1]}"
