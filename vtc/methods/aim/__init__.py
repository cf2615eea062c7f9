"""AIM (`method.py`) and its ranking by PageRank (`importance.py`)."""

from __future__ import annotations

from vtc.methods.aim.method import AIM as AIM
