"""The command `vtc`."""

from __future__ import annotations

from vtc.cli.main import main as main
