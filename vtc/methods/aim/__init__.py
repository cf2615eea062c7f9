"""AIM (`method.py`), the importance of tokens (`importance.py`) and the falling schedule (`schedule.py`)."""

from __future__ import annotations

from vtc.methods.aim.method import AIM as AIM
