"""The document about all methods, made of their docstrings and their plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtc.app.pages import page, table

ABOUT = """the docstrings, which `vtc methods --long` prints as well. Budgets mean the same everywhere: `retention` (or
`keep`) is the mean over the LLM's layers of the visual tokens that enter a layer, per image or video, as a share of
(or a count among) its tokens in the input. Methods without a budget decide for themselves; what they kept is in the
statistics of every run. Layers count from 0, and "llm layer k" means in front of it."""


def method_pages(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown of the entries that `describe_methods` gives."""
    rows = [
        [
            f"[`{entry['name']}`](#{entry['name']})",
            *(_list(entry[key]) for key in ("stages", "needs")),
            "yes" if entry["trained"] else "no",
            _list(entry["positions"]),
        ]
        for entry in entries
    ]
    head = "method", "acts", "reads", "learned weights", "positions"
    return page("Methods", "vtc methods --markdown", ABOUT, (head, rows), *map(_page, entries))


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
    """A docstring as Markdown, a line per paragraph, so that no formula begins a list."""
    return "\n\n".join(" ".join(part.split()) for part in text.replace("``", "`").split("\n\n"))


def _stages(names: Sequence[str]) -> str:
    """Stages in words, neighbouring LLM layers as a range.

    >>> _stages(["pre-llm", "llm layer 3", "llm layer 4", "llm layer 5", "llm layer 9", "after prefill"])
    'pre-llm, llm layers 3 to 5, llm layer 9, after prefill'
    """
    parts: list[str] = []
    run: list[int] = []

    def close() -> None:
        if run:
            parts.append(f"llm layer {run[0]}" if len(run) == 1 else f"llm layers {run[0]} to {run[-1]}")
            run.clear()

    for name in names:
        layer = int(name.removeprefix("llm layer ")) if name.startswith("llm layer ") else None
        if layer is None or (run and layer != run[-1] + 1):
            close()
        if layer is None:
            parts.append(name)
        else:
            run.append(layer)
    close()
    return ", ".join(parts) or "-"
