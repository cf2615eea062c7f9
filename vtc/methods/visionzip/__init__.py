"""VisionZip (`method.py`) and its contextual tokens (`contextual.py`)."""

from __future__ import annotations

from vtc.methods.visionzip.method import VisionZip as VisionZip
