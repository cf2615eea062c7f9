"""What a training run shows and writes down: its progress, and one JSON line per validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtc.eval.progress import ConsoleProgress
from vtc.eval.tiny.settings import Stage

_SMOOTHING = 0.98


class Reporter(ConsoleProgress):
    """Reports the steps of a run and their losses, and appends validations to a file."""

    def __init__(self, log: Path, every_seconds: float = 30.0) -> None:
        super().__init__(every_seconds)
        self._log = log
        self._losses: dict[str, float] = {}

    def rendering(self, scenes: int) -> Callable[[int], None]:
        """Begin the rendering of that many scenes; call the result with the number of new ones."""
        self.start(scenes, 0, "scenes")
        return self.advance

    def begin(self, stage: Stage, step: int) -> None:
        """Begin a stage at a step."""
        self._losses = {}
        self.start(stage.steps, step, f"steps of stage {stage.name}")

    def step(self, losses: dict[str, float]) -> None:
        """Count one step and its losses."""
        for name, value in losses.items():
            self._losses[name] = _SMOOTHING * self._losses.get(name, value) + (1 - _SMOOTHING) * value
        self.advance(1, _said(self._losses))

    def log(self, stage: Stage, step: int, seconds: float, measured: dict[str, float]) -> None:
        """Append one validation to the log file and print it; where nothing was measured, the losses."""
        losses = {name: round(value, 4) for name, value in self._losses.items()}
        row: dict[str, Any] = {"stage": stage.name, "step": step, "seconds": round(seconds), "losses": losses}
        row["measured"] = {name: round(value, 4) for name, value in measured.items()}
        with self._log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.note(f"{stage.name} {step}: {_said(measured or losses)}")


def _said(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
