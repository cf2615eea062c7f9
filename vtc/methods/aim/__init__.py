"""AIM (`method.py`) and its falling schedule (`schedule.py`)."""

from __future__ import annotations

from vtc.methods.aim.method import AIM as AIM
