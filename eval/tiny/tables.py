"""Chance of every family, and a document with the held-out accuracy of trained models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vtc.eval.tiny.benchmark import QUESTIONS, Row, task_rows
from vtc.eval.tiny.record import held_out
from vtc.eval.tiny.tasks import TASKS

_HEAD = """# Embedded models on held-out samples

Made by `vtc tiny table`. Scores in per cent, through processor and `generate`: exact match of the first word, F1 over
the things named for lists. Samples come from other seeds than those of training, digits from images that it never saw.
Answers are balanced within a family; `chance` is the share of the most frequent answer among the questions of the
benchmark, which for balanced answers is one divided by their number. `glance` is what the model scores where it sees
the middle frame of a clip only, or a picture shrunk to 84 px.
"""


def chance(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the most frequent answer per family; 0 for lists, none of which a constant answer hits."""
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(row.family, Counter())[row.answer] += 1
    return {
        family: max(counts.values()) / counts.total() if max(counts.values()) > 2 else 0.0
        for family, counts in answers.items()
    }


def document(folders: dict[str, Path]) -> str:
    """Markdown with one table per task; `folders` are those of the models, by name."""
    found = {name: held_out(folder) for name, folder in folders.items()}
    parts = [_HEAD]
    for task, per_family in QUESTIONS.items():
        columns = [
            (label, entries[key]["accuracy"])
            for name, entries in found.items()
            for label, key in ((name, task), (f"{name}, glance", f"{task}, glance"))
            if key in entries
        ]
        if not columns:
            continue
        guess = chance(task_rows(TASKS[task], per_family))
        parts.append(f"## {task}\n")
        parts.append(f"| family | chance | {' | '.join(label for label, _ in columns)} |")
        parts.append(f"|---|---|{'---|' * len(columns)}")
        for family in (*TASKS[task].graded, "mean"):
            first = f"{100 * guess[family]:.0f}" if family in guess else ""
            cells = [f"{100 * shares[family]:.1f}" for _, shares in columns]
            parts.append(f"| {family} | {first} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)
