"""FitPrune (`method.py`) and the recipe that a calibration makes for it (`recipe.py`)."""

from __future__ import annotations

from vtc.methods.fitprune.method import FitPrune as FitPrune
