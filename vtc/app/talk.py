"""What the library tells people besides results: the logger `vtc`, whose lines commands show on stderr.

A program that imports the library decides itself what becomes of them, as with any logger; warnings and errors reach
stderr if it says nothing. The commands, and whoever makes a `ConsoleProgress`, call `show`.
"""

from __future__ import annotations

import logging
import sys

from rich.console import Console

LOG = logging.getLogger("vtc")


class ConsoleHandler(logging.Handler):
    """Prints lines on the console that a record names, above the bar there, or on stderr as it is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of `record`, unwrapped."""
        console: Console = getattr(record, "console", None) or Console(file=sys.stderr)
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


_handler = ConsoleHandler()


def show(level: int | None = None) -> None:
    """Show lines of at least `level` on stderr. None leaves it as it is, at first INFO."""
    if _handler not in LOG.handlers:
        LOG.addHandler(_handler)
        LOG.propagate = False
        level = level or LOG.level or logging.INFO
    if level is not None:
        LOG.setLevel(level)


def talking() -> bool:
    """Whether lines that are neither warnings nor errors are shown, and with them bars."""
    return LOG.isEnabledFor(logging.INFO)
