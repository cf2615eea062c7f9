"""What a training run shows and writes down: a progress bar with the time left, and one JSON line per validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vtc.app.talk import LOG, show, talking
from vtc.eval.tiny.settings import Stage

_SMOOTHING = 0.98


class Reporter:
    """Shows the state of a run on stderr and appends validations to a file."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._losses: dict[str, float] = {}
        self._task: TaskID | None = None
        show()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
            disable=not talking(),
            speed_estimate_period=300,
        )

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def rendering(self, scenes: int) -> Callable[[int], None]:
        """A bar for the rendering of that many scenes; call the result with the number of new ones."""
        task = self._bar.add_task("scenes", total=scenes, losses="")
        return lambda done: self._bar.update(task, advance=done)

    def start(self, stage: Stage, step: int) -> None:
        """Begin the bar of a stage at a step."""
        self._losses = {}
        self._task = self._bar.add_task(f"stage {stage.name}", total=stage.steps, completed=step, losses="")

    def advance(self, losses: dict[str, float]) -> None:
        """Count one step and its losses."""
        for name, value in losses.items():
            self._losses[name] = _SMOOTHING * self._losses.get(name, value) + (1 - _SMOOTHING) * value
        assert self._task is not None, "start() comes before advance()"
        shown = " ".join(f"{name} {value:.3f}" for name, value in self._losses.items())
        self._bar.update(self._task, advance=1, losses=shown)

    def log(self, stage: Stage, step: int, seconds: float, measured: dict[str, float]) -> None:
        """Append one validation to the log file and print it; where nothing was measured, the losses."""
        losses = {name: round(value, 4) for name, value in self._losses.items()}
        row: dict[str, Any] = {"stage": stage.name, "step": step, "seconds": round(seconds), "losses": losses}
        row["measured"] = {name: round(value, 4) for name, value in measured.items()}
        with self._log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = " ".join(f"{name} {value:.3f}" for name, value in (measured or losses).items())
        LOG.info(f"{stage.name} {step}: {said}", extra={"console": self._bar.console})
