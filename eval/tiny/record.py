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


def add_accuracy(folder: Path, accuracy: dict[str, float], questions_per_family: int) -> None:
    """Add the accuracy on held-out scenes to the record, if the folder has one."""
    if not (folder / NAME).is_file():
        return
    record = json.loads((folder / NAME).read_text())
    rounded = {name: round(value, 4) for name, value in accuracy.items()}
    record["held_out"] = {"questions_per_family": questions_per_family, "accuracy": rounded}
    _store(folder, record)


def _store(folder: Path, record: dict[str, Any]) -> None:
    (folder / NAME).write_text(json.dumps(record, indent=2) + "\n")
