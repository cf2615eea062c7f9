"""How long work reports to a person, on stderr: bars with the remaining time, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Self

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
from vtc.eval.store import Record


class SilentProgress:
    """Reports nothing."""

    def note(self, text: str) -> None:
        """One line for the user."""

    def start(self, total: int, done: int, what: str = "answers") -> None:
        """`total` of what is counted are wanted, `done` of them are there already; what was counted before is over."""

    def advance(self, count: int, status: str = "") -> None:
        """So many more are there; `status` says how it goes, losses for instance."""

    def fail(self, failure: Record, lost: int) -> None:
        """A failure was recorded; `lost` answers will not be fetched in this run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class ConsoleProgress(SilentProgress):
    """Reports to stderr, or below the cell of a notebook."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        # The stream is named because whatever redirects sys.stderr later means to silence others, not this bar.
        self.console = Console(file=sys.stderr)
        show()
        self._live = talking() and (self.console.is_terminal or self.console.is_jupyter)
        self._every = every_seconds
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self._live,
            speed_estimate_period=300,
        )
        self._id: TaskID | None = None
        self._what = ""
        self._total = self._done = self._stored = 0
        self._began = self._spoke = 0.0

    def note(self, text: str) -> None:
        """Log one line, which appears above the bar."""
        LOG.info(text, extra={"console": self.console})

    def start(self, total: int, done: int, what: str = "answers") -> None:
        """Begin a bar with `done` of `total`."""
        self._total, self._done, self._stored, self._what = total, done, done, what
        self._began = self._spoke = time.monotonic()
        self._id = self._bar.add_task(what, total=total, completed=done, status="")

    def advance(self, count: int, status: str = "") -> None:
        """Move the bar, or print a line when the last one is old."""
        self._done += count
        if self._id is not None:
            self._bar.update(self._id, completed=self._done, status=status)
        now = time.monotonic()
        if not self._live and now - self._spoke >= self._every and self._done > self._stored:
            self._spoke = now
            left = (now - self._began) / (self._done - self._stored) * (self._total - self._done)
            more = f", {status}" if status else ""
            self.note(f"{self._done} of {self._total} {self._what}, {timedelta(seconds=round(left))} left{more}")

    def fail(self, failure: Record, lost: int) -> None:
        """Print the reason and shorten the bar."""
        self._total -= lost
        if self._id is not None:
            self._bar.update(self._id, total=self._total)
        text = f"failed: {failure['task']}, {failure['stage']}: {failure['error']}: {failure['reason']}"
        LOG.error(text, extra={"console": self.console})

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def default_progress() -> SilentProgress:
    """A bar in a notebook, where someone looks on; silence in programs."""
    return ConsoleProgress() if Console().is_jupyter else SilentProgress()
