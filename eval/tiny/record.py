"""`training.json`: how a model was trained and how well it answers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME = "training.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


def write(folder: Path, settings: dict[str, Any], seconds: float, device: str) -> None:
    """Write the record of a finished training beside its weights."""
    record = {
        "settings": settings,
        "seconds": round(seconds),
        "device": device,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    _store(folder, record)


def add_accuracy(
    folder: Path,
    accuracy: dict[str, float],
    questions_per_family: int,
    task: str = "tiny_image",
    *,
    glanced: bool = False,
) -> None:
    """Add the accuracy on held-out samples of a task to the record, if the folder has one.

    That of tiny_image is "held_out"; those of other tasks, and what a glance gives, are in "tasks".
    """
    if not (folder / NAME).is_file():
        return
    record = json.loads((folder / NAME).read_text())
    rounded = {name: round(value, 4) for name, value in accuracy.items()}
    entry = {"questions_per_family": questions_per_family, "accuracy": rounded}
    if task == "tiny_image" and not glanced:
        record["held_out"] = entry
    else:
        record.setdefault("tasks", {})[f"{task}, glance" if glanced else task] = entry
    _store(folder, record)


def held_out(folder: Path) -> dict[str, dict[str, Any]]:
    """What the record of a folder says per task: "questions_per_family" and "accuracy"."""
    record = json.loads((folder / NAME).read_text())
    first: dict[str, dict[str, Any]] = {"tiny_image": record["held_out"]} if "held_out" in record else {}
    others: dict[str, dict[str, Any]] = record.get("tasks", {})
    return first | others


def _store(folder: Path, record: dict[str, Any]) -> None:
    (folder / NAME).write_text(json.dumps(record, indent=2) + "\n")
