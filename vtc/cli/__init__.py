"""The command `vtc`. Its modules import what a command needs inside that command, so that help comes at once."""

from __future__ import annotations

from vtc.cli.main import main as main
