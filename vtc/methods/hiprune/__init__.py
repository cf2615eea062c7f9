"""HiPrune (`method.py`) and the neighbours of its anchors (`neighbours.py`)."""

from __future__ import annotations

from vtc.methods.hiprune.method import HiPrune as HiPrune
